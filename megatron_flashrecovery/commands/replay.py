"""`flashrecovery replay DIR`: what happened in a run, and the controller's state at the end of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments

if TYPE_CHECKING:
    from megatron_flashrecovery.core.job import Job
    from megatron_flashrecovery.core.recovery import Recovery
    from megatron_flashrecovery.runtime.journal import Line

PURPOSE = "tell what happened in a run, and rebuild the controller's state from its journal"


def add_arguments(parser: Arguments) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the --log-dir of a run, also of a running one")
    parser.add_flag("--quiet", action="store_true", help="the result only")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
    from megatron_flashrecovery.runtime.replay import replay

    lines = list(read_journal(arguments.directory / FILE_NAME))
    if not arguments.quiet:
        _tell(lines)
    found = replay(lines)
    print(_state(found.job))
    for recovery in found.job.recoveries:
        _tell_recovery(recovery)
    if found.difference is not None:
        print(f"the replay goes another way at event {found.events}: {found.difference}")
        return 1
    print(f"{found.events} events replayed: the same orders follow from them")
    return 0


def _tell(lines: list[Line]) -> None:
    from megatron_flashrecovery.commands.timeline import describe

    marks = {"event": "  ", "command": "->", "note": "  .", "start": "  "}
    for line in lines:
        print(f"{line.time - lines[0].time:9.3f} s  epoch {line.epoch}  {marks.get(line.kind, '  ')} {describe(line)}")


def _tell_recovery(recovery: Recovery) -> None:
    took = f"{recovery.seconds['total']:.2f} s"
    print(f"epoch {recovery.epoch}: {recovery.cause}; resumed at step {recovery.resume_step} after {took}")
    for rank, source in sorted(recovery.source_of.items()):
        print(f"  rank {rank} from {source}")
    for group, reason in sorted(recovery.rebuilt.items()):
        print(f"  {group} rebuilt: {reason}")
    print(f"  groups kept: {recovery.kept}")


def _state(job: Job) -> str:
    told = [f"{type(job.phase).__name__.lower()} in epoch {job.epoch}", f"{len(job.seats)} ranks"]
    told.append(f"recoveries: {len(job.recoveries)}, restarts of all workers: {job.restarts}")
    if job.checkpoint is not None:
        told.append(f"checkpoint of step {job.checkpoint}")
    if job.lost:
        told.append(f"waiting for rank {', '.join(map(str, sorted(job.lost)))}")
    return "; ".join(told)
