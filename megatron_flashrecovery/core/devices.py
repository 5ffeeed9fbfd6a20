"""What the driver says of devices, and what that means for whoever computes on them.

The numbers are those of NVIDIA's catalog of Xid errors (docs.nvidia.com/deploy/xid-errors). What an application usually
brings about by itself (13, 31), and what only follows from something else (43, 45), ends nobody here: the process
hears of it as an exception, and its class decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_flashrecovery.core.policy import Fault

_XID_LINE = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+)(?:, *(.*))?")
_SAME_INCIDENT = 10.0
"""Seconds: the driver reports one fault in several ways, and both it and NVML do."""


@dataclass(frozen=True)
class Trouble:
    """``device`` is its place on the bus. Without a fault it is a note only."""

    device: str
    fault: Fault | None
    evidence: str


@dataclass(frozen=True)
class DeviceReading:
    """One look at a device. ``links`` are the numbers of the NVLinks that are up."""

    device: str
    is_lost: bool = False
    uncorrectable: int = 0
    is_remap_pending: bool = False
    has_remap_failed: bool = False
    links: frozenset[int] = frozenset()
    is_hot: bool = False


XIDS: Mapping[int, tuple[Fault | None, str]] = {
    13: (None, "exception of the graphics engine, usually the application's"),
    31: (None, "memory management fault, usually the application's"),
    43: (None, "a channel was reset after another error"),
    45: (None, "channels were removed after another error or the end of their process"),
    46: (Fault.DEVICE_ERROR, "the device stopped processing"),
    48: (Fault.DEVICE_POISONED, "double-bit memory error"),
    61: (Fault.DEVICE_ERROR, "breakpoint or warning of an internal controller"),
    62: (Fault.DEVICE_ERROR, "an internal controller has halted"),
    63: (None, "a memory row will be remapped at the next reset"),
    64: (Fault.DEVICE_ERROR, "a memory row could not be remapped"),
    74: (Fault.DEVICE_ERROR, "error of an NVLink"),
    79: (Fault.DEVICE_LOST, "the device has fallen off the bus"),
    92: (None, "many single-bit memory errors"),
    94: (Fault.DEVICE_POISONED, "uncorrectable memory error, contained"),
    95: (Fault.DEVICE_POISONED, "uncorrectable memory error, not contained"),
    109: (Fault.DEVICE_ERROR, "timeout of a context switch"),
    110: (Fault.DEVICE_ERROR, "security fault"),
    119: (Fault.DEVICE_ERROR, "the system processor of the device does not answer"),
    120: (Fault.DEVICE_ERROR, "error of the system processor of the device"),
    140: (Fault.DEVICE_POISONED, "memory error that was not recovered from"),
    143: (Fault.DEVICE_ERROR, "the device could not be initialised"),
    **dict.fromkeys(range(144, 151), (Fault.DEVICE_ERROR, "error of an NVLink")),
    154: (None, "what it takes to recover the device has changed"),
}


def place_on_bus(text: str) -> str:
    """``0000:3b:00`` of every spelling that the kernel, NVML and CUDA have for it."""
    *domain, bus, device = text.strip().lower().split(".")[0].split(":")
    return f"{int(domain[0], 16) if domain else 0:04x}:{int(bus, 16):02x}:{int(device, 16):02x}"


def trouble_of_xid(device: str, xid: int, words: str = "") -> Trouble:
    """A number that is not in the table is a note: most are the application's, or of interest to nobody here."""
    fault, meaning = XIDS.get(xid, (None, "not known here"))
    said = f": {words.strip()}" if words.strip() else ""
    return Trouble(place_on_bus(device), fault, f"Xid {xid} of device {place_on_bus(device)}, {meaning}{said}")


def xid_in(line: str) -> Trouble | None:
    """What a line of the kernel's log says of a device, if it does."""
    found = _XID_LINE.search(line)
    return None if found is None else trouble_of_xid(found[1], int(found[2]), found[3] or "")


def changes(before: DeviceReading | None, now: DeviceReading) -> list[Trouble]:
    """What a second look shows. What was there from the beginning is nobody's news."""
    if before is None or now.is_lost:
        was_lost = before is not None and before.is_lost
        return [] if was_lost or not now.is_lost else [_of(now, Fault.DEVICE_LOST, "NVML has lost the device")]
    found = []
    if (more := now.uncorrectable - before.uncorrectable) > 0:
        found.append(_of(now, Fault.DEVICE_POISONED, f"{more} uncorrectable memory errors more"))
    if now.has_remap_failed and not before.has_remap_failed:
        found.append(_of(now, Fault.DEVICE_ERROR, "a memory row could not be remapped"))
    if down := sorted(before.links - now.links):
        found.append(_of(now, Fault.DEVICE_ERROR, f"NVLink {', '.join(map(str, down))} went down"))
    if now.is_remap_pending and not before.is_remap_pending:
        found.append(_of(now, None, "a memory row will be remapped at the next reset"))
    if now.is_hot and not before.is_hot:
        found.append(_of(now, None, "its clocks are lowered because it is too hot"))
    return found


def _of(reading: DeviceReading, fault: Fault | None, what: str) -> Trouble:
    return Trouble(reading.device, fault, f"{what} (device {reading.device})")


_BY_WEIGHT = (None, Fault.DEVICE_ERROR, Fault.DEVICE_POISONED, Fault.DEVICE_LOST)


@dataclass
class Incidents:
    """Which troubles are new: a replacement must not be ended for what its predecessor was ended for."""

    ended: dict[str, tuple[int, float]] = field(default_factory=dict)
    noted: dict[tuple[str, str], float] = field(default_factory=dict)

    def is_news(self, trouble: Trouble, now: float) -> bool:
        """Of one fault the driver tells several things within seconds; a graver one is news all the same."""
        weight = _BY_WEIGHT.index(trouble.fault)
        if not weight:
            key = (trouble.device, trouble.evidence)
            is_known = now < self.noted.get(key, -_SAME_INCIDENT) + _SAME_INCIDENT
            self.noted[key] = now
            return not is_known
        known, when = self.ended.get(trouble.device, (0, now))
        if weight <= known and now < when + _SAME_INCIDENT:
            return False
        self.ended[trouble.device] = (weight, now)
        return True


def device_of(local_rank: int, visible: str | None, devices: Mapping[str, str]) -> str | None:
    """The device that a rank is taken to use before it has said so: the one of its number among those that
    ``CUDA_VISIBLE_DEVICES`` leaves, by number or UUID. ``devices``: UUID -> place on the bus, in order of the bus."""
    places = list(devices.values())
    if visible is not None:
        places = []
        for name in filter(None, map(str.strip, visible.split(","))):
            found = _named(name, devices)
            if found is None:
                break  # CUDA ignores whatever follows the first name that it does not know
            places.append(found)
    return places[local_rank % len(places)] if places else None


def _named(name: str, devices: Mapping[str, str]) -> str | None:
    if name.isdecimal():
        return list(devices.values())[int(name)] if int(name) < len(devices) else None
    matching = [place for uuid, place in devices.items() if uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else None
