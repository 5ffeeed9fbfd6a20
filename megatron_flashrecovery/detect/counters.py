"""Counters that the kernel keeps of a machine's links: TCP, network interfaces, and InfiniBand ports.

Those of TCP and of interfaces are memory of the kernel, and reading them never waits. Those of InfiniBand ports are
asked of the device's firmware, which may never answer: only a process that nobody waits for reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_NBYTES = 4096
_INTERFACE = ("rx_errors", "tx_errors", "rx_crc_errors", "rx_missed_errors", "tx_carrier_errors")
INFINIBAND = Path("/sys/class/infiniband")
_PORT = (
    "counters/symbol_error",
    "counters/link_error_recovery",
    "counters/link_downed",
    "counters/port_rcv_errors",
    "counters/port_xmit_discards",
    "counters/local_link_integrity_errors",
    "hw_counters/packet_seq_err",
    "hw_counters/out_of_sequence",
    "hw_counters/local_ack_timeout_err",
    "hw_counters/rnr_nak_retry_err",
)


class NetworkCounters:
    """Of this machine, or rather of the network namespace of this process. Files stay open: opening is what costs."""

    def __init__(self, proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> None:
        self._snmp = _opened({"tcp": proc / "net/snmp"})
        self._files = _opened(dict(_interfaces(sysfs / "class/net")))

    def read(self) -> dict[str, int]:
        found = _numbers(self._files)
        for descriptor in self._snmp.values():
            with suppress(OSError, ValueError, KeyError):  # a sandbox that shows only some of it
                found.update(_of_tcp(os.pread(descriptor, _NBYTES, 0)))
        return found

    def close(self) -> None:
        for descriptor in (*self._snmp.values(), *self._files.values()):
            os.close(descriptor)


class PortCounters:
    """Of all InfiniBand and RoCE ports."""

    def __init__(self, root: Path = INFINIBAND) -> None:
        self._files = _opened(
            {
                f"ib.{port.parent.parent.name}/{port.name}.{Path(name).name}": port / name
                for port in sorted(root.glob("*/ports/*"))
                for name in _PORT
            }
        )

    def read(self) -> dict[str, int]:
        return _numbers(self._files)


def _interfaces(root: Path) -> Iterator[tuple[str, Path]]:
    """Of real devices; in a container there may be none, then of all that are not local."""
    names = sorted(path.name for path in root.glob("*") if path.name != "lo")
    real = [name for name in names if (root / name / "device").exists()]
    for name in real or names:
        for counter in _INTERFACE:
            yield f"nic.{name}.{counter}", root / name / "statistics" / counter
        yield f"nic.{name}.carrier_changes", root / name / "carrier_changes"


def _opened(paths: Mapping[str, Path]) -> dict[str, int]:
    found = {}
    for name, path in paths.items():
        with suppress(OSError):  # this kernel or device has no such counter
            found[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return found


def _numbers(files: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name, descriptor in files.items():
        with suppress(OSError, ValueError):  # the device is gone, or does not know
            found[name] = int(os.pread(descriptor, _NBYTES, 0))
    return found


def _of_tcp(text: bytes) -> dict[str, int]:
    names, values = [line.split() for line in text.splitlines() if line.startswith(b"Tcp:")]
    counters = dict(zip(names, values, strict=True))
    return {"tcp.sent": int(counters[b"OutSegs"]), "tcp.retransmitted": int(counters[b"RetransSegs"])}
