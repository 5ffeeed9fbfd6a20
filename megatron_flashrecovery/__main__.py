"""`python -m megatron_flashrecovery` is the `flashrecovery` command."""

from __future__ import annotations

import sys

from megatron_flashrecovery.cli import main

if __name__ == "__main__":
    sys.exit(main())
