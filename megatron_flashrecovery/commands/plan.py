"""`flashrecovery plan`: where every rank's second copy will be, what that costs, and which losses it covers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.layout import MEGATRON_ORDER, megatron_expert_layout, megatron_layout
from megatron_flashrecovery.core.mirroring import NoHost
from megatron_flashrecovery.core.model_size import (
    VALUES_NBYTES,
    GptShape,
    OptimizerKind,
    Parameters,
    count_parameters,
    unique_nbytes,
)
from megatron_flashrecovery.core.outlook import Arrangement, outlook

PURPOSE = "say where second copies will be, what they cost, and which losses a job survives"
_MOST_RANKS = 200_000
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_arguments(parser: Arguments) -> None:
    parser.description = f"{PURPOSE}: of the job whose --log-dir is DIR, or of one described by Megatron's flags"
    parser.add_argument(
        "directory", nargs="?", type=directory_of_records, metavar="DIR", help="the --log-dir of a running job"
    )
    add = parser.add_flag
    add("--world-size", type=int, default=None, help="ranks in all; or give --nnodes and --nproc-per-node")
    add("--nnodes", type=int, default=None, help="number of nodes")
    add("--nproc-per-node", type=int, default=None, help="ranks per node (the last node may have fewer)")
    for axis in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel", "expert-model-parallel"):
        add(f"--{axis}-size", type=int, default=1, metavar="N")
    add("--expert-tensor-parallel-size", type=int, default=None, metavar="N")
    add("--num-distributed-optimizer-instances", type=int, default=1, metavar="N")
    add("--use-tp-pp-dp-mapping", action="store_true", help="pipeline before data parallelism in the order of ranks")
    add("--use-distributed-optimizer", action="store_true", help="the optimizer state is split over peers")
    add("--bf16", action="store_true", help="changes nothing in the bill: masters and moments are fp32 either way")
    add("--params", default=None, metavar="N", help="parameters of the model, as in 350M or 7B; or its dimensions:")
    for name in ("num-layers", "hidden-size", "num-attention-heads", "vocab-size", "ffn-hidden-size"):
        add(f"--{name}", type=int, default=0, metavar="N")
    for name in ("num-query-groups", "kv-channels", "num-experts", "moe-ffn-hidden-size"):
        add(f"--{name}", type=int, default=0, metavar="N")
    add("--swiglu", action="store_true")
    add("--untie-embeddings-and-output-weights", action="store_true")
    add("--failure-domain", choices=("node", "process"), default="node", help="process: copies on one node will do")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    # Not above: rich and msgspec are of no use to `flashrecovery --help`.
    from megatron_flashrecovery.commands import outlook_report
    from megatron_flashrecovery.runtime.layout_record import recorded_outlook

    if arguments.directory is not None:
        outlook_report.show(*recorded_outlook(arguments.directory))
        return 0
    job = arrangement(arguments)
    found = outlook(job, arguments.failure_domain)
    if isinstance(found, NoHost):
        raise ConfigError(found.reason)
    outlook_report.show(job, found)
    return 0


def arrangement(arguments: argparse.Namespace) -> Arrangement:
    node_of = _nodes(arguments)
    order = "tp-cp-ep-pp-dp" if arguments.use_tp_pp_dp_mapping else MEGATRON_ORDER
    tensor, pipeline = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    layout = megatron_layout(
        len(node_of), tensor=tensor, pipeline=pipeline, context=arguments.context_parallel_size, order=order
    )
    _check_experts(arguments)
    expert_tensor = arguments.expert_tensor_parallel_size or tensor
    experts = megatron_expert_layout(
        len(node_of),
        tensor=expert_tensor,
        pipeline=pipeline,
        expert=arguments.expert_model_parallel_size,
        order=order,
    )
    groups = layout.groups("dp", "cp")
    kind: OptimizerKind = "distributed" if arguments.use_distributed_optimizer else "plain"
    instances = _instances(arguments, len(groups[0]))
    parameters = _parameters(arguments)
    nbytes = VALUES_NBYTES
    nbytes += unique_nbytes(parameters.dense / (tensor * pipeline), len(groups[0]), kind, instances)
    if parameters.expert:
        held = parameters.expert / (expert_tensor * pipeline * arguments.expert_model_parallel_size)
        nbytes += unique_nbytes(held, len(experts.groups("dp")[0]), kind, instances)
    return Arrangement(
        node_of=node_of,
        peers={rank: group for group in groups for rank in group},
        unique_nbytes=dict.fromkeys(node_of, nbytes),
        sharded=kind == "distributed" and instances == 1,
    )


def _nodes(arguments: argparse.Namespace) -> dict[Rank, NodeId]:
    """Ranks fill the nodes one after the other, as torchrun's do."""
    world, nodes, per_node = arguments.world_size, arguments.nnodes, arguments.nproc_per_node
    for flag, size in (("--world-size", world), ("--nnodes", nodes), ("--nproc-per-node", per_node)):
        if size is not None and size < 1:
            raise ConfigError(f"{flag} {size}: must be at least 1")
    if world is None:
        if per_node is None:
            raise ConfigError("how many ranks? give --nproc-per-node (and --nnodes), --world-size, or DIR")
        world = (nodes or 1) * per_node
    if world > _MOST_RANKS:
        raise ConfigError(f"a job of {world} ranks? this plans up to {_MOST_RANKS}")
    per_node = per_node or -(-world // (nodes or 1))
    if nodes is not None and -(-world // per_node) != nodes:
        raise ConfigError(f"--world-size {world} does not fill --nnodes {nodes} with {per_node} ranks each")
    return {Rank(rank): NodeId(f"node{rank // per_node}") for rank in range(world)}


def _check_experts(arguments: argparse.Namespace) -> None:
    """What upstream or `run` would refuse."""
    split, experts = arguments.expert_model_parallel_size, arguments.num_experts
    if split > 1 and not arguments.use_distributed_optimizer:
        raise ConfigError(
            f"--expert-model-parallel-size {split} needs --use-distributed-optimizer: without it, experts would be "
            f"copied from data-parallel peers, who have others"
        )
    if experts and experts % split:
        raise ConfigError(
            f"--num-experts {experts} is no multiple of --expert-model-parallel-size {split}: every rank has as many"
        )


def _instances(arguments: argparse.Namespace, peers: int) -> int:
    instances: int = arguments.num_distributed_optimizer_instances
    if instances < 1 or peers % instances:
        raise ConfigError(f"--num-distributed-optimizer-instances {instances} does not divide {peers} peers")
    return instances


def _parameters(arguments: argparse.Namespace) -> Parameters:
    dimensions = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if arguments.params is not None:
        return Parameters(dense=_number_of_parameters(arguments.params))
    for name in dimensions:
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"how large is the model? {flag} is missing: give --params, as in 7B, or all dimensions")
    hidden, heads = arguments.hidden_size, arguments.num_attention_heads
    if hidden % heads and not arguments.kv_channels:
        raise ConfigError(
            f"--hidden-size {hidden} is no multiple of --num-attention-heads {heads}: or give --kv-channels"
        )
    return count_parameters(
        GptShape(
            **{name: getattr(arguments, name) for name in dimensions},
            ffn_hidden_size=arguments.ffn_hidden_size,
            num_query_groups=arguments.num_query_groups,
            kv_channels=arguments.kv_channels,
            num_experts=arguments.num_experts,
            moe_ffn_hidden_size=arguments.moe_ffn_hidden_size,
            swiglu=arguments.swiglu,
            untied_embeddings=arguments.untie_embeddings_and_output_weights,
        )
    )


def _number_of_parameters(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return round(float(number) * _SIZES[unit])
    except (KeyError, ValueError):
        raise ConfigError(f"--params {text}: give a number, as in 350M or 7B") from None
