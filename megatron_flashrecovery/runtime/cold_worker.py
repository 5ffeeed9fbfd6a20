"""Start a worker without a fork server: FD PARENT HOOK... are given by the agent (``start.command``).

PARENT is the process id of the launcher.
"""

from __future__ import annotations

import os
import sys

from megatron_flashrecovery.runtime.fork_server import call_hooks, die_with_parent, leave_without_teardown, run_worker

if __name__ == "__main__":
    die_with_parent()
    leave_without_teardown()
    if os.getppid() != int(sys.argv[2]):
        sys.exit(0)  # the launcher was gone before the kernel knew of our wish
    os.setpgid(0, 0)
    call_hooks(sys.argv[3:])
    run_worker(int(sys.argv[1]))
