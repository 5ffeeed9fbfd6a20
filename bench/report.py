"""Writes what a bench has measured to `bench/results/NAME.json`, and shows it with every miss marked.

What was measured on a machine with GPUs goes to `bench/results/gpu/`, beside the figures of one without.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from rich.console import Console
from rich.table import Table

from megatron_flashrecovery.runtime.summary import replace_file

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One number. Give at most one of ``at_most`` and ``at_least``; without either it is there to be read only."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        assert self.at_most is None or self.at_least is None, self

    @property
    def target(self) -> str | None:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return None if self.at_least is None else f">= {self.at_least:g}"

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least


def write(name: str, figures: Sequence[Figure], samples: Mapping[str, Sequence[float]]) -> Path:
    """``samples``: for each thing that was measured, every single measurement, so that a median can be checked."""
    report: dict[str, Any] = {
        "figures": [
            {"name": f.name, "value": f.value, "unit": f.unit, "target": f.target, "met": f.met} for f in figures
        ],
        "machine": machine(),
        "commit": commit(),
        "samples": samples,
    }
    folder = folder_of(report["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    replace_file(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    show(name, figures)
    return path


def folder_of(machine: Mapping[str, Any]) -> Path:
    return RESULTS / "gpu" if machine["gpu"] else RESULTS


def show(name: str, figures: Sequence[Figure]) -> None:
    table = Table("figure", "value", "unit", "target", "met", title=name)
    for figure in figures:
        met = {None: "", True: "[green]yes[/]", False: "[bold red]MISSED[/]"}[figure.met]
        table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, figure.target or "", met)
    Console(highlight=False).print(table)


def machine() -> dict[str, Any]:
    """What a reader needs in order to judge the figures; no host names."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def commit() -> str | None:
    """The commit that was measured, marked if the working tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
