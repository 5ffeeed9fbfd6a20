"""How two ends of the data plane begin: both prove that they know the job token, and say what the connection is for.

    host   -> guest   nonce of the host
    guest  -> host    nonce of the guest, MAC over both nonces and the hello, hello
    host   -> guest   MAC over both nonces, and Welcome or Refused

A guest without the token gets no further word, and a host without it learns nothing but nonces. The bytes that follow
are neither signed nor encrypted: who can alter them in flight can alter the job.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass
from typing import Literal

import msgspec

from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.comm.mirror_stream import Deadline, Stream
from megatron_flashrecovery.core.errors import LinkLost, SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.snapshot import Offer

_NONCE_NBYTES = 32
_MAC_NBYTES = 32
_LENGTH = struct.Struct("!I")
_HELLO_LIMIT_NBYTES = 4096


@dataclass(frozen=True)
class Request:
    """What the worker that takes the seat ``rank`` asks of a giver: the mirror of its rank (from its host), or the live
    state of a data-parallel peer (from that peer)."""

    rank: Rank
    step: Step
    epoch: Epoch
    kind: Literal["mirror", "state"]


@dataclass(frozen=True)
class Hello:
    """``request`` is what a replacement wants; without one, ``rank`` is a guest that will offer its snapshots.
    ``lends``: the descriptor of its memory follows and is answered, and its offers say where in it their bytes are."""

    rank: Rank
    epoch: Epoch
    request: Request | None = None
    lends: bool = False


@dataclass(frozen=True)
class Welcome:
    rank: Rank


@dataclass(frozen=True)
class OfferInPlace:
    """``offset`` counts in the memory that the guest has lent."""

    offer: Offer
    offset: int


@dataclass(frozen=True)
class Acknowledged:
    step: Step
    epoch: Epoch


@dataclass(frozen=True)
class Refused:
    """``over``: the connection's epoch has ended, so nothing else will be taken either."""

    reason: str
    over: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """Follows the bytes of what is given."""

    value: bytes


CODEC = Codec((Welcome, Acknowledged, Refused, Fingerprint, Offer, OfferInPlace))


class Stranger(Exception):
    """Somebody who does not know the token. Not to be answered."""


def introduce(stream: Stream, token: bytes, hello: Hello, deadline: Deadline) -> None:
    """The guest's part. Raises ``LinkLost``, also if the host refuses."""
    theirs, mine = stream.receive(_NONCE_NBYTES, deadline), secrets.token_bytes(_NONCE_NBYTES)
    body = msgspec.msgpack.encode(hello)
    stream.send([mine, _mac(token, b"guest", theirs, mine, body), _LENGTH.pack(len(body)), body], deadline)
    try:
        proof = stream.receive(_MAC_NBYTES, deadline)
    except LinkLost as lost:
        raise LinkLost(f"{lost}: do both ends have the token of this job") from None
    if not hmac.compare_digest(proof, _mac(token, b"host", theirs, mine)):
        raise LinkLost("the host does not have the token of this job")
    heard(stream.hear(deadline), Welcome)


def admit(stream: Stream, token: bytes, deadline: Deadline) -> Hello:
    """The host's part, up to its proof. Raises ``Stranger``, or ``LinkLost`` if the other end goes away."""
    mine = secrets.token_bytes(_NONCE_NBYTES)
    stream.send([mine], deadline)
    theirs, mac = stream.receive(_NONCE_NBYTES, deadline), stream.receive(_MAC_NBYTES, deadline)
    (length,) = _LENGTH.unpack(stream.receive(_LENGTH.size, deadline))
    if length > _HELLO_LIMIT_NBYTES:
        raise Stranger(f"a hello of {length} bytes")
    body = stream.receive(length, deadline)
    if not hmac.compare_digest(mac, _mac(token, b"guest", mine, theirs, body)):
        raise Stranger("wrong token")
    try:
        hello = msgspec.msgpack.decode(body, type=Hello)
    except msgspec.DecodeError as error:
        raise Stranger(f"another version: {error}") from None
    stream.send([_mac(token, b"host", mine, theirs)], deadline)
    return hello


def heard(message: object, *expected: type) -> object:
    """``message`` if it is one of ``expected``. Raises ``SnapshotMismatch`` or ``LinkLost`` for a refusal."""
    if isinstance(message, Refused):
        raise LinkLost(message.reason) if message.over else SnapshotMismatch(message.reason)
    if not isinstance(message, expected):
        raise LinkLost(f"{type(message).__name__} out of turn: do both ends run the same version")
    return message


def _mac(token: bytes, *parts: bytes) -> bytes:
    return hmac.new(token, b"flashrecovery mirror 2\0" + b"".join(parts), hashlib.sha256).digest()
