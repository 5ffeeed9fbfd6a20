"""Start a worker without a fork server: ``python -m megatron_flashrecovery.runtime.cold_worker FD``."""

from __future__ import annotations

import sys

from megatron_flashrecovery.runtime.fork_server import run_worker

if __name__ == "__main__":
    run_worker(int(sys.argv[1]))
