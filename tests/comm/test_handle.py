"""What a handle does around an operation: ask, count, issue, wait, report, and ask again when it failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d

from megatron_flashrecovery.comm.communicator import GroupIdentity, Severed, sever_together
from megatron_flashrecovery.comm.handle import FlashGroup, NotRepeatable
from megatron_flashrecovery.comm.parking import Answer, Interrupted, Proceed
from megatron_flashrecovery.comm.whereabouts import Whereabouts
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import GroupKey, Rank, Step
from megatron_flashrecovery.core.reports import PairCount, Spot
from megatron_flashrecovery.testing.faulty_communicator import FaultyCommunicator, WouldDeadlock
from megatron_flashrecovery.testing.parking import FakeParking

CPU = torch.device("cpu")
KEY = GroupKey("pair[3,5]#0")


class Rig:
    """A handle over a communicator of NCCL's kind, whose replacement is a fresh one that completes everything."""

    def __init__(self, **decisions: Any) -> None:
        self.parking = FakeParking(**decisions)
        self.whereabouts = Whereabouts()
        self.first = FaultyCommunicator()
        self.made: list[FaultyCommunicator] = []
        identity = GroupIdentity(KEY, (Rank(3), Rank(5)), 0, (("cpu", "gloo"),), timedelta(seconds=5))
        self.group = FlashGroup(identity, self.parking, self.whereabouts, self._make)

    def _make(self, _group: FlashGroup) -> Any:
        self.made.append(self.first if not self.made else FaultyCommunicator())
        if len(self.made) > 1:
            self.made[-1].release()
        return self.made[-1]

    def sever_once_inside(self) -> threading.Thread:
        """A thread that severs the first communicator as soon as somebody is blocked in it."""

        def watch() -> None:
            while self.whereabouts.standing() is None or not self.first.inner.works:
                threading.Event().wait(0.001)
            sever_together([self.first], "rank 5 is lost")

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    def sever_replacement(self, spot: Spot, error: Exception) -> Proceed:
        self.replace(spot, error)
        self.group.live().severed = "rank 5 is lost again"
        return Proceed()

    def replace(self, _spot: Spot, _error: Exception) -> Proceed:
        self.group.disconnect()
        self.group.ledger.begin()
        return Proceed()


def test_an_aborted_reduction_is_not_believed_though_it_returned():
    rig = Rig()
    tensor = torch.tensor([1.0, 2.0])
    thread = rig.sever_once_inside()
    with pytest.raises(Severed, match="rank 5 is lost"):
        rig.group.allreduce([tensor])
    thread.join()
    assert rig.parking.results == []
    count = rig.group.ledger.count()
    assert (count.issued, count.completed, count.broken) == (1, 0, "rank 5 is lost")


def test_a_retried_reduction_starts_from_the_inputs_and_not_from_the_garbage():
    rig = Rig()
    rig.parking.failing = rig.replace
    tensor = torch.tensor([1.0, 2.0])
    thread = rig.sever_once_inside()
    rig.group.allreduce([tensor])
    thread.join()
    assert tensor.tolist() == [1.0, 2.0]
    assert [results for _, results in rig.parking.results] == [(bytes(torch.tensor([1.0, 2.0]).numpy()),)]
    assert (rig.group.ledger.count().issued, rig.group.ledger.count().completed) == (1, 1)


def test_a_large_reduction_in_place_is_never_retried():
    rig = Rig()
    rig.parking.failing = rig.replace
    rig.first.severed = "rank 5 is lost"
    with pytest.raises(NotRepeatable, match="no copy is kept"):
        rig.group.allreduce([torch.ones(1000)])


def test_a_work_that_a_recovery_discarded_is_never_believed():
    rig = Rig()
    work = rig.group.allreduce([torch.ones(1000)])
    rig.group.disconnect()
    with pytest.raises(Severed, match="discarded"):
        work.wait()
    assert rig.parking.failures == []


def test_a_retry_that_fails_too_asks_again():
    rig = Rig()
    verdicts: list[Any] = [rig.sever_replacement, rig.replace]
    rig.parking.failing = lambda spot, error: verdicts.pop(0)(spot, error)
    rig.first.severed = "rank 5 is lost"
    rig.group.allreduce([torch.ones(1)])
    assert len(rig.parking.failures) == 2
    assert [len(each.inner.calls) for each in rig.made] == [0, 0, 1]


def test_a_gather_that_failed_at_its_wait_is_issued_again():
    rig = Rig()
    rig.parking.failing = rig.replace
    work = rig.group.all_gather_single(torch.zeros(2000), torch.ones(1000))
    sever_together([rig.first], "rank 5 is lost")
    assert work.wait()
    assert rig.made[1].inner.calls == ["all_gather_single"]


def test_an_answer_fills_the_outputs_and_issues_nothing():
    payload = bytes(torch.tensor([7.0]).numpy())
    rig = Rig(entering=lambda spot: Answer([payload]))
    tensor = torch.tensor([1.0])
    assert rig.group.allreduce([tensor]).wait()
    assert tensor.item() == 7.0
    assert rig.made == []
    assert rig.group.ledger.count().issued == 0


def test_an_answer_after_a_failure_ends_the_operation():
    payload = bytes(torch.tensor([7.0]).numpy())
    rig = Rig(failing=lambda spot, error: Answer([payload]))
    tensor = torch.tensor([1.0])
    thread = rig.sever_once_inside()
    rig.group.allreduce([tensor])
    thread.join()
    assert tensor.item() == 7.0


def test_interrupted_passes_through_untouched():
    def interrupt(spot: Spot) -> Proceed:
        raise Interrupted(Step(4))

    with pytest.raises(Interrupted):
        Rig(entering=interrupt).group.allreduce([torch.ones(1)])


def test_waiting_for_a_stream_is_not_completion():
    rig = Rig()
    work = rig.group.allreduce([torch.ones(1000)])
    assert work.wait()
    rig.group.ledger.refresh()
    assert rig.group.ledger.count().completed == 0
    rig.first.release()
    rig.group.ledger.refresh()
    assert rig.group.ledger.count().completed == 1
    assert not rig.group.ledger.has_outstanding


def test_an_operation_that_an_abort_completed_stays_open():
    rig = Rig()
    rig.group.allreduce([torch.ones(1000)])
    sever_together([rig.first], "rank 5 is lost")
    rig.group.ledger.refresh()
    count = rig.group.ledger.count()
    assert (count.completed, count.broken) == (0, "rank 5 is lost")


def test_a_batch_goes_to_the_backend_as_one_and_parks_at_one_spot():
    rig = Rig()
    rig.first.release()
    with c10d._coalescing_manager(rig.group, CPU, async_ops=True) as manager:
        rig.group.send([torch.ones(1)], 1, 0)
        rig.group.recv([torch.ones(1)], 1, 0)
    manager.wait()
    assert rig.first.inner.calls == ["start", "send", "recv", "end"]
    assert rig.parking.entered == [Spot(KEY, "batch", 0, (Rank(5),), (Rank(5),))]
    rig.group.ledger.refresh()
    assert rig.group.ledger.count().pairs == {Rank(5): PairCount(sent=1, received=1, open=0)}


def test_a_single_send_would_deadlock_here_so_the_test_above_proves_something():
    with pytest.raises(WouldDeadlock):
        Rig().group.send([torch.ones(1)], 1, 0)


@pytest.mark.parametrize("name", ["split_group", "merge_remote_group"])
def test_what_would_tie_groups_together_is_refused(name):
    with pytest.raises(ConfigError, match="use new_group"):
        getattr(Rig().group, name)([0])


@pytest.mark.parametrize(
    ("issue", "same"),
    [
        pytest.param(lambda group: group.allreduce([torch.ones(2, 2)]), True, id="same-numel"),
        pytest.param(lambda group: group.allreduce([torch.ones(5)]), False, id="other-size"),
        pytest.param(lambda group: group.allreduce([torch.ones(4, dtype=torch.int32)]), False, id="other-dtype"),
        pytest.param(lambda group: group.all_gather_single(torch.ones(8), torch.ones(4)), False, id="other-name"),
    ],
)
def test_the_digest_tells_collectives_apart(issue: Callable[[Any], Any], same: bool):
    digests = []
    for each in (lambda group: group.allreduce([torch.ones(4)]), issue):
        rig = Rig()
        rig.first.release()
        each(rig.group)
        digests.append(rig.group.ledger.count().digest)
    assert (digests[0] == digests[1]) == same
