"""`flashrecovery replay DIR`: what happened in a run, and the controller's state at the end of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records

if TYPE_CHECKING:
    from megatron_flashrecovery.core.ids import Epoch
    from megatron_flashrecovery.core.job import Job
    from megatron_flashrecovery.core.recovery import Recovery
    from megatron_flashrecovery.runtime.journal import Line
    from megatron_flashrecovery.runtime.summary import PhaseSeconds

PURPOSE = "tell what happened in a run, and rebuild the controller's state from its journal"


def add_arguments(parser: Arguments) -> None:
    parser.add_argument(
        "directory", type=directory_of_records, metavar="DIR", help="the --log-dir of a run, also of a running one"
    )
    parser.add_flag("--quiet", action="store_true", help="the result only")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    from megatron_flashrecovery.runtime.journal import FILE_NAME, read_journal
    from megatron_flashrecovery.runtime.replay import replay

    lines = list(read_journal(arguments.directory / FILE_NAME))
    if not arguments.quiet:
        _tell(lines)
    found = replay(lines)
    print(_state(found.job, lines))
    measured = _measured(arguments.directory)
    for recovery in found.job.recoveries:
        _tell_recovery(recovery, measured.get(recovery.epoch))
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


def _measured(directory: Path) -> dict[Epoch, PhaseSeconds]:
    """Known once the run has ended."""
    from megatron_flashrecovery.runtime.summary import SUMMARY_NAME, read_summary

    if not (directory / SUMMARY_NAME).exists():
        return {}
    return {recovery.epoch: recovery.seconds for recovery in read_summary(directory).recoveries}


def _tell_recovery(recovery: Recovery, seconds: PhaseSeconds | None) -> None:
    took = f"{recovery.seconds['total']:.2f} s"
    went_on = f"everybody trained again from step {recovery.resume_step} {took} later"
    print(f"epoch {recovery.epoch}: {recovery.cause}; {went_on}")
    if seconds is not None:
        phases = (f"{field.name.replace('_', ' ')} {getattr(seconds, field.name):.2f}" for field in fields(seconds))
        print(f"  seconds, from the loss to the end of the first step after it: {', '.join(phases)}")
    for rank, source in sorted(recovery.source_of.items()):
        print(f"  rank {rank} from {source}")
    for group, reason in sorted(recovery.rebuilt.items()):
        print(f"  {group} rebuilt: {reason}")
    print(f"  groups kept: {recovery.kept}")


def _state(job: Job, lines: list[Line]) -> str:
    phase = type(job.phase).__name__.lower()
    if (end := next((line for line in reversed(lines) if line.name == "_Ended"), None)) is not None:
        phase = f"ended ({end.body['failure'] or 'every rank has finished'}), {phase}"
    told = [f"{phase} in epoch {job.epoch}", f"{len(job.seats)} ranks"]
    told.append(f"recoveries: {len(job.recoveries)}, restarts of all workers: {job.restarts}")
    if job.checkpoint is not None:
        told.append(f"checkpoint of step {job.checkpoint}")
    if job.lost:
        told.append(f"waiting for rank {', '.join(map(str, sorted(job.lost)))}")
    return "; ".join(told)
