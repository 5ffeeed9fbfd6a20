"""What `flashrecovery diagnose` says: a table, a line for programs, a list for schedulers, and what a picture shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from megatron_flashrecovery.commands.console import Console
from megatron_flashrecovery.commands.diagnosis_picture import Shown
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.diagnose.diagnosis import Suspect
from megatron_flashrecovery.runtime.case import Accused, Case, Line
from megatron_flashrecovery.runtime.cordon import compressed, drain_commands
from megatron_flashrecovery.runtime.surroundings import Surroundings

_SHOWN = 5


@dataclass(frozen=True)
class _Named:
    element: str
    p: float
    score: float
    evidence: str
    ranks: tuple[Rank, ...]
    hosts: tuple[str, ...]
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True)
class _Suspected:
    element: str
    kind: str
    name: str
    p: float
    score: float
    evidence: str
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class _Looked:
    label: str
    method: str
    undetermined: str | None
    suspects: tuple[_Suspected, ...]


@dataclass(frozen=True)
class _Report:
    """``start`` and ``end``: Unix time."""

    blamed: tuple[_Named, ...]
    undetermined: str | None
    start: float
    end: float
    topology: str
    lines: tuple[_Looked, ...]


def as_json(case: Case, surroundings: Surroundings) -> str:
    lines = tuple(
        _Looked(
            line.label,
            line.diagnosis.method,
            line.diagnosis.undetermined,
            tuple(_suspected(suspect) for suspect in line.diagnosis.suspects),
        )
        for line in case.lines
    )
    blamed = tuple(_named(each) for each in case.accused)
    period = case.period
    report = _Report(blamed, case.undetermined, period.start, period.end, surroundings.source, lines)
    return msgspec.json.encode(report).decode()


def show(case: Case, surroundings: Surroundings) -> None:
    console = Console(highlight=False)
    dossier, period = case.dossier, case.period
    hosts = len(set(dossier.host_of.values()))
    console.print(f"{dossier.world} ranks on {hosts} {'host' if hosts == 1 else 'hosts'}; {surroundings.source}")
    console.print(f"looked at {period.seconds:.1f} s up to {_time(period.end)}, and at all incidents of the run")
    table = Table("suspect", "p", "score", "ranks", "evidence", box=SIMPLE, pad_edge=False)
    for line in case.lines:
        if not line.diagnosis.suspects:
            continue
        table.add_section()
        accused = {suspect.element for each in case.accused if each.line == line.label for suspect in each.suspects}
        for suspect in line.diagnosis.suspects[:_SHOWN]:
            style = "bold red" if suspect.element in accused else ""
            table.add_row(*_row(line, suspect), style=style)
    if table.row_count:
        console.print(table)
    for sentence in conclusion(case):
        console.print(sentence)


def conclusion(case: Case) -> Iterator[str]:
    for each in case.accused:
        yield f"to blame: {each.name} (p {each.p:.2g}): {each.evidence}"
    if hosts := {host for each in case.accused for host in each.hosts}:
        yield f"hosts to leave out: {compressed(hosts)} (`--cordon slurm` has the commands)"
    if case.undetermined is not None:
        yield f"undetermined: {case.undetermined}"


def cordon(reasons_of: Mapping[str, Iterable[str]], form: str) -> None:
    for line in drain_commands(reasons_of) if form == "slurm" else reasons_of:
        print(line)


def shown(case: Case, surroundings: Surroundings) -> Shown:
    """Of the line by which somebody is to blame; else the one that comes next to it."""
    by_label = {line.label: line for line in case.lines}
    if case.accused:
        first = case.accused[0]
        line: Line | None = by_label[first.line]
        elements = [suspect.element for each in case.accused if each.line == first.line for suspect in each.suspects]
        title = f"to blame: {', '.join(each.name for each in case.accused)} (p {first.p:.2g})"
    else:
        line = min(case.lines, key=lambda each: min((s.p for s in each.diagnosis.suspects), default=2.0), default=None)
        elements, title = [], "undetermined: nobody is to be blamed"
    period = f"{case.period.seconds:.1f} s up to {_time(case.period.end)}"
    if line is None:
        values = np.full((1, case.dossier.world), np.nan)
        return Shown(case.topology, values, "nothing was measured", (), title, period)
    about = f"{line.label}, {period}" if line.measure != line.label else f"{line.label} of the whole run"
    subtitle = f"{about}; {surroundings.source}"
    return Shown(case.topology, line.shown, line.measure, tuple(elements), title, subtitle)


def _row(line: Line, suspect: Suspect) -> tuple[str, str, str, str, str]:
    ranks = compressed(str(rank) for rank in suspect.ranks)
    told = ranks if len(ranks) <= 24 else f"{len(suspect.ranks)} ranks"
    return str(suspect.element), f"{suspect.p:.2g}", f"{suspect.score:.1f}", told, f"{line.label}: {suspect.evidence}"


def _named(each: Accused) -> _Named:
    first = each.suspects[0]
    return _Named(each.name, each.p, first.score, each.evidence, first.ranks, each.hosts, each.nodes)


def _suspected(suspect: Suspect) -> _Suspected:
    element = suspect.element
    return _Suspected(
        str(element), element.kind.value, element.name, suspect.p, suspect.score, suspect.evidence, suspect.ranks
    )


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
