"""A library with the functions of ``pynvml`` that are used, and devices that can be told to fail."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


class NVMLError(Exception):
    value = 999


class NVMLError_Timeout(NVMLError):
    value = 10


class NVMLError_GpuIsLost(NVMLError):
    value = 15


class NVMLError_NotSupported(NVMLError):
    value = 3


class NVMLError_InvalidArgument(NVMLError):
    value = 2


@dataclass
class FakeDevice:
    busId: bytes
    uuid: str
    is_lost: bool = False
    supports_events: bool = True
    uncorrectable: int = 0
    corrected: int = 0
    replays: int | None = 0
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    links: list[int] = field(default_factory=lambda: [1, 1, 0])
    reasons: int = 0


@dataclass
class FakeEvent:
    device: FakeDevice
    eventType: int
    eventData: int


class FakeNvml:
    NVMLError = NVMLError
    NVMLError_Timeout = NVMLError_Timeout
    NVMLError_GpuIsLost = NVMLError_GpuIsLost
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_FEATURE_ENABLED = 1
    NVML_NVLINK_MAX_LINKS = 36
    nvmlEventTypeXidCriticalError = 8
    nvmlEventTypeDoubleBitEccError = 2
    nvmlClocksEventReasonHwThermalSlowdown = 64
    nvmlClocksEventReasonSwThermalSlowdown = 32

    def __init__(self, devices: list[FakeDevice]) -> None:
        self._devices = devices
        self._registered: list[FakeDevice] = []
        self.events: deque[FakeEvent] = deque()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self._devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeDevice:
        return self._devices[index]

    def nvmlDeviceGetPciInfo(self, handle: FakeDevice) -> FakeDevice:
        return handle

    def nvmlDeviceGetUUID(self, handle: FakeDevice) -> str:
        return handle.uuid

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeDevice) -> int:
        return _asked(handle).reasons

    def nvmlDeviceGetTotalEccErrors(self, handle: FakeDevice, errorType: int, counterType: int) -> int:
        device = _asked(handle)
        return device.uncorrectable if errorType else device.corrected

    def nvmlDeviceGetPcieReplayCounter(self, handle: FakeDevice) -> int:
        if (replays := _asked(handle).replays) is None:
            raise NVMLError_NotSupported
        return replays

    def nvmlDeviceGetRemappedRows(self, device: FakeDevice) -> tuple[int, int, int, int]:
        return _asked(device).rows

    def nvmlDeviceGetNvLinkState(self, device: FakeDevice, link: int) -> int:
        if link >= len(_asked(device).links):
            raise NVMLError_InvalidArgument
        return device.links[link]

    def nvmlEventSetCreate(self) -> list[FakeDevice]:
        return self._registered

    def nvmlDeviceGetSupportedEventTypes(self, handle: FakeDevice) -> int:
        if not handle.supports_events:
            raise NVMLError_NotSupported
        return 0xFFFF

    def nvmlDeviceRegisterEvents(self, handle: FakeDevice, eventTypes: int, eventSet: list[FakeDevice]) -> None:
        assert eventTypes == 8 | 2
        eventSet.append(handle)

    def nvmlEventSetWait_v2(self, eventSet: list[FakeDevice], timeoutms: int) -> FakeEvent:
        if not self.events:
            raise NVMLError_Timeout
        event = self.events.popleft()
        assert event.device in eventSet
        return event


def _asked(device: FakeDevice) -> FakeDevice:
    if device.is_lost:
        raise NVMLError_GpuIsLost
    return device
