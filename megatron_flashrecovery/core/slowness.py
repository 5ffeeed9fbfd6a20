"""Who is slow: whose own computing takes longer than that of its peers, in some windows in a row.

Data-parallel peers compute the same on other data, so each is compared with the median of the others: a slow pipeline
stage is slow on all of them, and nobody's fault. Waiting is not counted, for whoever waits is a victim. A rank without
peers is compared with its own past, and with what has become of the others meanwhile: a larger batch makes all slower.

Nothing follows from it but a note: a slow rank costs time, and who is to blame is another question.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron_flashrecovery.core.ids import NodeId, Rank, Step
from megatron_flashrecovery.core.messages import StepsTimed
from megatron_flashrecovery.core.policy import Action, Fault, History, decide

WINDOWS = 5
"""In a row: a window is a second, or a step where that takes longer."""
_LEAST = 0.01
"""Seconds of a step: less than that is the scheduler's, not the rank's."""
_SPREADS = 4.0
_NORMAL = 1.4826
"""What makes the median of the distances a standard deviation, where there is noise only."""
_PAST = 8
_KEPT = 32
_DRIFT_EVERY = 1.0


@dataclass
class OwnTimes:
    """What the nodes have said since the epoch began. ``slow`` says who is, with the evidence; ``contrary`` counts for
    how many windows in a row a rank was the opposite of what it is said to be."""

    heard: dict[NodeId, Step] = field(default_factory=dict)
    newest: dict[Rank, float] = field(default_factory=dict)
    past: dict[Rank, deque[float]] = field(default_factory=dict)
    contrary: Counter[Rank] = field(default_factory=Counter)
    slow: dict[Rank, str] = field(default_factory=dict)
    drift: tuple[float, float] | None = None
    """What has become of those without peers, and when it was computed."""

    def note(self, event: StepsTimed, peers_of: Mapping[Rank, Sequence[Rank]], factor: float, now: float) -> None:
        """What a node says late, or twice, changes nothing. ``factor`` 0: nobody is said to be slow."""
        if event.step <= self.heard.get(event.node, Step(-1)) or not factor:
            return
        self.heard[event.node] = event.step
        self.newest.update(event.computed)
        for rank, seconds in event.computed.items():
            others = [self.newest[peer] for peer in peers_of.get(rank, ()) if peer != rank and peer in self.newest]
            if others:
                self._judge(rank, seconds, _Usual.of_peers(others), event.step, factor)
            elif not any(peer != rank for peer in peers_of.get(rank, ())):
                self._compare_with_past(rank, seconds, event.step, factor, now)

    def easing(self) -> dict[Rank, int]:
        """Of those that are said to be slow: for how many windows in a row they were not. ``WINDOWS`` end it."""
        return {rank: self.contrary[rank] for rank in self.slow if self.contrary[rank]}

    def _compare_with_past(self, rank: Rank, seconds: float, step: Step, factor: float, now: float) -> None:
        past = self.past.setdefault(rank, deque(maxlen=_KEPT))
        is_over = False
        if len(past) >= _PAST:
            is_over = self._judge(rank, seconds, _Usual.of_past(past, self._drift(now)), step, factor)
        if not is_over:
            past.append(seconds)

    def _judge(self, rank: Rank, seconds: float, usual: _Usual, step: Step, factor: float) -> bool:
        is_slow = rank in self.slow
        # Half the way back to the others: whoever is near the limit is not now slow and now not.
        is_over = usual.is_exceeded_by(seconds, 1 + (factor - 1) / 2 if is_slow else factor)
        if is_over == is_slow:
            del self.contrary[rank]
            if is_slow:
                self.slow[rank] = _evidence(seconds, usual, step)  # up to this step, for whoever asks
            return is_over
        self.contrary[rank] += 1
        if self.contrary[rank] >= WINDOWS:
            del self.contrary[rank]
            if is_slow:
                del self.slow[rank]
            elif decide(Fault.SLOW, History()).action is Action.NOTE:
                self.slow[rank] = _evidence(seconds, usual, step)
        return is_over

    def _drift(self, now: float) -> float:
        """A median over all who have no peers, so not for every event."""
        if self.drift is None or now >= self.drift[1] + _DRIFT_EVERY:
            changes = [self.newest[rank] / median(past) for rank, past in self.past.items() if past and median(past)]
            self.drift = max(1.0, median(changes)) if len(changes) > 2 else 1.0, now
        return self.drift[0]


@dataclass(frozen=True)
class _Usual:
    seconds: float
    spread: float
    whose: str

    @classmethod
    def of_peers(cls, others: Sequence[float]) -> _Usual:
        return cls(
            median(others), _spread(others), f"{'its peer' if len(others) == 1 else f'its {len(others)} peers'} for"
        )

    @classmethod
    def of_past(cls, past: Sequence[float], drift: float) -> _Usual:
        return cls(median(past) * drift, _spread(past) * drift, "before")

    def is_exceeded_by(self, seconds: float, factor: float) -> bool:
        over = seconds - self.seconds
        return seconds > factor * self.seconds and over > max(_LEAST, _SPREADS * self.spread)

    def __str__(self) -> str:
        return f"{self.whose} {self.seconds:.3g} s"


def _evidence(seconds: float, usual: _Usual, step: Step) -> str:
    return f"it computes for {seconds:.3g} s in a step, {usual}, up to step {step}"


def _spread(values: Sequence[float]) -> float:
    """Of three or more; fewer have none."""
    if len(values) < 3:
        return 0.0
    middle = median(values)
    return _NORMAL * median(abs(value - middle) for value in values)
