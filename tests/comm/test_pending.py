"""What a thread that waits for a point-to-point operation does when the main thread gives that attempt up."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from megatron_flashrecovery.comm.pending import PendingWork

TIMEOUT = 10.0


class Transport:
    """Its works end when they are told to."""

    host_synchronous = True

    def __init__(self, error: str = "") -> None:
        self.may_end = threading.Event()
        self._error = error

    def finish(self, work: object) -> None:
        assert self.may_end.wait(TIMEOUT)
        if self._error:
            raise RuntimeError(self._error)


class Carrier:
    severed = None
    closed = False

    def __init__(self, error: str = "") -> None:
        self.default = Transport(error)

    def transport(self, tensors: object) -> Transport:
        return self.default


class Ledger:
    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def complete(self, entry: object) -> None:
        self.told.append(("complete", entry))

    def fail(self, entry: object, reason: str) -> None:
        self.told.append((reason, entry))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def work(ledger: Ledger) -> PendingWork:
    call = SimpleNamespace(name="recv", inputs=(), outputs=())
    return PendingWork(SimpleNamespace(ledger=ledger), [call], SimpleNamespace(operation="recv"), None)


def drained(work: PendingWork) -> threading.Thread:
    work.drain()
    assert work._waiter is not None
    return work._waiter


@pytest.mark.parametrize("error", ["", "connection reset"])
def test_the_end_of_an_operation_is_told(work, ledger, error):
    carrier = Carrier(error)
    work.begin(carrier, "entry", [object()])
    carrier.default.may_end.set()
    drained(work).join(TIMEOUT)
    assert ledger.told == [(error or "complete", "entry")]


def test_an_attempt_that_is_abandoned_before_the_thread_has_begun_is_let_be(work, ledger, monkeypatch):
    """Found by ranks that failed one after the other: the thread died of an assertion."""
    work.begin(Carrier(), "entry", [object()])
    late: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: late.append(thread))
    thread = drained(work)
    monkeypatch.undo()
    work.abandon()
    start(thread)
    thread.join(TIMEOUT)
    assert ledger.told == []
    assert late == [thread]


@pytest.mark.parametrize("error", ["", "connection reset"])
def test_the_end_of_an_abandoned_attempt_says_nothing_of_the_next(work, ledger, error):
    first, second = Carrier(error), Carrier()
    work.begin(first, "first", [object()])
    old = drained(work)
    work.abandon()
    work.begin(second, "second", [object()])
    first.default.may_end.set()
    old.join(TIMEOUT)
    assert [told for told in ledger.told if told[1] == "second"] == []
    assert ("connection reset", "first") not in ledger.told
    second.default.may_end.set()
    drained(work).join(TIMEOUT)
    assert ledger.told[-1] == ("complete", "second")
