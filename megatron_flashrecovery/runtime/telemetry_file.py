"""Measurements of a site's own counters, from a file: JSON lines, or CSV with a header. docs/diagnose.md describes it.

{"time": 1764000000.0, "metric": "switch port errors", "like": "errors", "host": "n17", "value": 12, "seconds": 60}
{"time": 1764000000.0, "metric": "kernel time", "like": "compute", "rank": 3, "value": 0.0123}
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose.telemetry import NATURE, Metric
from megatron_flashrecovery.runtime.dossier import Dossier, Sample

_FIELDS = frozenset({"time", "metric", "like", "value", "seconds", "rank", "host"})


def read_telemetry(path: Path, dossier: Dossier) -> tuple[Sample, ...]:
    """In order of time. Raises ``ConfigError`` that names the line and the remedy."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--telemetry {path} cannot be read: {error}") from None
    rows = _of_csv(text) if path.suffix == ".csv" else _of_json(path, text)
    hosts = {host.partition(".")[0]: host for host in dossier.host_of.values()}
    hosts |= {host: host for host in dossier.host_of.values()}
    samples = []
    for number, row in rows:
        try:
            samples.append(_sample(row, dossier, hosts))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"--telemetry {path} line {number}: {reason}") from None
    if not samples:
        raise ConfigError(f"--telemetry {path} has no measurement: give time, metric, value, and rank or host")
    return tuple(sorted(samples, key=lambda sample: sample.time))


def _of_csv(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        yield number, {key: value for key, value in row.items() if value not in (None, "")}


def _of_json(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            remedy = "give one JSON object for each line, or name the file .csv"
            raise ConfigError(f"--telemetry {path} line {number} is no JSON ({error.msg}): {remedy}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"--telemetry {path} line {number} is no JSON object")
        yield number, row


def _sample(row: Mapping[str, Any], dossier: Dossier, hosts: Mapping[str, str]) -> Sample:
    if unknown := row.keys() - _FIELDS:
        raise ValueError(f"there is no field {min(map(str, unknown))}: it has {', '.join(sorted(_FIELDS))}")
    time, value = _number(row, "time"), _number(row, "value")
    if value < 0:
        raise ValueError(f"value is {value:g}: give what is bad if it is high, and never negative")
    label, metric = str(row["metric"]), _like(str(row.get("like", row["metric"])))
    seconds = _number(row, "seconds") if NATURE[metric].is_count else 0.0
    if NATURE[metric].is_count and seconds <= 0:
        raise ValueError(f"seconds is {seconds:g}: give for how long it was counted")
    if ("rank" in row) == ("host" in row):
        raise ValueError("give rank or host, one of them")
    if "rank" in row:
        rank = Rank(int(row["rank"]))
        if rank not in dossier.host_of:
            raise ValueError(f"there is no rank {rank} in a job of {dossier.world}")
        return Sample(time, label, metric, {rank: value}, seconds=seconds)
    host = str(row["host"])
    known = hosts.get(host) or hosts.get(host.partition(".")[0])
    if known is None:
        raise ValueError(f"no rank of this job sits on host {host}: leave it out, or name it as `hostname` does there")
    return Sample(time, label, metric, {}, known, value, seconds)


def _like(name: str) -> Metric:
    try:
        return Metric(name)
    except ValueError:
        raise ValueError(f"{name} is no kind of metric: say what it is like, one of {', '.join(Metric)}") from None


def _number(row: Mapping[str, Any], name: str) -> float:
    try:
        number = float(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {row[name]!r}: give a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {row[name]!r}: give a finite number")
    return number
