"""`flashrecovery patch`: make the flag a part of a Megatron-LM checkout, take it out again, or see what has moved."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_flashrecovery.commands.arguments import Arguments
from megatron_flashrecovery.patching.insertions import states
from megatron_flashrecovery.patching.megatron_lm import Checkout, known_versions

PURPOSE = "apply, revert or check the patch for a checkout of Megatron-LM (an unpatched one works, too)"


def add_arguments(parser: Arguments) -> None:
    parser.description = (
        f"{PURPOSE}. check exits with 0: all is as it was when recovery was tested, 1: something has moved, "
        f"2: it cannot be done as asked."
    )
    parser.add_argument("verb", choices=("apply", "revert", "check"), metavar="apply|revert|check")
    parser.add_argument("path", type=Path, metavar="PATH", help="the checkout")


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Of `check` exit code 1 if anything has moved on which recovery relies, be it only written differently."""
    checkout = Checkout(arguments.path)
    if arguments.verb == "check":
        return _check(checkout)
    print(checkout.apply() if arguments.verb == "apply" else checkout.revert())
    return 0


def _check(checkout: Checkout) -> int:
    known = checkout.matches()
    if known is None:
        versions = known_versions()
        exact = [each for each in versions if each.tag == f"core_v{checkout.version}"]
        known = (exact or versions)[-1]
        print(f"{checkout.root}: Megatron-LM {checkout.version}, not a version that is known; beside {known.tag}:")
        for path, state in states(known.patch, checkout.root).items():
            print(f"  {path}: {state}")
    else:
        print(f"{checkout.root}: Megatron-LM {checkout.version} ({known.tag}), patch {checkout.state(known)}")
    moved, missing = checkout.moved(known), checkout.missing_names()
    for name in missing:
        print(f"  megatron/training/training.py knows no {name}, which is replaced there: recovery will not work")
    for each in moved:
        print(f"  {each.seam.place} {each.difference}" + (": recovery will not work" if each.breaks else ""))
    if not moved and not missing:
        print(f"  all {len(known.seams)} seams are as they were when recovery was tested")
    return int(bool(missing or moved))
