"""The process that asks NVML, seen from the one that must not wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_flashrecovery import start
from megatron_flashrecovery.core.devices import Trouble
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.counters import INFINIBAND

DRIVER = Path("/proc/driver/nvidia/version")
COMMAND = start.command("megatron_flashrecovery.detect.nvml")
ANSWERS_WITHIN = 5.0
"""Seconds. That NVML does not return is evidence and no proof: a note, which stands beside what else is seen."""
_READ_NBYTES = 1 << 16


class DeviceProbe:
    """``command`` is given the descriptor to write to. ``why_not`` says why nothing is seen, if so."""

    def __init__(self, command: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.why_not = ""
        self.devices: dict[str, str] = {}
        """UUID -> place on the bus, once it is known."""
        self.counters: dict[str, int] = {}
        """Of devices and InfiniBand ports, as they were last told."""
        self._asking, self._asked_at = "", clock()
        self._is_told = False
        self._rest = b""
        self._process: subprocess.Popen[bytes] | None = None
        if command is None and not DRIVER.exists() and not INFINIBAND.exists():
            self.why_not = "there is no NVIDIA driver here"
            return
        self._descriptor, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(theirs, True)
        self._process = subprocess.Popen(
            [*(command or COMMAND), str(theirs)], pass_fds=[theirs], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)

    def look(self) -> list[Trouble]:
        """What it has said since. Never waits."""
        if self._process is None:
            return []
        found = [trouble for line in self._lines() if (trouble := self._hear(line)) is not None]
        late = self._clock() - self._asked_at
        if self._asking and late > ANSWERS_WITHIN and not self._is_told:
            self._is_told = True
            found.append(Trouble(self._asking, None, f"NVML has not answered for {late:.0f} s (device {self._asking})"))
        return found

    def close(self) -> None:
        """It may be stuck in the driver: then it goes when the driver lets go of it, and nobody waits for that."""
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
            os.close(self._descriptor)
            self._process = None

    def _lines(self) -> list[bytes]:
        try:
            while data := os.read(self._descriptor, _READ_NBYTES):
                self._rest += data
            self.why_not = self.why_not or "the process that asks NVML has ended"
        except BlockingIOError:
            pass
        *lines, self._rest = self._rest.split(b"\n")
        return lines

    def _hear(self, line: bytes) -> Trouble | None:
        match json.loads(line):
            case {"devices": dict(devices)}:
                self.devices = devices
            case {"missing": str(reason)}:
                self.why_not = reason
            case {"counters": dict(counters)}:
                self.counters = counters
            case {"asking": str(device)}:
                self._asking, self._asked_at, self._is_told = device, self._clock(), False
            case {"trouble": [str(device), str(fault), str(evidence)]}:
                return Trouble(device, Fault[fault] if fault else None, evidence)
        return None
