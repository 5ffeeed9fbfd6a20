"""What the user chose for a run by flags of the script."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.policy import NanChoice

NAN_CHOICES = tuple(choice.value for choice in NanChoice)
CHECKSUM_STEPS = 64


@dataclass(frozen=True)
class Choices:
    """``nan``: what is done about numbers that are not finite again on the same data. ``checksum_steps``: in how many
    steps data-parallel peers compare all their parameters, a part in each; 0: never."""

    nan: NanChoice = NanChoice.STOP
    checksum_steps: int = CHECKSUM_STEPS

    def __post_init__(self) -> None:
        if self.checksum_steps < 0:
            raise ConfigError(f"--flash-recovery-checksum-steps {self.checksum_steps}: give a number of steps, or 0")
