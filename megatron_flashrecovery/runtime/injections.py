"""The faults that the ranks of one node are told to inflict, from the start on or since, and which of them happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.detect.out_of_memory import why_no_limit
from megatron_flashrecovery.runtime.dialogue import InjectionFired, InjectionOrder
from megatron_flashrecovery.runtime.injection import KINDS, Fault, Injection, is_always, option
from megatron_flashrecovery.runtime.node_messages import InjectionNoted


class Injections:
    """The agent's. What a rank does to its agent happens here. ``ranks`` are those that the node begins with: what has
    become of others elsewhere is not known here."""

    def __init__(self, asked_for: Sequence[Injection], ranks: Collection[Rank]) -> None:
        self._asked_for = list(asked_for)
        self._of_the_start = len(self._asked_for)
        self._ranks = frozenset(ranks)
        self._fired: set[int] = set()
        self._under_recovery: set[Rank] = set()
        self._mute_until = 0.0

    def accept(self, spec: str) -> tuple[Rank, InjectionOrder] | str:
        """What a rank is to be told, or why it cannot be done here."""
        try:
            injection = Injection.parse(spec, is_live=True)
            refuse_impossible([injection])
        except ConfigError as error:
            return str(error)
        self._asked_for.append(injection)
        return injection.rank, _order(len(self._asked_for) - 1, injection)

    def orders(self, rank: Rank) -> tuple[InjectionOrder, ...]:
        """Those of this rank that have not fired. Of several for the same moment a worker does only the first: the next
        one is for its replacement."""
        return tuple(
            _order(index, injection)
            for index, injection in enumerate(self._asked_for)
            if injection.rank == rank and (is_always(injection.options) or index not in self._fired)
        )

    def note_under_recovery(self, rank: Rank) -> None:
        """Its script has asked for recovery, and so marks the moments of its steps."""
        self._under_recovery.add(rank)

    def never_happened(self) -> list[str]:
        """Each with the reason, for people."""
        return [
            f"{injection} never happened: {self._why_never(injection.rank)}"
            for index, injection in enumerate(self._asked_for)
            if index not in self._fired and (injection.rank in self._ranks or index >= self._of_the_start)
        ]

    def _why_never(self, rank: Rank) -> str:
        if rank in self._under_recovery:
            return "the job did not come there"
        return "the script never asked for recovery (is --enable-flash-recovery among its flags?), and marks no moments"

    def note_fired(self, fired: InjectionFired) -> tuple[list[InjectionNoted], bool]:
        """Said by the worker, perhaps more than once; the agent's part is done now. For the record, and whether the
        worker ends by it."""
        injection = self._asked_for[fired.index]
        if fired.index in self._fired:
            return [], not KINDS[injection.fault].is_survived
        self._fired.add(fired.index)
        match injection.fault:
            case Fault.AGENT:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.DROP_HEARTBEATS:
                seconds = option(injection.fault, injection.options, "seconds")
                self._mute_until = time.monotonic() + float(seconds)
        noted = InjectionNoted(injection.rank, str(injection), fired.time)
        return [noted], not KINDS[injection.fault].is_survived

    def are_heartbeats_dropped(self) -> bool:
        return time.monotonic() < self._mute_until


def refuse_impossible(injections: Sequence[Injection]) -> None:
    """Raises ``ConfigError`` for what this machine would suffer from."""
    for injection in injections:
        if injection.fault is Fault.OOM and (why := why_no_limit()) is not None:
            raise ConfigError(f"--inject {injection}: {why}")


def _order(index: int, injection: Injection) -> InjectionOrder:
    at = None if injection.at is None else injection.at.value
    return InjectionOrder(index, injection.fault.value, injection.step, at, dict(injection.options))
