"""Numbers that must not be written: a rank says so to its agent, and waits for what the job decides."""

from __future__ import annotations

from typing import NoReturn

from megatron_flashrecovery.comm.channel import Channel
from megatron_flashrecovery.core.findings import Finding
from megatron_flashrecovery.core.ids import Step
from megatron_flashrecovery.core.job import SETTLED_AFTER
from megatron_flashrecovery.runtime import dialogue
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.line import Line
from megatron_flashrecovery.runtime.parking_lot import NoRecovery, ParkingLot
from megatron_flashrecovery.runtime.progress import Progress


class Refusal:
    """Of one process. Every method is the main thread's."""

    def __init__(
        self, seat: dialogue.Seat, channel: Channel, lot: ParkingLot, line: Line, progress: Progress, choices: Choices
    ) -> None:
        self._seat = seat
        self._channel = channel
        self._lot = lot
        self._line = line
        self._progress = progress
        self._choices = choices

    @property
    def skips_update(self) -> bool:
        """The update of the step that is being computed is left out, on all ranks."""
        return Step(self._progress.completed + 1) in self._progress.skip

    @property
    def examines(self) -> bool:
        """The step that is being computed had bad numbers before: find out where they begin."""
        return self._progress.examine == self._progress.completed + 1

    def refuse(self, what: str, own: str, finding: Finding | None) -> NoReturn:
        """Right before the first write. Raises ``Interrupted`` when the job stops for it, as it always does."""
        # What an operation has brought since an order to stop may be void, and then so is what was seen.
        self._lot.check()
        step = Step(self._progress.completed + 1)
        said = dialogue.UpdateRefused(self._line.epoch, step, what, own, finding, self._choices.nan)
        self._channel.send(said)
        self._lot.wait_until(
            lambda: False, f"the job to stop: {what} in step {step}", self._seat.drain_timeout + SETTLED_AFTER
        )
        raise NoRecovery(f"{what} in step {step}, and the job goes on")

    def completed(self, step: Step) -> None:
        """A step that was looked at is over. One rank is enough to say so; whoever replaces it looks again."""
        if self._progress.examine == step and self._seat.rank == 0:
            self._channel.send(dialogue.Examined(self._line.epoch, step))
