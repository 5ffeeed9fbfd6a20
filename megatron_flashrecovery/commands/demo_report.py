"""Shows two runs side by side, and what the recovery in the second one took."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_flashrecovery.commands.verify import first_difference
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.runtime.log_dir import LOGS
from megatron_flashrecovery.runtime.summary import RecoveryRecord, StepLine, Summary, read_steps, read_summary

_YES, _NO = "[green]yes[/]", "[bold red]NO[/]"


def compare(undisturbed: Path, disturbed: Path, injected: Collection[Rank], console: Console) -> bool:
    """Whether the runs are equal bit for bit, and the second one lost ``injected`` and nobody else.

    Equality alone does not show a recovery as promised: a run in which every survivor died, and was refilled from its
    own snapshot, is equal too. Raises ``RecordDamaged``.
    """
    summaries = read_summary(undisturbed), read_summary(disturbed)
    console.print()
    console.print(_steps_table(read_steps(undisturbed), read_steps(disturbed)))
    console.print(_state_line(*summaries))
    for recovery in summaries[1].recoveries:
        console.print(_recovery_table(recovery))
        for line in _recovery_lines(recovery):
            console.print(line)
    difference = first_difference(undisturbed, disturbed)
    if difference is not None:
        console.print(f"[bold red]not equal[/]: {escape(difference)}")
        return False
    console.print(f"[bold green]equal bit for bit[/]: {summaries[0].steps} steps and the final state of every rank")
    failure = _unpromised(summaries[1], injected, disturbed)
    if failure is not None:
        console.print(f"[bold red]but not as promised[/]: {escape(failure)}")
    return failure is None


def _unpromised(disturbed: Summary, injected: Collection[Rank], directory: Path) -> str | None:
    lost = {rank for recovery in disturbed.recoveries for rank in recovery.lost_ranks}
    if spared := sorted(set(injected) - lost):
        return f"rank {', '.join(map(str, spared))} was to be lost, and {directory} records no recovery from that"
    if bystanders := sorted(lost - set(injected)):
        log = directory / LOGS / f"rank{bystanders[0]}.log"
        return f"rank {', '.join(map(str, bystanders))} had nothing done to it and was lost too: see {log}"
    return None


def _steps_table(undisturbed: tuple[StepLine, ...], disturbed: tuple[StepLine, ...]) -> Table:
    # Exact values must not be cut off on a terminal of 80 columns.
    heads = ("step", "loss", "loss, exactly", "gradient norm, exactly", "epoch", "equal")
    table = Table(*heads, title="step by step", box=SIMPLE, pad_edge=False)
    for a, b in zip_longest(undisturbed, disturbed):
        equal = a is not None and b is not None and a.step == b.step and a.same_result(b)
        shown = a if a is not None else b
        assert shown is not None  # zip_longest ends with the longer one
        table.add_row(
            str(shown.step),
            "none" if shown.loss is None else f"{shown.loss:.6f}",
            *_both(_exact(a), _exact(b)),
            str(b.epoch) if b else "none",
            _YES if equal else _NO,
        )
    return table


def _exact(line: StepLine | None) -> tuple[str, str]:
    return ("", "") if line is None else (str(line.loss_hex), str(line.grad_norm_hex))


def _both(undisturbed: tuple[str, str], disturbed: tuple[str, str]) -> list[str]:
    """One value where the runs agree, else that of each, one below the other."""
    return [a if a == b else f"{a}\n{b}" for a, b in zip(undisturbed, disturbed, strict=True)]


def _state_line(undisturbed: Summary, disturbed: Summary) -> str:
    ranks = range(max(undisturbed.world_size, disturbed.world_size))
    a, b = undisturbed.state_sha256, disturbed.state_sha256
    verdicts = [rank in a and a.get(rank) == b.get(rank) for rank in ranks]  # type: ignore[call-overload]
    shown = "  ".join(f"{rank}: {_YES if verdict else _NO}" for rank, verdict in zip(ranks, verdicts, strict=True))
    return f"final parameters and optimizer state equal, by rank:  {shown}"


def _recovery_table(recovery: RecoveryRecord) -> Table:
    table = Table("phase", "seconds", title="recovery")
    for field in fields(recovery.seconds):
        table.add_row(field.name.replace("_", " "), f"{getattr(recovery.seconds, field.name):.3f}")
    return table


def _recovery_lines(recovery: RecoveryRecord) -> list[str]:
    lines = [
        escape(f"lost: {recovery.cause}"),
        f"resumed at step {recovery.resume_step}: the step under way was begun again, "
        f"{_completed(recovery.steps_recomputed)} computed again; "
        f"{recovery.groups.rebuilt} groups rebuilt, {recovery.groups.kept} kept",
    ]
    return lines + [escape(f"rank {rank}: {source}") for rank, source in sorted(recovery.source.items())]


def _completed(steps: int) -> str:
    return f"{steps or 'no'} completed step{'' if steps == 1 else 's'}"
