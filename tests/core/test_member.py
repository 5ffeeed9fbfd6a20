import pytest

from megatron_flashrecovery.core.errors import ImpossibleTransition
from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.core.member import (
    CarryOut,
    GetOutOfTheWay,
    GoOn,
    Leave,
    Member,
    Mode,
    SayReady,
    SetOut,
    StandStill,
)
from megatron_flashrecovery.core.messages import BeginTraining, Drain, ExecutePlan, Park, Release, Resume
from megatron_flashrecovery.core.shares import Share, Source

NODE = NodeId("a")
SHARE = Share(1, Source.LIVE)


def park(epoch, number, lost=(3,)):
    return Park(epoch, number, lost)


def drain(epoch, number, advance=(1,)):
    return Drain(NODE, epoch, number, advance=advance)


def execute(epoch, number):
    return ExecutePlan(NODE, epoch, number, 5, True, (SHARE,))


def training(epoch=0):
    member = Member(1, epoch, is_first=True)
    member.ready()
    assert play(member, BeginTraining(epoch)) == [SetOut()]
    return member


def play(member, *orders):
    return [member.receive(order) for order in orders]


def test_a_whole_recovery_of_a_survivor():
    member = training()
    actions = play(member, park(1, 1), drain(1, 2), execute(1, 3))
    assert actions == [StandStill((3,), False), GetOutOfTheWay(True, {}, None), CarryOut(5, True, SHARE)]
    member.executed()
    assert play(member, Resume(1, 4, 5)) == [GoOn(5)]
    assert member.mode is Mode.TRAINING


def test_a_whole_recovery_of_a_replacement():
    member = Member(1, 1, is_first=False)
    member.ready()
    assert play(member, execute(1, 3)) == [CarryOut(5, True, SHARE)]


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(park(1, 1), id="park-again"),
        pytest.param(park(0, 0), id="park-for-an-older-epoch"),
        pytest.param(drain(0, 5), id="drain-of-an-older-epoch"),
        pytest.param(drain(2, 5), id="drain-of-a-newer-epoch"),
        pytest.param(drain(1, 2), id="drain-again"),
        pytest.param(drain(1, 1), id="drain-of-an-older-number"),
        pytest.param(execute(0, 9), id="plan-of-an-older-epoch"),
        pytest.param(Resume(1, 9, 5), id="resume-ahead-of-the-plan"),
        pytest.param(Release(1, 9), id="release-ahead-of-the-end"),
    ],
)
def test_what_is_not_the_next_order_of_this_epoch_changes_nothing(order):
    member = training()
    play(member, park(1, 1), drain(1, 2))
    before = dict(vars(member))
    assert member.receive(order) is None
    assert vars(member) == before


@pytest.mark.parametrize("reach", ["stopped", "executing", "executed", "training", "done"])
def test_a_rank_parks_for_a_newer_epoch_wherever_it_is(reach):
    member = training()
    if reach != "training":
        play(member, park(1, 1))
    if reach in ("executing", "executed", "done"):
        play(member, execute(1, 2))
    if reach in ("executed", "done"):
        member.executed()
    if reach == "done":
        play(member, Resume(1, 3, 5))
        member.finished()
    assert play(member, park(4, 9)) == [StandStill((3,), is_executing=reach == "executing")]
    assert (member.mode, member.epoch, member.number) == (Mode.STOPPED, 4, 9)


def test_a_replacement_that_was_ready_says_so_again_in_the_new_epoch():
    member = Member(1, 1, is_first=False)
    member.ready()
    assert play(member, park(2, 5)) == [SayReady()]
    assert (member.mode, member.epoch) == (Mode.WAITING, 2)


def test_a_replacement_that_still_joins_takes_note_of_the_new_epoch():
    member = Member(1, 1, is_first=False)
    assert play(member, park(2, 5)) == [None]
    assert (member.mode, member.epoch) == (Mode.JOINING, 2)
    member.ready()
    assert play(member, execute(1, 6), execute(2, 7)) == [None, CarryOut(5, True, SHARE)]


def test_a_late_resume_of_the_epoch_before_the_loss_is_ignored():
    member = training()
    play(member, park(1, 1), execute(1, 2))
    member.executed()
    assert play(member, park(2, 4), Resume(1, 3, 5)) == [StandStill((3,), False), None]


def test_a_finished_rank_leaves_when_released_and_hears_nothing_more():
    member = training()
    member.finished()
    assert play(member, Release(0, 1), park(1, 2)) == [Leave(), None]


def test_nobody_sets_out_twice_or_before_it_is_ready_or_in_another_epoch():
    member = Member(1, 2, is_first=True)
    assert play(member, BeginTraining(2)) == [None]
    member.ready()
    assert play(member, BeginTraining(1), BeginTraining(2), BeginTraining(2)) == [None, SetOut(), None]


def test_a_loss_that_is_heard_of_before_the_word_to_begin_makes_that_void():
    member = Member(1, 0, is_first=True)
    member.ready()
    assert play(member, park(1, 1), BeginTraining(0)) == [StandStill((3,), False), None]
    assert play(member, execute(1, 2)) == [CarryOut(5, True, SHARE)]


def test_what_cannot_happen_names_the_rank_and_the_mode():
    with pytest.raises(ImpossibleTransition, match="rank 1 in epoch 0 is training and cannot become executed"):
        training().executed()
