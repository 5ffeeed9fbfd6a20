"""`flashrecovery status DIR`: where a run is, and whom it waits for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.core.moves import names_of

if TYPE_CHECKING:
    from megatron_flashrecovery.runtime.status import Status

PURPOSE = "tell where a run is: its phase, epoch and step, whom it waits for, and what it has lost"


def add_arguments(parser: Arguments) -> None:
    parser.add_argument(
        "directory", type=directory_of_records, metavar="DIR", help="the --log-dir of a run, also of a running one"
    )
    parser.add_flag("--json", action="store_true", help="one line for programs")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """0: it runs, or ended well. 1: it failed, or its launcher is gone without a word."""
    import msgspec

    from megatron_flashrecovery.runtime.status import status_of

    status = status_of(arguments.directory)
    if arguments.json:
        print(msgspec.json.encode(status).decode())
    else:
        print("\n".join(tell(status, time.time())))
    return 1 if status.is_bad else 0


def tell(status: Status, now: float) -> Iterator[str]:
    where = f"epoch {status.epoch}, {status.ranks} ranks on {_count(status.nodes, 'node')}"
    match status.phase:
        case "died":
            assert status.launcher is not None
            yield (
                f"died: the launcher (process {status.launcher.pid}) is gone without a word; its last one was "
                f"{_ago(status.last_word, now)}; {where}"
            )
        case "ended":
            yield f"ended {_ago(status.since, now)}: {status.failure or 'every rank has finished'}; {where}"
        case phase:
            yield f"{phase} for {_long(now - status.since)}; {where}"
    for move in status.moved:
        yield f"{names_of(move.ranks)} of {move.origin} {'is' if len(move.ranks) == 1 else 'are'} on {move.target} now"
    if status.homeless and status.phase not in ("died", "ended"):
        yield f"{names_of(status.homeless)} without a node: start a spare one"
    if status.spares:
        yield f"{_count(len(status.spares), 'spare node')}: {', '.join(status.spares[:8])}"
    if status.waiting_for is not None:
        yield f"waiting for {status.waiting_for}"
    if status.step is not None and status.step_time is not None:
        loss = "" if status.loss is None else f", loss {status.loss:.6g}"
        yield f"step {status.step} completed {_ago(status.step_time, now)}{loss}; it took {status.step_seconds:.2f} s"
    if (last := status.last_recovery) is not None:
        yield (
            f"{_count(status.recoveries, 'recovery', 'recoveries')}; the last, in epoch {last.epoch}: {last.cause}; "
            f"it went on from step {last.resume_step} after {last.seconds:.2f} s"
        )
    for rank, evidence in sorted(status.slow.items()):
        looks = status.easing.get(rank, 0)
        was = "was" if looks or status.phase in ("died", "ended") else "is"
        yield f"rank {rank} {was} slow: {evidence}" + (f"; not in the last {_count(looks, 'look')}" if looks else "")
    if (diagnosis := status.diagnosis) is not None:
        for blamed in diagnosis.blamed:
            yield f"to blame: {blamed.element} (p {blamed.p:.2g}): {blamed.evidence}"
        if diagnosis.undetermined:
            yield f"{diagnosis.occasion}: {diagnosis.verdict}"
    told = () if status.diagnosis is None else status.diagnosis.blamed
    for node, why in sorted(status.blamed.items()):
        if not any(node in each.nodes for each in told):
            yield f"{node} is still blamed, by an earlier diagnosis: {why}"
    if status.restarts:
        yield f"{_count(status.restarts, 'restart')} of all workers"
    if status.checkpoint is not None:
        yield f"newest checkpoint: step {status.checkpoint}"
    if status.launcher is not None and status.phase not in ("died", "ended") and now - status.last_word > _QUIET:
        yield f"nothing was recorded for {_long(now - status.last_word)}; the launcher is on {status.launcher.host}"


_QUIET = 60.0


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _ago(moment: float, now: float) -> str:
    return f"{_long(now - moment)} ago"


def _long(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
