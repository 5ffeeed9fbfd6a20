"""The `flashrecovery` command. Exits with 0: done, 1: the job or a comparison failed, 2: it cannot be done as asked."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import TypeAlias

from megatron_flashrecovery import __version__
from megatron_flashrecovery.commands import demo, diagnose, inject, patch, plan, policy, replay, run, status, verify
from megatron_flashrecovery.commands.arguments import Arguments, refuse_unknown
from megatron_flashrecovery.core.errors import ConfigError, RecordDamaged

Execute: TypeAlias = Callable[[argparse.Namespace, Mapping[str, str]], int]
_COMMANDS: Mapping[str, ModuleType] = {
    "run": run,
    "plan": plan,
    "verify": verify,
    "status": status,
    "replay": replay,
    "diagnose": diagnose,
    "policy": policy,
    "inject": inject,
    "patch": patch,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """``environment`` is the only place from which environment variables are read."""
    ended: list[int] = []
    if argv is None:  # this process is the command, and nobody's library
        atexit.register(_leave, ended)
    ended.append(_exit_code_of(argv, environment))
    return ended[0]


def _leave(ended: Sequence[int]) -> None:
    """As the last exit handler, for it is the first to be registered: to free torch object by object takes a launcher
    some seconds, in which everybody waits for nothing."""
    if ended:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(ended[0])


def _exit_code_of(argv: Sequence[str] | None, environment: Mapping[str, str] | None) -> int:
    try:
        try:
            return _execute(sys.argv[1:] if argv is None else argv, os.environ if environment is None else environment)
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends: it would complain about a closed pipe
    except (ConfigError, RecordDamaged) as error:
        print(f"flashrecovery: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has seen enough (`flashrecovery replay DIR | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _execute(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    parser = Arguments(prog="flashrecovery", description="Recover from lost ranks in the middle of a training step.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser_of = {}
    for name, command in _COMMANDS.items():
        parser_of[name] = commands.add_parser(name, help=command.PURPOSE, description=command.PURPOSE)
        command.add_arguments(parser_of[name])
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(unknown[0], parser_of[arguments.command].flags(), run.UNSUPPORTED)
    execute: Execute = _COMMANDS[arguments.command].execute
    return execute(arguments, environment)
