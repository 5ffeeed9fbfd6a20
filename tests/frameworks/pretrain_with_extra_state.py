"""The example, with modules and an optimizer that carry state as Transformer Engine's and Apex's do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain_examples"))

import gpt_model
import pretrain_gpt
import torch
from megatron.core import optimizer, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import distrib_optimizer

from tests.frameworks import state_carriers

KINDS = ("tensor", "bytes", "file")


class CarryingGPT(GPTModel):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for index, layer in enumerate(self.decoder.layers):
            # Built in another order than they run in, as megatron-core builds its attention.
            layer.mlp.after = state_carriers.DelayedScaling(gemms=2)
            layer.mlp.before = state_carriers.DelayedScaling()
            layer.mlp.remembering = state_carriers.Remembering(KINDS[index % len(KINDS)])
            layer.mlp.register_forward_pre_hook(lambda mlp, inputs: (mlp.before(inputs[0]), *inputs[1:]))
            layer.mlp.register_forward_hook(
                lambda mlp, _inputs, output: (mlp.remembering(mlp.after(output[0])), *output[1:])
            )
        self.decoder.register_forward_hook(lambda decoder, _inputs, output: update(output))


def update(output: torch.Tensor) -> torch.Tensor:
    """Behind all layers forward; and the gradients of the pass before it, whose end a hook would not see."""
    if torch.is_grad_enabled():
        for direction in ("scaling_fwd", "scaling_bwd"):
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            state_carriers.FP8GlobalStateManager.reduce_and_update(direction, group)
    return output


if __name__ == "__main__":
    # Here, for what is above is done a second time in a worker that was forked.
    state_carriers.take_the_place_of_transformer_engine()
    optimizer.Adam = distrib_optimizer.Adam = state_carriers.FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    gpt_model.GPTModel = CarryingGPT
    pretrain_gpt.main()
