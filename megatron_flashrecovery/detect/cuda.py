"""Which device of this machine a process computes on, as the driver names it."""

from __future__ import annotations

import torch


def place_of(device: torch.device) -> str:
    """Its place on the bus, or its UUID where torch does not tell that; empty for what is no CUDA device."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    if not all(hasattr(found, name) for name in names):
        return f"GPU-{str(found.uuid).removeprefix('GPU-')}"
    domain, bus, slot = (int(getattr(found, name)) for name in names)
    return f"{domain:04x}:{bus:02x}:{slot:02x}"
