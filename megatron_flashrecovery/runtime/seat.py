"""The seat of this process: which rank it is, and the channel to its agent. Taken once, before the script runs."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron_flashrecovery.comm.channel import Channel, ChannelClosed
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.detect import stacks
from megatron_flashrecovery.detect.exceptions import fault_of, leaves_device_unusable
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime.dialogue import Raised, Seat

FROM_CHECKPOINT = "FLASHRECOVERY_FROM_CHECKPOINT"
_PR_SET_NAME = 15
_TRACEBACK_NBYTES = 8192
_taken: tuple[Seat, Channel] | None = None
_page: int | None = None


def taken_seat() -> tuple[Seat, Channel]:
    """Raises ``ConfigError`` in a process that ``flashrecovery run`` did not start."""
    if _taken is None:
        script = " ".join(sys.argv)
        raise ConfigError(
            "--enable-flash-recovery needs the launcher: type "
            f"`flashrecovery run --nproc-per-node N {script}` where you typed torchrun or python"
        )
    return _taken


def taken_pulse() -> Pulse:
    """Of this process."""
    return Pulse(_page)


def take_seat(channel: Channel) -> None:
    """Wait to be told which seat this is, and run the script there as ``__main__``. A spare waits here until it is
    needed; if the agent goes away first, there is nothing left to wait for."""
    global _taken, _page
    try:
        message, descriptors = channel.receive()
    except ChannelClosed:
        sys.exit(0)
    assert isinstance(message, Seat), message
    _taken = (message, channel)
    if descriptors:
        _page, words = descriptors
        stacks.write_on_death(words)
    _name_process(f"rank{message.rank}")
    os.environ.update(message.environment)
    sys.argv = [message.script, *message.script_args]
    try:
        _run_script(message)
    except ConfigError as error:
        print(f"flashrecovery: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        if leaves_device_unusable(error):
            end_with(error, 1)
        _tell(error)
        raise


def end_with(error: Exception, exit_code: int) -> NoReturn:
    """End this process at once, from any thread, and say of what. Exit handlers and destructors may wait for the
    device, which may never answer, and for communicators whose kernels never end."""
    _tell(error)
    traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _tell(error: Exception) -> None:
    if _taken is not None:
        with suppress(ChannelClosed):
            _taken[1].send(_raised(error))


def _raised(error: Exception) -> Raised:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} in {last.name}"
    return Raised(what, text.encode()[-_TRACEBACK_NBYTES:].decode(errors="replace"), fault_of(error))


def _name_process(name: str) -> None:
    """For ``ps`` and ``top``: all workers were forked from one command line."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _run_script(seat: Seat) -> None:
    if seat.module:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` has it, and torchrun with it
        runpy.run_module(seat.script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(seat.script).resolve().parent))
        runpy.run_path(seat.script, run_name="__main__")
