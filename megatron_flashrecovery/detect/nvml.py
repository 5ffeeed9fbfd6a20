"""What NVML says of the devices of this machine. Its calls may never return when a device is in trouble, and neither
may those for the counters of InfiniBand ports, so a process of its own makes them: ``python -m
megatron_flashrecovery.detect.nvml FD``, which writes a line for each thing."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol, TypeVar, cast

from megatron_flashrecovery.core.counting import EVERY
from megatron_flashrecovery.core.devices import DeviceReading, Trouble, changes, place_on_bus, trouble_of_xid
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.counters import PortCounters

_PR_SET_PDEATHSIG = 1
_EVENTS_MS = 200
_EVERY = 0.5
T = TypeVar("T")


class PciInfo(Protocol):
    busId: bytes | str


class EventData(Protocol):
    device: object
    eventType: int
    eventData: int


class Library(Protocol):
    """What is used of ``pynvml``, by its names and in its order of arguments; a test compares them."""

    NVMLError: type[Exception]
    NVMLError_Timeout: type[Exception]
    NVMLError_GpuIsLost: type[Exception]
    NVML_MEMORY_ERROR_TYPE_CORRECTED: int
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED: int
    NVML_VOLATILE_ECC: int
    NVML_FEATURE_ENABLED: int
    NVML_NVLINK_MAX_LINKS: int
    nvmlEventTypeXidCriticalError: int
    nvmlEventTypeDoubleBitEccError: int
    nvmlClocksEventReasonHwThermalSlowdown: int
    nvmlClocksEventReasonSwThermalSlowdown: int

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetPciInfo(self, handle: object) -> PciInfo: ...
    def nvmlDeviceGetUUID(self, handle: object) -> bytes | str: ...
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: object) -> int: ...
    def nvmlDeviceGetTotalEccErrors(self, handle: object, errorType: int, counterType: int) -> int: ...
    def nvmlDeviceGetPcieReplayCounter(self, handle: object) -> int: ...
    def nvmlDeviceGetRemappedRows(self, device: object) -> tuple[int, int, int, int]: ...
    def nvmlDeviceGetNvLinkState(self, device: object, link: int) -> int: ...
    def nvmlEventSetCreate(self) -> object: ...
    def nvmlDeviceGetSupportedEventTypes(self, handle: object) -> int: ...
    def nvmlDeviceRegisterEvents(self, handle: object, eventTypes: int, eventSet: object) -> None: ...
    def nvmlEventSetWait_v2(self, eventSet: object, timeoutms: int) -> EventData: ...


class Nvml:
    """``library`` is ``pynvml``, of the package ``nvidia-ml-py``."""

    def __init__(self, library: Library) -> None:
        self._library = library
        library.nvmlInit()
        self._handles: dict[str, object] = {}
        self.uuids: dict[str, str] = {}
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            device = place_on_bus(_text(library.nvmlDeviceGetPciInfo(handle).busId))
            self._handles[device] = handle
            self.uuids[_text(library.nvmlDeviceGetUUID(handle))] = device
        self._before: dict[str, DeviceReading] = {}
        self._events = self._register()

    def wait_for_events(self, timeout_ms: int) -> list[Trouble]:
        """Xid errors and double-bit memory errors, as they come."""
        library = self._library
        if self._events is None:
            time.sleep(timeout_ms / 1000)
            return []
        try:
            event = library.nvmlEventSetWait_v2(self._events, timeout_ms)
        except library.NVMLError_Timeout:
            return []
        except library.NVMLError_GpuIsLost:
            return []  # which one it is shows the next look at each
        device = place_on_bus(_text(library.nvmlDeviceGetPciInfo(event.device).busId))
        if event.eventType & library.nvmlEventTypeXidCriticalError:
            return [trouble_of_xid(device, int(event.eventData))]
        if event.eventType & library.nvmlEventTypeDoubleBitEccError:
            return [Trouble(device, Fault.DEVICE_POISONED, f"double-bit memory error (device {device})")]
        return []

    def look(self, asking: Callable[[str], None]) -> list[Trouble]:
        """At every device, saying before each which one it is."""
        found = []
        for device, handle in self._handles.items():
            asking(device)
            reading = self._read(device, handle)
            found += changes(self._before.get(device), reading)
            self._before[device] = reading
        return found

    def counters(self) -> dict[str, int]:
        """That only grow, by ``device.PLACE.NAME``; those of a device that is lost are left out."""
        library = self._library
        found = {}
        for device, handle in self._handles.items():
            for name, kind in (
                ("ecc_corrected", library.NVML_MEMORY_ERROR_TYPE_CORRECTED),
                ("ecc_uncorrected", library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            ):
                with suppress(library.NVMLError):
                    errors = library.nvmlDeviceGetTotalEccErrors(handle, kind, library.NVML_VOLATILE_ECC)
                    found[f"device.{device}.{name}"] = errors
            with suppress(library.NVMLError):
                found[f"device.{device}.pcie_replays"] = library.nvmlDeviceGetPcieReplayCounter(handle)
        return found

    def _read(self, device: str, handle: object) -> DeviceReading:
        library = self._library
        try:
            reasons = self._ask(0, lambda: library.nvmlDeviceGetCurrentClocksEventReasons(handle))
            hot = library.nvmlClocksEventReasonHwThermalSlowdown | library.nvmlClocksEventReasonSwThermalSlowdown
            kind, counter = library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, library.NVML_VOLATILE_ECC
            uncorrectable = self._ask(0, lambda: library.nvmlDeviceGetTotalEccErrors(handle, kind, counter))
            rows = self._ask((0, 0, 0, 0), lambda: library.nvmlDeviceGetRemappedRows(handle))
            links = frozenset(self._links(handle))
        except library.NVMLError_GpuIsLost:
            return DeviceReading(device, is_lost=True)
        return DeviceReading(device, False, uncorrectable, bool(rows[2]), bool(rows[3]), links, bool(reasons & hot))

    def _links(self, handle: object) -> Iterator[int]:
        library = self._library
        for link in range(library.NVML_NVLINK_MAX_LINKS):
            try:
                if library.nvmlDeviceGetNvLinkState(handle, link) == library.NVML_FEATURE_ENABLED:
                    yield link
            except library.NVMLError_GpuIsLost:
                raise
            except library.NVMLError:
                return  # it has no more of them

    def _ask(self, otherwise: T, question: Callable[[], T]) -> T:
        """What a device does not support it says again and again, and that is no trouble."""
        try:
            return question()
        except self._library.NVMLError_GpuIsLost:
            raise
        except self._library.NVMLError:
            return otherwise

    def _register(self) -> object:
        library = self._library
        wanted = library.nvmlEventTypeXidCriticalError | library.nvmlEventTypeDoubleBitEccError
        try:
            events = library.nvmlEventSetCreate()
            for handle in self._handles.values():
                library.nvmlDeviceRegisterEvents(
                    handle, wanted & library.nvmlDeviceGetSupportedEventTypes(handle), events
                )
        except library.NVMLError:
            return None  # not supported here: the counters and the kernel's log are left
        return events


def watch(
    nvml: Nvml, ports: PortCounters, say: Callable[[dict[str, object]], None], clock: Callable[[], float]
) -> Iterator[None]:
    """For ever; a step each time. Says ``devices`` once, ``asking`` before what may hang, each ``trouble``, and the
    ``counters`` now and then."""
    say({"devices": nvml.uuids})
    due = due_counters = clock()
    while True:
        found = []
        if clock() >= due:
            due = clock() + _EVERY
            found += nvml.look(lambda device: say({"asking": device}))
        say({"asking": "any"})
        if clock() >= due_counters:
            due_counters = clock() + EVERY
            say({"counters": nvml.counters() | ports.read()})
        found += nvml.wait_for_events(_EVENTS_MS)
        say({"asking": ""})
        for trouble in found:
            fault = trouble.fault.name if trouble.fault is not None else ""
            say({"trouble": [trouble.device, fault, trouble.evidence]})
        yield


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = int(sys.argv[1])

    def say(message: dict[str, object]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    ports = PortCounters()
    try:
        nvml = Nvml(cast(Library, importlib.import_module("pynvml")))
    except Exception as error:  # the outermost frame of this process: without NVML there is nothing to watch
        say({"missing": f"{type(error).__name__}: {error}"})
        _count_only(ports, say)
        return
    for _ in watch(nvml, ports, say, time.monotonic):
        pass


def _count_only(ports: PortCounters, say: Callable[[dict[str, object]], None]) -> None:
    while found := ports.read():
        say({"counters": found})
        time.sleep(EVERY)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    main()
