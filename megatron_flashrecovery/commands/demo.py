"""`flashrecovery demo`: the same training twice, once undisturbed and once with a rank killed, compared bit for bit."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.commands.run import check_script
from megatron_flashrecovery.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_flashrecovery.commands.console import Console
    from megatron_flashrecovery.core.ids import Rank

PURPOSE = "train a small GPT twice, once with a rank killed in mid-step, and compare the two bit for bit"
_SCRIPT = Path("pretrain_examples") / "pretrain_gpt.py"
_FAULT = "kill:rank=5,step=6,at=backward"
_LIMIT = 600.0


def add_arguments(parser: Arguments) -> None:
    add = parser.add_flag
    add(
        "--log-dir",
        type=directory_of_records,
        default=Path("flashrecovery-demo"),
        metavar="DIR",
        help="where both runs leave records",
    )
    add("--nproc-per-node", type=int, default=8, metavar="N", help="ranks (8)")
    add("--inject", action="append", default=None, metavar="SPEC", help=f"another fault than {_FAULT}")
    parser.add_argument("script", nargs="?", default=str(_SCRIPT), metavar="SCRIPT", help="another script")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, metavar="ARGS", help="its flags")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from megatron_flashrecovery.commands import demo_report
    from megatron_flashrecovery.commands.console import Console

    if arguments.script == str(_SCRIPT) and not _SCRIPT.is_file():
        raise ConfigError(f"there is no {_SCRIPT} here: run the demo from the root of a checkout, or name a script")
    check_script(arguments.script, module=False)
    console = Console(highlight=False, soft_wrap=True)
    undisturbed, disturbed = arguments.log_dir / "undisturbed", arguments.log_dir / "disturbed"
    faults = arguments.inject or [_FAULT]
    console.print(f"two runs of {arguments.script}, their records in {arguments.log_dir}")
    injected = _injected(faults, arguments)
    if not _train(arguments, undisturbed, [], console):
        return 1
    if not _train(arguments, disturbed, faults, console):
        return 1
    return 0 if demo_report.compare(undisturbed, disturbed, injected, console) else 1


def _injected(faults: list[str], arguments: argparse.Namespace) -> frozenset[Rank]:
    """Raises ``ConfigError``: a wrong SPEC is refused before the first run, not after it."""
    # Here: the other commands do without.
    from megatron_flashrecovery.runtime.injection import Injection
    from megatron_flashrecovery.runtime.launch_config import LaunchConfig

    injections = tuple(Injection.parse(spec) for spec in faults)
    LaunchConfig(script=arguments.script, nproc_per_node=arguments.nproc_per_node, injections=injections)
    return frozenset(injection.rank for injection in injections)


def _train(arguments: argparse.Namespace, log_dir: Path, faults: list[str], console: Console) -> bool:
    """One run as a user would start it, told as it happens."""
    from megatron_flashrecovery.commands.run_follower import RunFollower

    command = [sys.executable, "-m", "megatron_flashrecovery", "run"]
    command += ["--nproc-per-node", str(arguments.nproc_per_node), "--log-dir", str(log_dir), "--overwrite"]
    for spec in faults:
        command += ["--inject", spec]
    command += [arguments.script, "--enable-flash-recovery", *arguments.script_args]
    console.print(f"\n[bold]{log_dir.name}[/]: {' '.join(['flashrecovery', *command[3:]])}")
    output = log_dir.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    follower = RunFollower(log_dir, lambda line: console.print(line, markup=False))
    follower.forget()
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = follower.until_exit(process, _LIMIT)
        finally:
            _end(process)
    if code == 0:
        return True
    console.print(f"[bold red]failed[/] with exit code {code}; the last lines of {output}:")
    console.print("\n".join(output.read_text(errors="replace").splitlines()[-15:]), markup=False)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """The launcher ends its workers when it is told to; it is killed only if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
