"""`flashrecovery diagnose DIR`: which part of the cluster is to blame, by the records of a run."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_flashrecovery.runtime.case import Case
    from megatron_flashrecovery.runtime.surroundings import Surroundings

PURPOSE = "name the part of the cluster that is to blame for slow ranks and losses, or say that it cannot be told"


def add_arguments(parser: Arguments) -> None:
    parser.description = (
        f"{PURPOSE}. Exits with 0: somebody is to blame, 1: undetermined, 2: it cannot be done as asked."
    )
    parser.add_argument(
        "directory", type=directory_of_records, metavar="DIR", help="the --log-dir of a run, also of a running one"
    )
    add = parser.add_flag
    add("--topology", type=Path, default=None, metavar="FILE", help="describes the cluster (docs/diagnose.md)")
    add("--telemetry", type=Path, default=None, metavar="FILE", help="measurements of the site: .jsonl or .csv")
    add("--last", type=float, default=None, metavar="SECONDS", help=_LAST)
    add("--level", type=float, default=0.01, metavar="P", help="the share of healthy runs that may be blamed (0.01)")
    add("--picture", type=Path, default=None, metavar="FILE", help="also draw it, as .svg or .png")
    add("--cordon", choices=("hosts", "slurm"), default=None, help=_CORDON)
    add("--json", action="store_true", help="one line for programs")
    add("--deadline", type=float, default=None, metavar="SECONDS", help="end without a word after so long")


_SEARCH = 60.0
"""Seconds for what the topology does not know; with a deadline, that share of it."""
_SHARE = 0.5
_LAST = "look at these of the record (by default: while somebody was slow, or the last 600; incidents: all)"
_CORDON = "print only the hosts that are to blame: one a line, or as commands for SLURM, which are not run"


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """0: somebody is to blame. 1: undetermined."""
    _check(arguments)
    if arguments.deadline is not None:
        signal.setitimer(signal.ITIMER_REAL, arguments.deadline)
    # Here: numpy and what follows from it are of no use to bad input.
    from megatron_flashrecovery.commands import diagnosis_report
    from megatron_flashrecovery.runtime.case import diagnose, places_of
    from megatron_flashrecovery.runtime.dossier import read_dossier
    from megatron_flashrecovery.runtime.localizing import within
    from megatron_flashrecovery.runtime.measured import period_of
    from megatron_flashrecovery.runtime.surroundings import surroundings_of
    from megatron_flashrecovery.runtime.telemetry_file import read_telemetry

    dossier = read_dossier(arguments.directory, arguments.last)
    more = () if arguments.telemetry is None else read_telemetry(arguments.telemetry, dossier)
    surroundings = surroundings_of(dossier, arguments.topology, environment)
    period = period_of(dossier, arguments.last)
    locate = within(_SEARCH if arguments.deadline is None else arguments.deadline * _SHARE)
    case = diagnose(dossier, surroundings.topology, period, locate, more, arguments.level)
    if arguments.picture is not None:
        _draw(arguments.picture, case, surroundings)
    if arguments.cordon is not None:
        diagnosis_report.cordon(places_of(case), arguments.cordon)
    elif arguments.json:
        print(diagnosis_report.as_json(case, surroundings))
    else:
        diagnosis_report.show(case, surroundings)
    return 0 if case.accused else 1


def _check(arguments: argparse.Namespace) -> None:
    """At once: reading a long journal takes a while."""
    if arguments.picture is not None:
        from megatron_flashrecovery.commands import diagnosis_picture

        diagnosis_picture.check(arguments.picture)
    if arguments.last is not None and not 0 < arguments.last < math.inf:
        raise ConfigError(f"--last {arguments.last:g}: give seconds above zero")
    if arguments.deadline is not None and not 0 < arguments.deadline < math.inf:
        raise ConfigError(f"--deadline {arguments.deadline:g}: give seconds above zero")
    if not 0 < arguments.level < 1:
        raise ConfigError(f"--level {arguments.level:g}: give a share above 0 and below 1, as in 0.01")


def _draw(path: Path, case: Case, surroundings: Surroundings) -> None:
    from megatron_flashrecovery.commands import diagnosis_picture, diagnosis_report

    diagnosis_picture.draw(path, diagnosis_report.shown(case, surroundings))
