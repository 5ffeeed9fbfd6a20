"""What speaks against an element, in words: how many of its ranks are unusual, in what, and how many others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.diagnose.diagnosis import Suspect
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.scan import Floats, Scanned
from megatron_flashrecovery.diagnose.standardization import Standardized
from megatron_flashrecovery.diagnose.telemetry import Metric
from megatron_flashrecovery.diagnose.topology import Indices, Topology
from megatron_flashrecovery.diagnose.trial import Trial

UNUSUAL = 2.0
"""One in forty healthy ranks is."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """``measured``: what the scores are made of; without it only scores can be told."""

    topology: Topology
    scanned: Scanned
    trial: Trial
    measured: Standardized | None = None

    def suspect(self, element: int, p: float | None = None) -> Suspect:
        """``p``: instead of that of the scan."""
        reach = self._measured_in_reach(element)
        summed = self.scanned.summed[self.scanned.length[element]]
        unusual = np.nan_to_num(summed) >= UNUSUAL
        return Suspect(
            element=self.topology.elements[element],
            p=float(self.scanned.p[element]) if p is None else p,
            score=float(self.scanned.score[element]),
            ranks=tuple(Rank(int(rank)) for rank in reach[unusual[reach]]),
            evidence=self._sentence(element, reach, unusual),
        )

    def leading_metric(self, element: int) -> Metric | None:
        """The only metric in which those in reach are unusual on average; None if there are none or several."""
        if self.measured is None:
            return None
        reach = self._measured_in_reach(element)
        high = [metric for metric in self.measured.z if np.mean(self._summed(metric, element)[reach]) >= UNUSUAL]
        return high[0] if len(high) == 1 else None

    def _measured_in_reach(self, element: int) -> Indices:
        reach = self.topology.ranks_of(element)
        found: Indices = reach[self.scanned.counted[reach]]
        return found

    def _sentence(self, element: int, reach: Indices, unusual: npt.NDArray[np.bool_]) -> str:
        inside, counted = reach[unusual[reach]], int(self.scanned.counted.sum())
        outside, others = int(unusual.sum()) - inside.size, counted - reach.size
        units = "hosts" if self._is_of_hosts else "ranks"
        if not inside.size:
            mean = float(np.mean(np.nan_to_num(self.scanned.summed[self.scanned.length[element]][reach])))
            return (
                f"none of its {reach.size} {units} is unusual by itself; their mean score is {mean:.2g}, and "
                f"{outside} of {others} others {_are(outside)} unusual"
            )
        whose = f"{inside.size} of {reach.size} {units} of {self.topology.elements[element]}"
        if reach.size == 1:
            own = int(self.topology.device_of[reach[0]])
            whose = str(self.topology.elements[own]) if self._is_of_hosts else f"rank {reach[0]}"
        doing = self._doing(element, inside, is_one=inside.size == 1)
        return f"{whose} {doing}, and {outside} of {others} others {_are(outside)} unusual"

    @property
    def _is_of_hosts(self) -> bool:
        """Whether its ranks are whole hosts (``hosts.of_hosts``)."""
        own = self.topology.device_of
        return bool(own.size) and all(k >= 0 and self.topology.elements[k].kind is Kind.HOST for k in own.tolist())

    def _doing(self, element: int, inside: Indices, is_one: bool) -> str:
        if self.measured is None:
            mean = float(np.mean(self.scanned.summed[self.scanned.length[element]][inside]))
            return f"{_are(inside.size)} unusual (mean score {mean:.2g})"
        metric = max(self.measured.z, key=lambda each: float(np.mean(self._summed(each, element)[inside])))
        newest = slice(-self._windows(element), None)
        own = _middle(self.measured.telemetry.values[metric][newest, inside])
        usual = _middle(self.measured.usual[metric][newest, inside])
        each = " in a window" if self.measured.telemetry.windows > 1 else ""
        end, their = ("s", "its") if is_one else ("", "their")
        match metric:
            case Metric.COMPUTE:
                return f"compute{end} {own / max(usual, 1e-9):.3g} times as long as {their} peers ({own:.3g} s a step)"
            case Metric.LATENESS:
                return f"come{end} {own:.3g} s after the first, {their} peers {usual:.3g} s"
            case Metric.RETRANSMITS:
                return f"sent {own:.3g} packets again{each}, {their} peers {usual:.3g}"
            case Metric.ERRORS:
                return f"{'has' if is_one else 'have'} {own:.3g} errors{each}, {their} peers {usual:.3g}"
            case Metric.SILENCE:
                return f"{'has' if is_one else 'have'} been silent for {own:.3g} s, {their} peers for {usual:.3g} s"

    def _summed(self, metric: Metric, element: int) -> Floats:
        """(ranks,) as scores are summed up; 0 where nothing is measured."""
        assert self.measured is not None
        newest = self.measured.z[metric][-self._windows(element) :]
        number = np.maximum(np.isfinite(newest).sum(axis=0), 1)
        found: Floats = np.nansum(newest, axis=0) / np.sqrt(number)
        return found

    def _windows(self, element: int) -> int:
        assert self.measured is not None
        lengths = self.trial.lengths(self.measured.telemetry.windows)
        return lengths[int(self.scanned.length[element])]


def _middle(values: Floats) -> float:
    return float(np.median(np.nanmean(values, axis=0)))


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
