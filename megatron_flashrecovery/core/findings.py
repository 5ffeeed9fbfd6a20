"""What nodes tell of numbers that cannot be right: the events, and what each rank has found out by itself.

Like all events they are per node and name exceptions only: whose *own* numbers were bad before any reduction spread
them, and where they came up first in a step that was looked at closely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.policy import NanChoice


@dataclass(frozen=True)
class Finding:
    """The first value of a step on one rank that was not finite although all that it was made of was. ``number`` counts
    the values that were looked at before it: ranks that compute the same modules count alike, so the smallest number is
    where it began. ``where`` is a module or a parameter, ``what`` says which value of it."""

    number: int
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} of {self.where}"


@dataclass(frozen=True)
class NumbersBad:
    """Ranks of one node saw, before the update to ``step``, that its numbers are not finite, and wait to be told to
    stop. ``what`` is for people. ``own`` says of ranks whose own loss or gradients were not finite before they were
    reduced; ``findings`` come from a step that was looked at closely. ``choice`` is the user's."""

    node: NodeId
    epoch: Epoch
    step: Step
    ranks: tuple[Rank, ...]
    what: str
    own: Mapping[Rank, str] = field(default_factory=dict)
    findings: Mapping[Rank, Finding] = field(default_factory=dict)
    choice: NanChoice = NanChoice.STOP


@dataclass(frozen=True)
class NumbersSound:
    """A step that was looked at closely, because its numbers were bad before, is complete: they were not bad again."""

    node: NodeId
    epoch: Epoch
    step: Step


@dataclass(frozen=True)
class PeersDiffered:
    """``rank`` keeps the mirror of its data-parallel peer ``guest``, and their sums over the same part of the
    parameters of ``step`` are not the same. ``peers``: how many hold these parameters. ``part`` is for people."""

    node: NodeId
    epoch: Epoch
    step: Step
    rank: Rank
    guest: Rank
    peers: int
    part: str


def first_of(findings: Mapping[Rank, Finding]) -> tuple[Rank, Finding] | None:
    """Where it began."""
    return min(findings.items(), key=lambda item: (item[1].number, item[0]), default=None)
