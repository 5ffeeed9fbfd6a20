"""The seat of this process: which rank it is, and the channel to its agent. Taken once, before the script runs."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

from megatron_flashrecovery.comm.channel import Channel, ChannelClosed
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime.dialogue import Seat

FROM_CHECKPOINT = "FLASHRECOVERY_FROM_CHECKPOINT"
_PR_SET_NAME = 15
_taken: tuple[Seat, Channel] | None = None


def taken_seat() -> tuple[Seat, Channel]:
    """Raises ``ConfigError`` in a process that ``flashrecovery run`` did not start."""
    if _taken is None:
        script = " ".join(sys.argv)
        raise ConfigError(
            "--enable-flash-recovery needs the launcher: type "
            f"`flashrecovery run --nproc-per-node N {script}` where you typed torchrun or python"
        )
    return _taken


def take_seat(channel: Channel) -> None:
    """Wait to be told which seat this is, and run the script there as ``__main__``. A spare waits here until it is
    needed; if the agent goes away first, there is nothing left to wait for."""
    global _taken
    try:
        message, _fds = channel.receive()
    except ChannelClosed:
        sys.exit(0)
    assert isinstance(message, Seat), message
    _taken = (message, channel)
    _name_process(f"rank{message.rank}")
    os.environ.update(message.environment)
    sys.argv = [message.script, *message.script_args]
    try:
        _run_script(message)
    except ConfigError as error:
        print(f"flashrecovery: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _name_process(name: str) -> None:
    """For ``ps`` and ``top``: all workers were forked from one command line."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _run_script(seat: Seat) -> None:
    if seat.module:
        runpy.run_module(seat.script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(seat.script).resolve().parent))
        runpy.run_path(seat.script, run_name="__main__")
