"""`flashrecovery policy`: what is done about a fault, as it is decided: the table itself is printed."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence

from megatron_flashrecovery.commands.arguments import Arguments
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.policy import NOTES, POLICY, Fault, Rule

PURPOSE = "say what is done about each fault, by the table that decides it"


def add_arguments(parser: Arguments) -> None:
    parser.add_argument(
        "fault", nargs="?", default=None, metavar="FAULT", help="one of them, as in hang; all if left out"
    )
    parser.add_flag("--json", action="store_true", help="one line for programs")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    rules = POLICY if arguments.fault is None else of_fault(arguments.fault)
    if arguments.json:
        print(json.dumps([{"fault": _key(r.fault), "when": r.when, "action": r.action.value} for r in rules]))
        return 0
    _show(rules)
    return 0


def of_fault(name: str) -> Sequence[Rule]:
    """By the name in the table, or that of ``--json`` (`out_of_memory`). Raises ``ConfigError``."""
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    named = {**{_key(fault): fault for fault in Fault}, **{fault.value.replace(" ", "_"): fault for fault in Fault}}
    if wanted not in named:
        close = difflib.get_close_matches(wanted, named, n=1)
        remedy = f"did you mean {named[close[0]].value!r}? " if close else ""
        raise ConfigError(
            f"there is no fault {name!r} in the table: {remedy}it has {', '.join(fault.value for fault in Fault)}"
        )
    return [rule for rule in POLICY if rule.fault is named[wanted]]


def _key(fault: Fault) -> str:
    return fault.name.lower()


def _show(rules: Sequence[Rule]) -> None:
    # Here: `flashrecovery --help` does without.
    from rich.box import SIMPLE
    from rich.table import Table

    from megatron_flashrecovery.commands.console import Console

    console = Console(highlight=False)
    table = Table("fault", "when", "then", box=SIMPLE, pad_edge=False)
    shown: Fault | None = None
    for rule in rules:
        if shown is not None and rule.fault is not shown:
            table.add_section()
        name = rule.fault.value if rule.fault is not shown else ""
        table.add_row(name, "else" if name == "" and rule.when == "always" else rule.when, rule.action.value)
        shown = rule.fault
    console.print(table)
    console.print("the first line of a fault that applies is the one that counts")
    for action in dict.fromkeys(rule.action for rule in rules):
        if action in NOTES:
            console.print(f"{action.value}: {NOTES[action]}")
