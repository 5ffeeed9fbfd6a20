"""Where threads stand while the job is stopped, and how each of them is let go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import msgspec
import pytest

from megatron_flashrecovery.comm.parking import Answer, Interrupted, Proceed
from megatron_flashrecovery.core.ids import Epoch, GroupKey, NodeId, OrderNumber, Rank, Step
from megatron_flashrecovery.core.messages import ExecutePlan
from megatron_flashrecovery.core.reports import Match, Spot, Standing, Told
from megatron_flashrecovery.core.shares import Share, Source
from megatron_flashrecovery.detect.pulse import Pulse
from megatron_flashrecovery.runtime.parking_lot import AnswerMismatch, NoRecovery, ParkingLot, Stand
from megatron_flashrecovery.testing.cpu_device import device_error

T = TypeVar("T")
SPOT = Spot(GroupKey("data[0,1]#0"), "allreduce", 1)
PLAN = ExecutePlan(NodeId("n"), Epoch(1), OrderNumber(3), Step(4), True, (Share(Rank(0), Source.LIVE),))


class Lot(ParkingLot):
    """Tells when somebody stands."""

    def __init__(self, order_timeout: float = 5.0, pulse: Pulse | None = None) -> None:
        self.stood = threading.Semaphore(0)
        self.matched: list[Match] = []
        self.failures: list[str] = []
        super().__init__(order_timeout, self.stood.release, self.matched.extend, pulse, on_failure=self._note)

    def _note(self, spot: Spot, error: Exception) -> None:
        self.failures.append(f"{spot.operation}: {error}")


def in_background(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def told(operation: str, payload: bytes) -> Told:
    return Told(operation, msgspec.msgpack.encode([payload]), Step(5))


def test_nothing_stops_while_nothing_is_wrong() -> None:
    lot = Lot()
    assert lot.before(SPOT) == Proceed()
    lot.check()
    assert lot.stand is None


def test_a_stopped_thread_stands_before_its_operation_until_a_plan_unwinds_it() -> None:
    lot = Lot()
    lot.stop()
    parked = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    assert lot.stand == Stand(Standing.PARKED, SPOT)
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        parked.result(5)
    assert lot.stand is None
    assert lot.take_plan() == PLAN


class Recorded(Pulse):
    """Keeps what was waited for, one after the other."""

    def __init__(self) -> None:
        super().__init__(None)
        self.waits: list[str] = []

    def enter(self, group: str, operation: str) -> None:
        self.waits.append(operation)

    def leave(self) -> None:
        self.waits.append("")


def test_whoever_stands_is_not_busy() -> None:
    lot = Lot(pulse=(pulse := Recorded()))
    lot.stop()
    waiting = in_background(lambda: lot.wait_until(lambda: False, "a mirror"))
    assert lot.stood.acquire(timeout=5)
    assert pulse.waits == ["a mirror", "the order how to go on"]
    lot.get_out_of_the_way(advance=True, answer=None)
    assert lot.stood.acquire(timeout=5)
    assert pulse.waits[2:] == ["", "a mirror", "the order how to go on"]
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        waiting.result(5)
    assert pulse.waits[-1] == ""


def test_whose_operation_failed_waits_for_an_order() -> None:
    lot = Lot(order_timeout=0.01, pulse=(pulse := Recorded()))
    with pytest.raises(RuntimeError):
        lot.failed(SPOT, RuntimeError("the connection is gone"))
    assert pulse.waits == ["the order to stop", ""]


def test_an_advanced_thread_does_one_operation_and_stands_again() -> None:
    lot = Lot()
    lot.stop()
    parked = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    lot.get_out_of_the_way(advance=True, answer=None)
    assert lot.stand is None, "where it stood is over with the order, not only when the thread wakes up"
    assert parked.result(5) == Proceed()
    in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)


def test_an_answered_thread_gets_the_results_in_order_and_then_stands_again() -> None:
    lot = Lot()
    lot.begin_telling(Step(5))
    lot.stop()
    first = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    lot.get_out_of_the_way(advance=False, answer=(told("allreduce", b"1"), told("allreduce", b"2")))
    assert first.result(5) == Answer([b"1"])
    assert lot.before(SPOT) == Answer([b"2"])
    assert lot.answering, "the update may be written although the job is stopped"
    assert [each.payload for each in lot.told] == [told("", b"1").payload, told("", b"2").payload]
    in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)


def test_a_thread_that_matches_others_stands_afterwards_where_it_stood() -> None:
    lot = Lot()
    lot.stop()
    parked = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    match = Match(SPOT.group, b"", 3)
    lot.get_out_of_the_way(advance=False, answer=None, matches=(match,))
    assert lot.stood.acquire(timeout=5)
    assert lot.matched == [match]
    assert lot.stand == Stand(Standing.PARKED, SPOT)
    assert not parked.done()


def choke(lot: Lot, is_before_update: bool) -> None:
    with lot.discarding(lambda: is_before_update):
        raise ValueError("cannot convert float NaN to integer")


def test_what_chokes_on_void_contents_while_the_job_stops_stands_until_it_is_discarded() -> None:
    lot = Lot()
    lot.stop()
    choking = in_background(lambda: choke(lot, is_before_update=True))
    assert lot.stood.acquire(timeout=5)
    assert lot.stand == Stand(Standing.PARKED, None)
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        choking.result(5)


@pytest.mark.parametrize(("stops", "is_before_update"), [(False, True), (True, False)])
def test_what_fails_for_another_reason_is_raised(stops: bool, is_before_update: bool) -> None:
    lot = Lot()
    if stops:
        lot.stop()
    with pytest.raises(ValueError, match="NaN"):
        choke(lot, is_before_update)


def test_a_result_of_another_operation_is_never_taken() -> None:
    lot = Lot()
    lot.stop()
    parked = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    lot.get_out_of_the_way(advance=False, answer=(told("broadcast", b"1"),))
    with pytest.raises(AnswerMismatch):
        parked.result(5)


def test_a_failure_waits_for_the_order_to_stop() -> None:
    lot = Lot()
    caught = in_background(lambda: lot.failed(SPOT, RuntimeError("connection closed")))
    lot.stop()
    assert lot.stood.acquire(timeout=5)
    assert lot.stand == Stand(Standing.CAUGHT, SPOT)
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        caught.result(5)


def test_a_failure_that_nobody_else_saw_is_raised_as_it_was() -> None:
    with pytest.raises(RuntimeError, match="wrong shape"):
        Lot(order_timeout=0.01).failed(SPOT, RuntimeError("wrong shape"))


def test_a_failure_is_told_unless_the_order_to_stop_explains_it() -> None:
    lot = Lot()
    in_background(lambda: lot.failed(SPOT, RuntimeError("connection reset")))
    lot.stop()
    assert lot.stood.acquire(timeout=5)
    assert lot.failures == ["allreduce: connection reset"]
    in_background(lambda: lot.failed(SPOT, RuntimeError("severed")))
    assert lot.stood.acquire(timeout=5)
    assert len(lot.failures) == 1


def test_a_device_that_fails_while_the_job_stops_ends_its_process() -> None:
    lot = Lot()
    lot.stop()
    with pytest.raises(RuntimeError, match="illegal memory access"), lot.discarding(lambda: True):
        raise device_error(700)


def test_while_a_plan_is_carried_out_operations_go_ahead() -> None:
    lot = Lot()
    lot.stop()
    lot.execute(PLAN)
    lot.take_plan()
    assert lot.before(SPOT) == Proceed()
    lot.resume()
    assert not lot.stopping


def test_a_loss_during_a_plan_stops_its_operations_too() -> None:
    lot = Lot()
    lot.stop()
    lot.execute(PLAN)
    lot.take_plan()
    lot.stop()
    in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)


def test_a_plan_that_another_loss_has_overtaken_is_not_begun() -> None:
    lot = Lot()
    lot.stop()
    lot.execute(PLAN)
    lot.stop()
    taken = in_background(lot.take_plan)
    assert lot.stood.acquire(timeout=5)
    lot.execute(PLAN)
    assert taken.result(5) == PLAN


@pytest.mark.parametrize(
    ("answer", "matches"),
    [(None, ()), ((told("allreduce", b"7"),), ()), (None, (Match(SPOT.group, b"", 3),))],
    ids=["advance", "answer", "matches"],
)
def test_an_order_that_another_loss_overtakes_leaves_the_thread_where_it_stood(answer, matches) -> None:
    lot = Lot()
    lot.stop()
    parked = in_background(lambda: lot.before(SPOT))
    assert lot.stood.acquire(timeout=5)
    with lot._changed:  # so that both come before the thread can have woken
        lot.get_out_of_the_way(advance=not matches, answer=answer, matches=matches)
        assert lot.stand is None
        lot.stop()
    assert lot.stand == Stand(Standing.PARKED, SPOT)
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        parked.result(5)
    assert lot.stand is None
    assert not lot.matched


def test_a_replacement_whose_plan_is_overtaken_before_it_has_woken_stands_and_takes_the_next_one() -> None:
    lot = Lot()
    joined = in_background(lambda: (lot.wait_for_plan(), lot.take_plan())[1])
    with lot._changed:
        lot.execute(PLAN)
        lot.stop()
    assert lot.stood.acquire(timeout=5)
    assert lot.stand == Stand(Standing.PARKED, None)
    lot.execute(PLAN)
    assert joined.result(5) == PLAN


def test_whoever_waits_is_stopped_too() -> None:
    lot = Lot()
    waiting = in_background(lambda: lot.wait_until(lambda: False, "nothing"))
    lot.stop()
    assert lot.stood.acquire(timeout=5)
    lot.execute(PLAN)
    with pytest.raises(Interrupted):
        waiting.result(5)


def test_waiting_has_an_end_and_says_what_for() -> None:
    with pytest.raises(NoRecovery, match="a mirror"):
        Lot().wait_until(lambda: False, "a mirror", timeout=0.01)


def test_results_are_kept_since_the_gate_before_last() -> None:
    lot = Lot()
    for step in (4, 5, 6):
        lot.begin_telling(Step(step))
        lot.completed(SPOT, [bytes([step])])
        lot.end_telling()
        lot.completed(SPOT, [b"not of an update"])
    assert [each.step for each in lot.told] == [5, 6]
