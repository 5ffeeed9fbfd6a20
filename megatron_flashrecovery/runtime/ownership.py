"""Which pieces of this rank nobody else has, as the session has to see it.

A rank without a data-parallel peer has no peer to copy from, whatever its optimizer is: all that it has is unique, and
is mirrored every step as the shards of a sharded optimizer are.
"""

from __future__ import annotations

from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.runtime.checksum import Checksum
from megatron_flashrecovery.runtime.framework import Framework
from megatron_flashrecovery.state.pieces import TensorPiece


class Ownership:
    def __init__(self, framework: Framework, checksum_steps: int = 0) -> None:
        self._framework = framework
        self._has_everything_alone = not framework.sharded and len(framework.data_parallel_peers()) == 1
        self.sharded = framework.sharded or self._has_everything_alone
        shared = [piece for piece in self.replicated() if not piece.peers_differ]
        self.of_peers = shared[0].tensor if shared else None
        """A tensor that data-parallel peers hold too, if there is one."""
        self.checksum = Checksum(shared, checksum_steps) if checksum_steps and shared else None

    def unique(self) -> list[TensorPiece]:
        return [piece for piece in self._framework.tensor_pieces() if self._is_unique(piece)]

    def mirrored(self) -> list[TensorPiece]:
        """In every step: what is unique, and ahead of it what says how the rest is."""
        return [*([] if self.checksum is None else [self.checksum.piece]), *self.unique()]

    def replicated(self) -> list[TensorPiece]:
        """What data-parallel peers hold too."""
        return [piece for piece in self._framework.tensor_pieces() if not self._is_unique(piece)]

    def take_checksum(self, step: Step) -> None:
        """What is in memory is the state of ``step``, and nobody reads the last checksum any more: the mirror that it
        is in has been acknowledged."""
        if self.checksum is not None:
            self.checksum.take(step)

    def _is_unique(self, piece: TensorPiece) -> bool:
        return piece.unique or self._has_everything_alone
