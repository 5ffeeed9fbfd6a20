"""The measurements of a dossier as tables: one for each metric, windows by ranks or by hosts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.slowness import WINDOWS
from megatron_flashrecovery.diagnose.telemetry import NATURE, Metric
from megatron_flashrecovery.runtime.dossier import LONGEST, OWN_TIME, Dossier, Sample, alarm_of

Values = npt.NDArray[np.float64]
_MOST_WINDOWS = 16
_LEAST_SECONDS = 1.0
_RECENT = 600.0
_TOLD_AT_LEAST_EVERY = 90.0
"""Seconds: who says nothing for a minute takes as long as before (``core.timing``)."""


@dataclass(frozen=True)
class Period:
    """Unix time."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def edges(self) -> Values:
        number = int(min(_MOST_WINDOWS, max(1, self.seconds // _LEAST_SECONDS)))
        return np.linspace(self.start, self.end, number + 1)


@dataclass(frozen=True, eq=False)
class Measured:
    """``values``: (windows, units), the units being ranks or, ``of_hosts``, the hosts in the order in which they are
    given; NaN where nothing was measured. High is bad."""

    label: str
    metric: Metric
    values: Values
    of_hosts: bool


def period_of(dossier: Dossier, last: float | None = None) -> Period:
    """The ``last`` seconds of the record; else the newest time in which somebody was slow, with the windows that led to
    the alarm, or its last hour; else the last ten minutes."""
    if last is not None:
        return Period(dossier.end - last, dossier.end)
    if (alarm := alarm_of(dossier.slow)) is None:
        return Period(max(dossier.start, dossier.end - _RECENT), dossier.end)
    time, rank = alarm.time, alarm.rank
    told = [each.time for each in dossier.samples if each.label == OWN_TIME and rank in each.values]
    before = [when for when in told if when <= time][-WINDOWS - 1 :]
    # What is told at the very end of a window belongs to it.
    newest = max((each.time for each in dossier.samples if each.label == OWN_TIME), default=time)
    end = max(time, newest if alarm.over is None else min(alarm.over, newest))
    return Period(max(before[0] if before else time - WINDOWS, end - LONGEST), end)


def tables_of(
    dossier: Dossier, samples: Iterable[Sample], period: Period, hosts: Sequence[str]
) -> tuple[Measured, ...]:
    """In the order in which they first come up. What is told of a count up to ten minutes behind the period may be of
    it."""
    by_label: dict[tuple[str, Metric, bool], list[Sample]] = {}
    for sample in samples:
        if sample.time - sample.seconds < period.end:
            by_label.setdefault((sample.label, sample.metric, bool(sample.host)), []).append(sample)
    number_of = {host: number for number, host in enumerate(hosts)}
    found = []
    for (label, metric, of_hosts), those in by_label.items():
        units = len(hosts) if of_hosts else dossier.world
        rows = [(each, _by_unit(each, number_of)) for each in those]
        if NATURE[metric].is_count:
            values = _counts(rows, period, units)
        else:
            values = _means(rows, period, units, _TOLD_AT_LEAST_EVERY if label == OWN_TIME else 0.0)
        if np.isfinite(values).any():
            found.append(Measured(label, metric, values, of_hosts))
    return tuple(found)


def _by_unit(sample: Sample, number_of: Mapping[str, int]) -> dict[int, float]:
    if sample.host:
        return {number_of[sample.host]: sample.value}
    return {int(rank): value for rank, value in sample.values.items()}


def _counts(rows: Iterable[tuple[Sample, Mapping[int, float]]], period: Period, units: int) -> Values:
    """(1, units) of what was counted: who said nothing has counted nothing. A slow growth is told once in ten minutes
    for all of them, so smaller windows would be a matter of luck."""
    total = np.zeros((1, units))
    for sample, values in rows:
        within = min(sample.time, period.end) - max(sample.time - sample.seconds, period.start)
        if within > 0:
            for unit, number in values.items():
                total[0, unit] += number * within / sample.seconds
    return total if total.any() else np.full((1, units), np.nan)


def _means(
    rows: Sequence[tuple[Sample, Mapping[int, float]]], period: Period, units: int, carried_for: float
) -> Values:
    """(windows, units); what was told before a window stands for it for so many seconds, if nothing is told in it."""
    edges = period.edges()
    windows = len(edges) - 1
    total, number = np.zeros((windows, units)), np.zeros((windows, units))
    newest, told_at = np.full((windows + 1, units), np.nan), np.full((windows + 1, units), -np.inf)
    for sample, values in rows:
        if sample.time > edges[-1]:
            continue
        # Window k ends with edge k + 1; 0 in ``newest`` is what came before the period.
        window = int(np.searchsorted(edges, sample.time, side="left"))
        for unit, value in values.items():
            newest[window, unit], told_at[window, unit] = value, sample.time
            if window:
                total[window - 1, unit] += value
                number[window - 1, unit] += 1
    with np.errstate(invalid="ignore"):
        means = total / number
    last, when = newest[0], told_at[0]
    for k in range(windows):
        missing = number[k] == 0
        is_recent = edges[k] - when <= carried_for
        means[k, missing & is_recent] = last[missing & is_recent]
        last, when = np.where(missing, last, newest[k + 1]), np.where(missing, when, told_at[k + 1])
    return means
