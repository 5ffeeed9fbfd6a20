import pytest

from megatron_flashrecovery.core.drain import Disentangle, Past, Settled, Wait, decide_drain
from megatron_flashrecovery.core.reports import Spot, Standing, Told, Update
from tests.core.jobs import census_of, key, pairs, report, used

PARKED, CAUGHT, BLOCKED = Standing.PARKED, Standing.CAUGHT, Standing.BLOCKED


def decide(*reports, sharded=True, past=None, is_patient=True, doomed=None):
    census = census_of(*reports, sharded=sharded, doomed=doomed)
    return decide_drain(census, sharded, past or Past(), is_patient)


def at(rank, standing, group, number, issued=None, operation="all_reduce", others=None, **more):
    """A rank at a collective: parked before it, or blocked or caught in it."""
    done = number - 1
    issued = issued if issued is not None else (done if standing is PARKED else number)
    counts = {group: used(issued, done, digest=issued), **(others or {})}
    return report(rank, standing=standing, spot=Spot(key(group), operation, number), counts=counts, **more)


def test_nobody_in_anybodys_way_is_settled():
    assert decide(report(0), report(1), at(2, CAUGHT, "tp1", 4), doomed={"tp1": "rank 3 was lost"}) == Settled()


def test_an_operation_that_everybody_issued_completes_by_itself():
    decision = decide(at(0, BLOCKED, "tp0", 4), at(1, BLOCKED, "tp0", 4))
    assert decision == Wait(frozenset({key("tp0")}), frozenset({0, 1}))


def test_an_operation_that_does_not_complete_in_time_is_severed():
    decision = decide(at(0, BLOCKED, "tp0", 4), at(1, BLOCKED, "tp0", 4), is_patient=False)
    assert decision == Disentangle(sever={key("tp0"): "all_reduce of rank 0 did not complete in time"})


def test_a_partner_that_stands_exactly_before_the_operation_is_advanced():
    assert decide(at(0, BLOCKED, "tp0", 4), at(1, PARKED, "tp0", 4)) == Disentangle(advance=frozenset({1}))


@pytest.mark.parametrize(
    "partner",
    [
        pytest.param(at(1, PARKED, "dp1", 2), id="before-another-group"),
        pytest.param(at(1, PARKED, "tp0", 4, operation="broadcast"), id="before-another-operation"),
        pytest.param(at(1, PARKED, "tp0", 3), id="before-an-older-operation"),
        pytest.param(report(1, counts={"tp0": used(3, digest=3)}), id="between-two-calls"),
    ],
)
def test_a_group_whose_partner_does_not_come_is_severed_with_the_reason(partner):
    decision = decide(at(0, BLOCKED, "tp0", 4), partner)
    assert isinstance(decision, Disentangle)
    assert decision.advance == frozenset()
    assert "rank 0 is in all_reduce, but rank 1 stands" in decision.sever[key("tp0")]


def test_all_partners_are_advanced_or_none():
    world = [at(0, BLOCKED, "world", 4), at(1, PARKED, "world", 4), at(2, PARKED, "world", 4)]
    assert decide(*world, at(3, PARKED, "world", 4)) == Disentangle(advance=frozenset({1, 2, 3}))
    assert decide(*world, at(3, PARKED, "dp1", 4)).advance == frozenset()


def test_nothing_is_severed_while_something_else_still_moves():
    stuck = [at(0, BLOCKED, "tp0", 4), at(1, PARKED, "dp1", 2)]
    moving = [at(2, BLOCKED, "tp1", 4), at(3, BLOCKED, "tp1", 4)]
    assert decide(*stuck, *moving) == Wait(frozenset({key("tp1")}), frozenset({0, 2, 3}))


def test_a_rank_blocked_in_a_group_that_is_lost_anyway_is_freed_at_once():
    doomed = {"tp0": "was being rebuilt in epoch 1"}
    assert decide(at(0, BLOCKED, "tp0", 4), report(1), doomed=doomed) == Disentangle(sever={key("tp0"): doomed["tp0"]})


def test_a_group_is_severed_once():
    past = Past(severed=frozenset({key("tp0")}))
    assert decide(at(0, BLOCKED, "tp0", 4), report(1), past=past) == Wait(frozenset(), frozenset({0}))


def test_an_asynchronous_operation_is_completed_so_that_its_group_can_be_kept():
    ahead = at(0, PARKED, "dp0", 2, others={"tp0": used(4, 3, digest=4)})
    assert decide(ahead, at(1, PARKED, "tp0", 4)) == Disentangle(advance=frozenset({1}))


def test_an_asynchronous_operation_that_cannot_complete_severs_nothing():
    ahead = at(0, PARKED, "dp0", 2, others={"tp0": used(4, 3, digest=4)})
    assert decide(ahead, report(1, counts={"tp0": used(3, digest=3)})) == Settled()


def exchange(rank, standing, counts, sends=(), receives=()):
    spot = Spot(key("tp0"), "exchange", 0, tuple(sends), tuple(receives))
    return report(rank, standing=standing, spot=spot, counts={"tp0": counts})


@pytest.mark.parametrize(
    ("first", "second", "advance"),
    [
        pytest.param(
            exchange(0, BLOCKED, pairs(r1=(0, 1, 1)), receives=[1]),
            exchange(1, PARKED, pairs(), sends=[0]),
            {1},
            id="a-send-that-is-waited-for",
        ),
        pytest.param(
            exchange(0, BLOCKED, pairs(r1=(1, 0, 1)), sends=[1]),
            exchange(1, PARKED, pairs(), receives=[0]),
            {1},
            id="a-receive-that-is-waited-for",
        ),
        pytest.param(
            exchange(0, PARKED, pairs(r1=(1, 0, 0)), receives=[1]),
            exchange(1, PARKED, pairs(), receives=[0]),
            {1},
            id="an-eager-send-is-received",
        ),
        pytest.param(
            exchange(0, BLOCKED, pairs(r1=(1, 1, 2)), sends=[1], receives=[1]),
            exchange(1, PARKED, pairs(), sends=[0], receives=[0]),
            {1},
            id="both-ways-at-once",
        ),
        pytest.param(
            exchange(0, PARKED, pairs(), sends=[1]),
            exchange(1, PARKED, pairs(), receives=[0]),
            set(),
            id="nobody-has-begun",
        ),
    ],
)
def test_a_send_or_receive_is_advanced_if_the_other_side_was_issued(first, second, advance):
    decision = decide(first, second)
    assert (decision.advance if isinstance(decision, Disentangle) else set()) == advance


def told(*names, step=6):
    return tuple(Told(name, name.encode(), step) for name in names)


ARMED, APPLIED = Update.ARMED, Update.APPLIED


@pytest.mark.parametrize(
    ("waiting", "done", "answer"),
    [
        pytest.param(
            report(0, 5, ARMED, told=told("agree")),
            report(2, 5, APPLIED, told=told("agree", "norm")),
            told("norm"),
            id="a-peer-has-applied",
        ),
        pytest.param(
            report(0, 5, ARMED),
            report(2, 6, told=told("agree", "norm", "loss")),
            told("agree", "norm", "loss"),
            id="a-peer-has-completed",
        ),
        pytest.param(
            report(0, 5, ARMED, told=told("agree", "norm")),
            report(2, 5, APPLIED, told=told("agree", "norm")),
            (),
            id="it-has-everything-already",
        ),
        pytest.param(
            report(0, 5, ARMED, told=told("agree", step=5)),
            report(2, 6, ARMED, told=told("agree") + told("agree", step=7)),
            told("agree"),
            id="results-of-other-steps-do-not-count",
        ),
        pytest.param(
            at(0, CAUGHT, "tp0", 4, step=5, update=ARMED, told=told("other")),
            report(2, 6, told=told("agree", "norm")),
            None,
            id="their-results-differ",
        ),
        pytest.param(
            report(0, 5, ARMED, told=told("norm")), report(3, 6, told=told("norm")), (), id="it-only-waits-to-write"
        ),
        pytest.param(report(0, 5, ARMED), report(2, 5, ARMED), None, id="nobody-has-applied"),
        pytest.param(report(0, 5), report(2, 6, told=told("norm")), None, id="its-gradients-are-not-final"),
        pytest.param(report(0, 6, ARMED), report(2, 6, told=told("norm")), None, id="a-step-ahead-already"),
    ],
)
def test_who_is_in_an_update_that_a_peer_has_applied_is_answered(waiting, done, answer):
    decision = decide(waiting, done, sharded=False)
    assert decision == (Settled() if answer is None else Disentangle(answer={0: answer}))


def test_a_member_of_the_group_in_which_a_rank_stands_tells_only_the_next_result():
    waiting = at(1, CAUGHT, "tp0", 4, step=5, update=ARMED)
    applied = report(0, 5, APPLIED, told=told("norm", "loss"), counts={"tp0": used(4, digest=4)})
    doomed = {"tp0": "rank 1: it is broken"}
    decision = decide(applied, waiting, sharded=False, doomed=doomed)
    assert decision == Disentangle(answer={1: told("norm")})


def test_an_answer_that_did_not_help_is_not_repeated():
    past = Past(answered={0: 0})
    assert decide(report(0, 5, ARMED), report(2, 6, told=told("norm")), sharded=False, past=past) == Settled()


def test_a_sharded_rank_is_never_answered():
    assert decide(report(0, 5, ARMED), report(2, 6, told=told("norm"))) == Settled()


def test_a_rank_half_way_through_restoring_is_never_answered():
    half = report(0, 5, Update.WRITING)
    assert decide(half, report(2, 6, told=told("norm")), sharded=False) == Settled()
