"""Command-line flags whose words are joined by ``-`` or ``_`` alike, and whose mistakes are one line each."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from megatron_flashrecovery.core.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """torchrun takes both spellings of its flags, and so does everything here."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  (argparse's own)
        super().__init__(allow_abbrev=False, **settings)

    def add_flag(self, *names: str, **settings: Any) -> None:  # noqa: ANN401
        """``add_argument`` for a flag; give the spelling with ``-``."""
        aliases = [name[:2] + name[2:].replace("-", "_") for name in names if "-" in name[2:]]
        self.add_argument(*names, *aliases, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")

    def flags(self) -> tuple[str, ...]:
        """Every flag in its first spelling."""
        long = (next((o for o in a.option_strings if o.startswith("--")), "") for a in self._actions)
        return tuple(flag for flag in long if flag)


def directory_of_records(text: str) -> Path:
    """For the flags and arguments that name one. Raises ``ConfigError`` for what can never be one."""
    path = Path(text)
    for part in (path, *path.parents):
        if os.path.isfile(part):  # what cannot be looked at is another complaint's, and no traceback
            raise ConfigError(f"{part} is a file: name the --log-dir of a run, which is a directory")
    return path


def refuse_unknown(flag: str, known: Iterable[str], unsupported: dict[str, str]) -> NoReturn:
    """``unsupported`` says of flags that others have why they are not taken here."""
    name = flag.split("=", 1)[0].replace("_", "-")
    if name in unsupported:
        raise ConfigError(f"{name} is not supported: {unsupported[name]}")
    close = difflib.get_close_matches(name, list(known), n=1)
    remedy = f"did you mean {close[0]}?" if close else "see --help for those that there are"
    raise ConfigError(f"unknown flag {flag}: {remedy}")
