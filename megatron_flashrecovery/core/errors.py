"""The exceptions of this package, by whose fault each one is.

    FlashRecoveryError
    ├── ConfigError           the user: a flag, the layout, the script, a port, the token, versions that differ
    ├── SeamChanged           upstream: a framework no longer has a place that an adapter relies on
    ├── JoinMismatch          the script: a replacement does not repeat the start-up that was recorded for its rank
    ├── SnapshotMismatch      the network or memory: bytes that are not what their owner fingerprinted
    ├── LinkLost              the network: a peer, host, agent or controller cannot be reached any more
    ├── RecordDamaged         the disk: a journal or summary that cannot be read back
    └── ImpossibleTransition  us: a state machine was told what cannot have happened

Messages name the thing (rank, step, flag) and the remedy, in one line, in lower case and without a full stop. What is
expected to happen, a rank without a source or a guest without a host, is a value and no exception. ``Interrupted``
(``comm.parking``) is not here: it is no error, and no ``Exception``.
"""

from __future__ import annotations


class FlashRecoveryError(Exception):
    """Everything that this package raises on purpose."""


class ConfigError(FlashRecoveryError):
    """What the user asked for cannot be done: the command prints the message as one line and exits with 2."""


class SeamChanged(FlashRecoveryError):
    """An installed framework lacks a function, argument or attribute that its adapter relies on."""


class JoinMismatch(FlashRecoveryError):
    """A replacement's start-up differs from the recorded one; the message names both sides."""


class SnapshotMismatch(FlashRecoveryError):
    """A state whose fingerprint is not the one that its owner sent: it does not exist."""


class LinkLost(FlashRecoveryError):
    """A connection ended that nobody was told to end."""


class RecordDamaged(FlashRecoveryError):
    """A record on disk that is not what was written; a torn last line of a journal is not damage."""


class ImpossibleTransition(FlashRecoveryError):
    """A bug of ours. The message tells the whole story: the state, the event, and what came before."""
