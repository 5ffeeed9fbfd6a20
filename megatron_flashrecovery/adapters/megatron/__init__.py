"""The adapter for megatron-core 0.16: what a training loop calls to survive the loss of ranks.

flash = megatron.start()                       # before init_process_group
...                                            # process groups, model, optimizer, scheduler, as always
batches, step = flash.protect([model], optimizer, scheduler, open_batches, first_step)
result = flash.run_step(step, one_step)        # in the loop, in place of one_step(step)
flash.guard("save", save)                      # whatever else enters a collective after the loop
flash.finish(state_sha256)
"""

from __future__ import annotations

from megatron_flashrecovery.adapters.megatron.protection import Protection, start
from megatron_flashrecovery.core.policy import NanChoice
from megatron_flashrecovery.runtime.choices import Choices
from megatron_flashrecovery.runtime.framework import StepRecord

__all__ = ["Choices", "NanChoice", "Protection", "StepRecord", "start"]
