"""Replicated optimizers: whatever a step still has to tell is told before its update.

There is no way back behind an update that is not mirrored, so nothing may be left to do behind it that a lost rank
could take along. Upstream reduces losses after the update, over the data-parallel group of the last stage: here that is
done before, on the same values by the same operation, and upstream's own reduction is answered with the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_flashrecovery.adapters.megatron.session_seam import RefusalSeam
from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession
from megatron_flashrecovery.runtime.moment import Moment


class EarlyLosses:
    """Stands between the seams of a step and the session."""

    def __init__(self, session: LoopSession) -> None:
        self._session = session
        self._losses: list[dict[str, torch.Tensor]] = []

    def watch(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it returned last counts."""

        def watched(*args: Any, **named: Any) -> Any:
            self._losses = forward_backward(*args, **named)
            return self._losses

        return watched

    @property
    def refusal(self) -> RefusalSeam:
        return self._session.refusal

    def gate(self, objects: Callable[[], bool]) -> bool:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        reduced = []
        for value in self._sums():
            torch.distributed.all_reduce(value, group=group)
            reduced.append(value)
        objection = self._session.gate(objects)
        self._session.foretell(group, "allreduce", reduced)
        return objection

    def mark(self, moment: Moment, tensor: torch.Tensor | None = None) -> None:
        self._session.mark(moment, tensor)

    def before_update(self) -> None:
        self._session.before_update()

    def after_update(self) -> None:
        self._session.after_update()

    def _sums(self) -> list[torch.Tensor]:
        """What upstream's ``train_step`` reduces: of each loss that comes with a number of tokens, both, summed over
        the micro batches. Nothing but on the last stage."""
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True) or not self._losses:
            return []
        columns = [[losses[name].view(-1) for losses in self._losses] for name in self._losses[0]]
        return [torch.vstack(column).sum(dim=0) for column in columns if column[0].numel() == 2]
