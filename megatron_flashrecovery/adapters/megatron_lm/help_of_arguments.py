"""Help of upstream's arguments, read once for all workers of a node.

Since core_v0.16 upstream takes the help of an argument from the source of the class that has it, and parses arguments
three times. On the two cores of ``bench/`` that was a third of a second of every start and of every replacement.
"""

from __future__ import annotations

import argparse
import functools
import sys
from types import ModuleType


def remember_help(module: ModuleType) -> None:
    """What the source of a class says does not change. A release that reads no source is left alone."""
    factory = getattr(module, "ArgumentGroupFactory", None)
    read = getattr(factory, "_get_field_docstrings", None)
    if read is None:
        return
    known: dict[tuple[type, type], dict[str, str]] = {}

    @functools.wraps(read)
    def remembered(self: object, src_cfg_class: type) -> dict[str, str]:
        which = type(self), src_cfg_class
        if which not in known:
            known[which] = read(self, src_cfg_class)
        return dict(known[which])

    factory._get_field_docstrings = remembered  # type: ignore[union-attr]


def read_help() -> None:
    """In the fork server, when the script has imported upstream: all that it forks knows it."""
    module = sys.modules.get("megatron.training.arguments")
    if module is not None:
        module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
