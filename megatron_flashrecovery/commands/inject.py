"""`flashrecovery inject DIR SPEC`: let a rank of a run that goes on inflict a fault on itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime.injection import Injection, help_of_kinds, help_of_spec

PURPOSE = "inject a fault into a run that was started with --allow-injection"
_TIMEOUT = 10.0


def add_arguments(parser: Arguments) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"kinds of faults, with their keys:\n{help_of_kinds()}"
    parser.add_argument("directory", type=directory_of_records, metavar="DIR", help="the --log-dir of the run")
    spec = f"{help_of_spec()}; without step in the next one, without at at the first moment"
    parser.add_argument("spec", metavar="SPEC", help=spec)
    parser.add_flag("--timeout", type=float, default=_TIMEOUT, metavar="SECONDS", help="for the run to answer (10)")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    # Here: `flashrecovery --help` does without.
    from megatron_flashrecovery.runtime.spool import submit
    from megatron_flashrecovery.runtime.status import status_of

    injection = Injection.parse(arguments.spec, is_live=True)
    status = status_of(arguments.directory)
    if status.phase in ("ended", "died"):
        raise ConfigError(
            f"{arguments.directory}: this run has {status.phase}: there is nothing to inject a fault into"
        )
    submit(arguments.directory, arguments.spec, arguments.timeout)
    step = "the next step that it computes" if injection.step is None else f"step {injection.step}"
    at = "" if injection.at is None else f", at {injection.at.value}"
    print(f"rank {injection.rank} is told: {injection.fault.value} in {step}{at}")
    return 0
