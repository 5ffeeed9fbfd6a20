"""`python -m bench NAME... | all | gpu`: run benches. A bench is a module with a function `main` that takes nothing.

`gpu`: those that train, on the GPUs of this machine; without two of them nothing is measured.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    known = benches()
    if list(argv) == ["gpu"]:
        return on_gpus()
    asked = known if list(argv) == ["all"] else list(argv)
    if not asked or not set(asked) <= set(known):
        unknown = sorted(set(asked) - set(known))
        what = f"there is no bench {unknown[0]!r}" if unknown else "which bench?"
        print(f"bench: {what}: give all, gpu, or some of: {' '.join(known)}", file=sys.stderr)
        return 2
    for name in asked:
        importlib.import_module(f"bench.{name}").main()
    return 0


def on_gpus() -> int:
    # Here: asking for another bench does not import it.
    from bench import place

    asked = place.benches_of_gpus(place.devices())
    if not asked:
        print("bench gpu: not measured, for this machine has no two GPUs", file=sys.stderr)
        return 0
    return main(asked)


def benches() -> list[str]:
    """Found by their text, so that asking for one does not import the others."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in modules if path.stem != "__main__" and "\ndef main() -> None:" in path.read_text()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
