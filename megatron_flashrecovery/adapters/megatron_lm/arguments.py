"""The flag, and what it cannot be combined with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.policy import NanChoice
from megatron_flashrecovery.runtime.choices import CHECKSUM_STEPS, NAN_CHOICES, Choices

FLAG = "--enable-flash-recovery"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The way upstream adds its own groups. A patched checkout has it already."""
    if FLAG not in parser._option_string_actions:
        group = parser.add_argument_group(title="flash recovery")
        group.add_argument(
            FLAG,
            action="store_true",
            help="Survive the loss of ranks in the middle of a step; for runs that `flashrecovery run` starts.",
        )
        group.add_argument(
            "--flash-recovery-nan",
            choices=NAN_CHOICES,
            default=NanChoice.STOP.value,
            help="What to do about a step whose numbers are not finite again on the same data.",
        )
        group.add_argument(
            "--flash-recovery-checksum-steps",
            type=int,
            default=CHECKSUM_STEPS,
            metavar="N",
            help="Data-parallel peers compare all their parameters in every N steps; 0: never.",
        )
    return parser


def choices_of(args: Any) -> Choices:
    """A checkout that was patched by an older version knows the first flag only."""
    nan = getattr(args, "flash_recovery_nan", NanChoice.STOP.value)
    return Choices(NanChoice(nan), getattr(args, "flash_recovery_checksum_steps", CHECKSUM_STEPS))


@dataclass(frozen=True)
class Refusal:
    """``applies`` is asked of the validated arguments."""

    flags: str
    reason: str
    applies: Callable[[Any], bool]


def _is_set(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, False))


def _refuse(flag: str, reason: str) -> Refusal:
    return Refusal(flag, reason, _is_set(flag.removeprefix("--").replace("-", "_")))


def _gathers_weights(args: Any) -> bool:
    """A shard for each rank of a tensor-parallel group is plain tensor parallelism, which upstream fills in itself
    (``validate_args`` in megatron/training/arguments.py since core_v0.19.0)."""
    pairs = (
        ("tensor_parallel_num_weight_shards", "tensor_model_parallel_size"),
        ("expert_tensor_parallel_num_weight_shards", "expert_tensor_parallel_size"),
    )
    return any((getattr(args, shards, None) or 1) > (getattr(args, size, None) or 1) for shards, size in pairs)


REFUSALS: Sequence[Refusal] = (
    _refuse("--inprocess-restart", "it restarts all ranks in place for the same failures"),
    _refuse("--use-torch-fsdp2", "its shards are not known to the mirror"),
    _refuse("--use-megatron-fsdp", "its shards are not known to the mirror"),
    _refuse("--optimizer-cpu-offload", "its optimizer state moves between host and device"),
    _refuse("--tp-comm-overlap", "Transformer Engine's user buffers are communicators that cannot be replaced"),
    _refuse("--use-nccl-ub", "registered buffers belong to a communicator that is replaced"),
    _refuse("--use-sharp", "a SHARP tree cannot lose and regain a member"),
    _refuse("--moe-enable-deepep", "DeepEP's buffers are communicators that cannot be replaced"),
    Refusal(
        "--moe-token-dispatcher-type flex",
        "the buffers of DeepEP and HybridEP are communicators that cannot be replaced",
        lambda args: getattr(args, "moe_token_dispatcher_type", None) == "flex",
    ),
    _refuse("--overlap-moe-expert-parallel-comm", "what its schedule keeps of a step that is cut short is not known"),
    _refuse("--delay-wgrad-compute", "weight gradients that a cut step has put off would be computed in the next one"),
    _refuse(
        "--fine-grained-activation-offloading", "what of a cut step is on the host would be taken for the next one's"
    ),
    Refusal(
        "--save-dgrads-interval",
        "its hooks are still there when a cut step is computed again",
        lambda args: getattr(args, "save_dgrads_interval", None) is not None,
    ),
    _refuse("--optimizer-cuda-graph", "a captured graph keeps the communicators that it was captured with"),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        "the groups over which it gathers weights were not tried with recovery",
        _gathers_weights,
    ),
    Refusal(
        "--gpu-sniff-test-interval",
        "between two steps it enters collectives that are not protected",
        lambda args: getattr(args, "gpu_sniff_test_interval", None) is not None,
    ),
    _refuse("--enable-cuda-graph", "a captured graph keeps the communicators that it was captured with"),
    _refuse("--external-cuda-graph", "a captured graph keeps the communicators that it was captured with"),
    Refusal(
        "--cuda-graph-impl",
        "a captured graph keeps the communicators that it was captured with",
        lambda args: getattr(args, "cuda_graph_impl", "none") not in (None, "none"),
    ),
    Refusal(
        "--distributed-timeout-seconds-after-init",
        "a rank that waits for a replacement must not time out: leave it away",
        lambda args: getattr(args, "distributed_timeout_seconds_after_init", None) is not None,
    ),
    Refusal(
        "--dataloader-type external",
        "nobody but its author can open that loader in the middle, which a replacement needs: use single or cyclic",
        lambda args: getattr(args, "dataloader_type", None) == "external",
    ),
    _refuse("--iterations-to-skip", "a skipped iteration is no step, and nobody has a copy of what it leaves"),
    Refusal(
        "--async-save with another --ckpt-format than torch_dist",
        "its writers are not known to recovery",
        lambda args: getattr(args, "async_save", False) and getattr(args, "ckpt_format", None) != "torch_dist",
    ),
    Refusal(
        "--async-strategy nvrx",
        "its writers have not been tried with recovery: use --async-strategy mcore",
        lambda args: getattr(args, "async_strategy", "mcore") != "mcore",
    ),
    Refusal(
        "--non-persistent-save-interval with --async-save",
        "whether such a save is complete is not known to recovery",
        lambda args: getattr(args, "async_save", False) and bool(getattr(args, "non_persistent_save_interval", None)),
    ),
    _refuse("--ckpt-assume-constant-structure", "a replacement does not know what the first save has agreed on"),
    _refuse("--phase-transition-iterations", "where a phase begins in its data is not known to a replacement"),
    _refuse("--multiple-validation-sets", "their positions are not known to a replacement"),
    _refuse("--qk-clip", "it changes weights behind the update"),
    _refuse("--log-max-attention-logit", "it is reduced behind the update"),
    Refusal(
        "--check-weight-hash-across-dp-replicas-interval",
        "a replacement would compare its weights with those of the start; data-parallel peers compare after recoveries",
        lambda args: getattr(args, "check_weight_hash_across_dp_replicas_interval", None) is not None,
    ),
    _refuse("--fp8-param-gather", "an FP8 parameter is no plain tensor, and its scale is changed behind the update"),
    Refusal(
        "--fp4-param-gather",
        "an FP4 parameter is no plain tensor, and its scale is changed behind the update",
        _is_set("fp4_param"),
    ),
    Refusal(
        "--use-transformer-engine-op-fuser with FP8",
        "its operations keep their scaling where only a pickle gets it: leave one of the two out",
        lambda args: bool(getattr(args, "use_transformer_engine_op_fuser", False) and getattr(args, "fp8", None)),
    ),
    Refusal(
        "--exp-avg-dtype or --exp-avg-sq-dtype fp8",
        "an FP8 moment is no plain tensor: use fp32, fp16 or bf16",
        lambda args: (
            bool(getattr(args, "use_precision_aware_optimizer", False))
            and any("8" in str(getattr(args, f"exp_avg{of}_dtype", "")) for of in ("", "_sq"))
        ),
    ),
    _refuse("--perform-rl-step", "what rollouts were drawn is not mirrored"),
    _refuse("--skip-train", "nothing is trained"),
)


def check(args: Any) -> None:
    """Raises ``ConfigError`` with the first flag that cannot be combined with ours, and the reason."""
    for refusal in REFUSALS:
        if refusal.applies(args):
            raise ConfigError(f"{FLAG} cannot be combined with {refusal.flags}: {refusal.reason}")
