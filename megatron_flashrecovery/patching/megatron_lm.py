"""Checkouts of Megatron-LM: which version one is, what is inserted into it, and the seams of each known version."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.patching.insertions import FilePatch, Insertion, make, parse, read, states
from megatron_flashrecovery.patching.seams import Moved, Seam, compare, parsed, read_seam

_ARGUMENTS = "megatron/training/arguments.py"
_TRAINING = "megatron/training/training.py"
_PACKAGE = "megatron/core/package_info.py"
WATCHED: tuple[tuple[str, str], ...] = (
    (_ARGUMENTS, "add_megatron_arguments"),
    (_ARGUMENTS, "validate_args"),
    *(
        (_TRAINING, name)
        for name in (
            "pretrain",
            "train",
            "train_step",
            "training_log",
            "evaluate",
            "evaluate_and_print_results",
            "save_checkpoint_and_time",
            "checkpoint_and_decide_exit",
            "post_training_step_callbacks",
            "setup_model_and_optimizer",
            "build_train_valid_test_data_loaders",
            "build_train_valid_test_data_iterators",
            "enable_forward_pre_hook",
            "disable_forward_pre_hook",
        )
    ),
    ("megatron/training/checkpointing.py", "save_checkpoint"),
    ("megatron/training/checkpointing.py", "load_checkpoint"),
    ("megatron/training/async_utils.py", "maybe_finalize_async_save"),
    ("megatron/core/dist_checkpointing/strategies/async_utils.py", "AsyncCallsQueue"),
    ("megatron/core/timers.py", "Timer"),
    ("megatron/core/rerun_state_machine.py", "RerunStateMachine.should_run_forward_backward"),
    ("megatron/core/rerun_state_machine.py", "RerunStateMachine.validate_result"),
    ("megatron/core/rerun_state_machine.py", "RerunDataIterator"),
    ("megatron/core/optimizer/optimizer.py", "MegatronOptimizer"),
    ("megatron/core/optimizer/optimizer.py", "ChainedOptimizer"),
    ("megatron/core/optimizer/optimizer.py", "MixedPrecisionOptimizer"),
    ("megatron/core/optimizer/distrib_optimizer.py", "DistributedOptimizer"),
    ("megatron/core/optimizer_param_scheduler.py", "OptimizerParamScheduler"),
    ("megatron/core/distributed/distributed_data_parallel.py", "DistributedDataParallel"),
    ("megatron/core/distributed/param_and_grad_buffer.py", "_ParamAndGradBucketGroup"),
    ("megatron/core/tensor_parallel/random.py", "CudaRNGStatesTracker"),
)

REPLACED = (
    *("pretrain", "load_checkpoint", "build_pretraining_data_loader", "build_train_valid_test_data_iterators"),
    *("train", "train_step", "update_num_microbatches"),
    *("logical_and_across_model_parallel_group", "reduce_max_stat_across_model_parallel_group"),
    *("training_log", "evaluate_and_print_results", "save_checkpoint_and_time", "save_checkpoint"),
    *("checkpoint_and_decide_exit", "post_training_step_callbacks", "calc_params_l2_norm"),
    *("disable_forward_pre_hook", "enable_forward_pre_hook", "maybe_finalize_async_save", "print_datetime"),
)
"""Names in the module of the loop that the hooks of the adapter replace."""

_FLAG = (
    "    group = parser.add_argument_group(title='flash recovery')\n",
    "    group.add_argument(\n",
    "        '--enable-flash-recovery',\n",
    "        action='store_true',\n",
    "        help='Survive the loss of ranks in the middle of a step; for runs that `flashrecovery run` starts.',\n",
    "    )\n",
    "    group.add_argument(\n",
    "        '--flash-recovery-nan',\n",
    "        choices=['stop', 'skip', 'retry'],\n",
    "        default='stop',\n",
    "        help='What to do about a step whose numbers are not finite again on the same data.',\n",
    "    )\n",
    "    group.add_argument(\n",
    "        '--flash-recovery-checksum-steps',\n",
    "        type=int,\n",
    "        default=64,\n",
    "        metavar='N',\n",
    "        help='Data-parallel peers compare all their parameters in every N steps; 0: never.',\n",
    "    )\n",
)
_LAUNCHER = (
    "    if args.enable_flash_recovery:\n",
    "        from megatron_flashrecovery.adapters.megatron_lm.hooks import require_launcher\n",
    "\n",
    "        require_launcher()\n",
)


@dataclass(frozen=True)
class Known:
    """A version for which there is a patch and a table of seams. ``tag`` is upstream's, or ``main_`` and a date."""

    tag: str
    patch: dict[str, FilePatch]
    seams: tuple[Seam, ...]


def known_versions() -> list[Known]:
    """Oldest first."""
    folder = Path(__file__).parent / "patches" / "megatron_lm"
    found = []
    for table in sorted(folder.glob("*.toml"), key=lambda path: _age(path.stem)):
        seams = tuple(
            Seam(each["file"], each["name"], tuple(each["parameters"]), each["sha256"])
            for each in tomllib.loads(table.read_text())["seam"]
        )
        found.append(Known(table.stem, parse(table.with_suffix(".patch")), seams))
    return found


class Checkout:
    """Raises ``ConfigError`` if there is no Megatron-LM at ``root``, or a file of it is no Python."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for file in (_ARGUMENTS, _TRAINING, _PACKAGE):
            if not (root / file).is_file():
                raise ConfigError(f"{root} is no checkout of Megatron-LM: it has no {file}")
        self.version = _version(root / _PACKAGE)

    def matches(self) -> Known | None:
        """The known version that this checkout is, with or without the patch."""
        for known in known_versions():
            if all(state in ("applied", "not applied") for state in states(known.patch, self.root).values()):
                return known
        return None

    def state(self, known: Known) -> str:
        found = set(states(known.patch, self.root).values())
        return found.pop() if len(found) == 1 else "applied in part"

    def moved(self, known: Known) -> list[Moved]:
        inserted = {(_ARGUMENTS, "add_megatron_arguments"), (_ARGUMENTS, "validate_args")}
        now = states(known.patch, self.root)
        return list(
            compare(
                self.root,
                # What we have inserted there ourselves is no news.
                [
                    seam
                    for seam in known.seams
                    if not ((seam.file, seam.name) in inserted and now.get(seam.file) == "applied")
                ],
            )
        )

    def missing_names(self) -> list[str]:
        """Names that our hooks replace in the module of the loop, and that are not bound there."""
        bound = _bound_names(parsed(self.root / _TRAINING))
        return [name for name in REPLACED if name not in bound]

    def apply(self) -> str:
        """What was done, for people. Nothing is written unless everything fits."""
        known = self._must_match("apply")
        found = states(known.patch, self.root)
        for path, patch in known.patch.items():
            if found[path] == "not applied":
                _rewrite(self.root / path, patch.apply(read(self.root / path)))
        done = "was applied already" if set(found.values()) == {"applied"} else "applied"
        return f"{known.tag}: {done}"

    def revert(self) -> str:
        known = self._must_match("revert")
        found = states(known.patch, self.root)
        for path, patch in known.patch.items():
            if found[path] == "applied":
                _rewrite(self.root / path, patch.revert(read(self.root / path)))
        done = "was not applied" if set(found.values()) == {"not applied"} else "reverted"
        return f"{known.tag}: {done}"

    def _must_match(self, verb: str) -> Known:
        known = self.matches()
        if known is None:
            tags = ", ".join(each.tag for each in known_versions())
            raise ConfigError(
                f"cannot {verb}: {self.root} ({self.version}) has files that are those of no known version ({tags}), "
                f"or that somebody has changed; `flashrecovery patch check {self.root}` says which"
            )
        return known


def make_patch(root: Path) -> dict[str, FilePatch]:
    """For a version that is not known yet; for whoever adds one."""
    text = read(root / _ARGUMENTS)
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    last = functions["add_megatron_arguments"].body[-1]
    assert isinstance(last, ast.Return), "add_megatron_arguments does not end with a return"
    insertions = (
        Insertion(last.lineno - 1, _FLAG),
        Insertion(_end_of_signature(text, functions["validate_args"]), _LAUNCHER),
    )
    return {_ARGUMENTS: make(_ARGUMENTS, text, insertions)}


def _end_of_signature(text: str, function: ast.FunctionDef) -> int:
    """Its last line. Comments that stand above the first statement stay with it."""
    lines, last = text.splitlines(), function.body[0].lineno - 1
    while last > function.lineno and lines[last - 1].strip()[:1] in ("", "#"):
        last -= 1
    return last


def make_seams(root: Path) -> list[Seam]:
    found = [read_seam(root, file, name) for file, name in WATCHED]
    missing = [place for place, seam in zip(WATCHED, found, strict=True) if seam is None]
    assert not missing, missing
    return [seam for seam in found if seam is not None]


def _age(tag: str) -> tuple[bool, list[int]]:
    """What is no release yet is newer than all releases."""
    return tag.startswith("main_"), [int(number) for number in re.findall(r"\d+", tag)]


def _version(package_info: Path) -> str:
    said: dict[str, object] = {}
    for node in parsed(package_info).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                said[name] = value
    numbers = (str(said.get(part, "?")) for part in ("MAJOR", "MINOR", "PATCH"))
    return ".".join(numbers) + str(said.get("PRE_RELEASE", ""))


def _bound_names(tree: ast.Module) -> set[str]:
    """By functions and imports of the module, conditional ones included."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        match todo.pop():
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found.update(alias.asname or alias.name for alias in names)
            case (ast.If() | ast.Try()) as block:
                todo += ast.iter_child_nodes(block)
            case ast.ExceptHandler(body=body):
                todo += body
            case _:
                pass
    return found


def _rewrite(path: Path, text: str) -> None:
    """Whole or not at all; where the file is a link, what it leads to."""
    path = path.resolve()
    new = path.with_name(path.name + ".flashrecovery")
    new.write_bytes(text.encode())
    new.chmod(path.stat().st_mode)
    new.replace(path)
