"""Run a module of this copy of the package, with its arguments: ``python -P start.py MODULE ARGUMENT...``.

``python -m`` would import from the current directory before anything else, so a directory with another copy of the
package, or with a module named like one of our dependencies, would make workers of another kind than their launcher.
torchrun's workers do not see that directory either. ``-P`` leaves it out, and where this file lies is our copy.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def command(module: str) -> tuple[str, ...]:
    """That runs a module of this package; arguments may follow."""
    return sys.executable, "-P", __file__, module


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import megatron_flashrecovery  # noqa: F401 - from here on its modules are found through it

    del sys.path[0], sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
