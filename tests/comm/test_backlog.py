"""Which of many ranks it is whose device hangs, when all hosts wait for their devices.

Four ranks in one process, each with a page and with groups over a communicator of NCCL's kind: the host runs ahead, and
an operation is over when all devices have come to it. Streams are told to hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch

from megatron_flashrecovery.comm.backlog import backlog, held_up_in
from megatron_flashrecovery.comm.communicator import GroupIdentity
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.whereabouts import Whereabouts
from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank, Step
from megatron_flashrecovery.core.messages import ClockTicked, Fence, RanksHung
from megatron_flashrecovery.core.pace import OnDevice, Pace, Verdict, judge
from megatron_flashrecovery.detect.pulse import Pulse, PulseReader, make_page
from megatron_flashrecovery.testing.cpu_streams import CpuStream
from megatron_flashrecovery.testing.faulty_communicator import FaultyCommunicator
from megatron_flashrecovery.testing.parking import FakeParking
from tests.core.jobs import A, B, play, training_job

MEMBERS = {"dp0": (0, 2), "dp1": (1, 3), "world": (0, 1, 2, 3)}
BIG = 1000
"""Small reductions are waited for by the host."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Trainer:
    def __init__(self, rank: int, clock: Clock) -> None:
        self.rank = Rank(rank)
        page = make_page()
        self.reader = PulseReader(page)
        self.pulse = Pulse(page, clock)
        self.stream = CpuStream()
        self.ends: dict[str, FaultyCommunicator] = {}
        self.groups = {name: self._group(name, members) for name, members in MEMBERS.items() if rank in members}
        self.beat()
        self.pulse.begin(Step(0))

    def _group(self, name: str, members: Sequence[int]) -> FlashGroup:
        end = self.ends[name] = FaultyCommunicator()
        end.default.stream = self.stream
        ranks = tuple(map(Rank, members))
        identity = GroupIdentity(
            GroupKey(name), ranks, ranks.index(self.rank), (("cpu", "gloo"),), timedelta(seconds=5)
        )
        return FlashGroup(identity, FakeParking(), Whereabouts(self.pulse), lambda _group: end)

    def reduce(self, name: str) -> None:
        self.groups[name].allreduce([torch.zeros(BIG)]).wait()

    def beat(self) -> None:
        """What the session's thread does."""
        self.pulse.beat()
        self.pulse.note_device(backlog(self.groups.values()))


class Cluster:
    def __init__(self) -> None:
        self.clock = Clock()
        self.trainers = [Trainer(rank, self.clock) for rank in range(4)]

    def steps(self) -> None:
        """Some that take a second each."""
        for step in range(1, 5):
            for trainer in self.trainers:
                with trainer.pulse.doing("a step", Step(step)):
                    pass
            self.clock.now += 1.0

    def stand_still(self, seconds: float) -> Verdict:
        for _ in range(int(seconds)):
            self.clock.now += 1.0
            for trainer in self.trainers:
                trainer.beat()
        readings = {trainer.rank: trainer.reader.read() for trainer in self.trainers}
        return judge({rank: each for rank, each in readings.items() if each}, self.clock.now, Pace(), 0.0)

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.reader.close()


@pytest.fixture
def cluster():
    cluster = Cluster()
    cluster.steps()
    for trainer in cluster.trainers:
        trainer.pulse.doing("a step", Step(5)).__enter__()
    yield cluster
    cluster.close()


def test_one_device_hangs_and_all_others_wait_for_it(cluster):
    cluster.trainers[2].stream.hang()
    for trainer in cluster.trainers:
        trainer.reduce("dp0" if "dp0" in trainer.groups else "dp1")
        if trainer.rank % 2:
            trainer.ends["dp1"].release()
        trainer.reduce("world")
    verdict = cluster.stand_still(10.0)
    assert verdict.hung == {
        2: "its device has not come to allreduce of dp0 for 9.0 s in a step: of 2 operations it has completed 0 "
        "(limit 5.0 s)"
    }
    assert verdict.waiting == {
        0: "allreduce of dp0, for 9.0 s in a step, on its device",
        1: "allreduce of world, for 9.0 s in a step, on its device",
        3: "allreduce of world, for 9.0 s in a step, on its device",
    }
    job = training_job()
    for node, ranks in ((A, (0, 1)), (B, (2, 3))):
        mine = [
            {rank: text for rank, text in said.items() if rank in ranks} for said in (verdict.hung, verdict.waiting)
        ]
        play(job, RanksHung(node, Epoch(0), *mine, Step(5)), now=10.0)
    fence, *_ = play(job, ClockTicked(), now=11.0)
    assert isinstance(fence, Fence)
    assert fence.ranks == (2,)


def test_a_host_that_never_issues_what_the_others_wait_for_is_told_from_them(cluster):
    for trainer in cluster.trainers:
        if trainer.rank != 3:
            trainer.reduce("world")
    verdict = cluster.stand_still(10.0)
    assert verdict.hung.keys() == {3}
    assert "it has computed for 10.0 s" in verdict.hung[Rank(3)]
    assert verdict.waiting.keys() == {0, 1, 2}


def test_a_network_that_stands_still_is_nobodys_fault(cluster):
    for trainer in cluster.trainers:
        trainer.reduce("world")
    verdict = cluster.stand_still(10.0)
    assert not verdict.hung
    assert verdict.waiting.keys() == {0, 1, 2, 3}


def test_what_is_complete_is_counted_and_no_more_waited_for(cluster):
    trainer = cluster.trainers[0]
    trainer.reduce("dp0")
    trainer.ends["dp0"].release()
    assert backlog(trainer.groups.values()) is None
    trainer.reduce("world")
    assert backlog(trainer.groups.values()) == OnDevice("allreduce of world", 1, True, issued=2, completed=1)


def test_a_device_is_held_up_where_the_others_have_not_come_and_not_by_itself(cluster):
    trainer = cluster.trainers[0]
    assert held_up_in(trainer.groups.values()) is None
    trainer.reduce("dp0")
    trainer.reduce("world")
    spot = held_up_in(trainer.groups.values())
    assert (spot.group, spot.operation, spot.number) == ("dp0", "allreduce", 1)
    trainer.ends["dp0"].release()
    assert held_up_in(trainer.groups.values()).group == "world"
    trainer.ends["world"].default.sever()
    assert held_up_in(trainer.groups.values()) is None
    trainer.stream.hang()
    trainer.reduce("dp0")
    assert held_up_in(trainer.groups.values()) is None


def test_an_operation_of_a_communicator_that_was_severed_is_not_waited_for(cluster):
    trainer = cluster.trainers[0]
    trainer.reduce("world")
    trainer.ends["world"].default.sever()
    assert backlog(trainer.groups.values()) is None
