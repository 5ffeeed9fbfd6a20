"""Which pieces of this rank nobody else has, as the session has to see it.

A rank without a data-parallel peer has no peer to copy from, whatever its optimizer is: all that it has is unique, and
is mirrored every step as the shards of a sharded optimizer are.
"""

from __future__ import annotations

from megatron_flashrecovery.runtime.framework import Framework
from megatron_flashrecovery.state.pieces import TensorPiece


class Ownership:
    def __init__(self, framework: Framework) -> None:
        self._framework = framework
        self._has_everything_alone = not framework.sharded and len(framework.data_parallel_peers()) == 1
        self.sharded = framework.sharded or self._has_everything_alone

    def unique(self) -> list[TensorPiece]:
        """Mirrored every step."""
        return [piece for piece in self._framework.tensor_pieces() if self._is_unique(piece)]

    def replicated(self) -> list[TensorPiece]:
        """What data-parallel peers hold too."""
        return [piece for piece in self._framework.tensor_pieces() if not self._is_unique(piece)]

    def _is_unique(self, piece: TensorPiece) -> bool:
        return piece.unique or self._has_everything_alone
