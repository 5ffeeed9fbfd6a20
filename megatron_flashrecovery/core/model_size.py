"""How many parameters a GPT has, and how much of its training state one rank holds alone.

Megatron's dimensions. An estimate for ``flashrecovery plan`` before anything runs; a running job counts its pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

OptimizerKind: TypeAlias = Literal["distributed", "plain"]

VALUES_NBYTES = 64 * 1024
"""Small pieces (RNG, scheduler, counters, extra state): below 1 MiB by contract, tens of KiB as a rule."""

# fp32 masters (or the fp32 parameters themselves) and Adam's two moments.
_OPTIMIZER_NBYTES = 4 + 4 + 4


@dataclass(frozen=True)
class Parameters:
    """``expert`` are the parameters of routed experts, which are spread over other axes than the ``dense`` ones."""

    dense: int
    expert: int = 0


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """Zero stands for Megatron's default: four times the hidden size, as many query groups as heads, no experts."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    ffn_hidden_size: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    swiglu: bool = False
    untied_embeddings: bool = False


def count_parameters(shape: GptShape) -> Parameters:
    """Matrices and norms; biases and positions are left out, they are below one percent."""
    hidden = shape.hidden_size
    ffn = shape.ffn_hidden_size or 4 * hidden
    channels = shape.kv_channels or hidden // shape.num_attention_heads
    groups = shape.num_query_groups or shape.num_attention_heads
    attention = 2 * hidden * channels * (shape.num_attention_heads + groups)
    matrices = 3 if shape.swiglu else 2
    expert_layer = shape.num_experts * matrices * hidden * (shape.moe_ffn_hidden_size or ffn)
    dense_mlp = 0 if shape.num_experts else matrices * hidden * ffn
    router = shape.num_experts * hidden
    embeddings = (2 if shape.untied_embeddings else 1) * shape.vocab_size * hidden
    dense = shape.num_layers * (attention + dense_mlp + router + 2 * hidden) + embeddings + hidden
    return Parameters(dense=dense, expert=shape.num_layers * expert_layer)


def unique_nbytes(parameters: float, peers: int, kind: OptimizerKind, instances: int = 1) -> int:
    """What one rank has alone, of ``parameters`` that it shares with ``peers`` data-parallel ranks (itself included).

    A distributed optimizer splits its state over its peers; with several instances of it, or a plain one, the copies
    exist on other devices already. Without any peer all of it is unique.
    """
    if peers == 1:
        return round(parameters * _OPTIMIZER_NBYTES)
    if kind == "plain" or instances > 1:
        return 0
    return round(parameters * _OPTIMIZER_NBYTES / peers)
