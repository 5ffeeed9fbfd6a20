import pytest

from megatron_flashrecovery.core.drain import Disentangle, Past, Settled, decide_drain
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.matching import _collectives, _transfers
from megatron_flashrecovery.core.reports import GroupCount, Match, PairCount, Spot, Standing, Update
from tests.core.jobs import census_of, draining_job, key, play, report, stood

PARKED, CAUGHT, BLOCKED = Standing.PARKED, Standing.CAUGHT, Standing.BLOCKED
WAITS = {"standing": BLOCKED, "spot": Spot(key("tp0"), "all_reduce", 4)}


def decide(*reports, past=None, sharded=True, doomed=None):
    return decide_drain(census_of(*reports, sharded=sharded, doomed=doomed), sharded, past or Past(), is_patient=True)


def said(issued, completed=None, forms=(b"1", b"2", b"3", b"4")):
    """Forms are named after the number of their operation."""
    done = issued if completed is None else completed
    return GroupCount(issued, done, digest=issued, recent=tuple(form for form in forms if int(form or 0) <= issued))


def waiting(rank=0, update=Update.BEFORE, count=None):
    return report(rank, update=update, counts={"tp0": count or said(4, 3)}, **WAITS)


def behind(rank=1, standing=CAUGHT, issued=3, **more):
    elsewhere = Spot(key("dp1"), "all_reduce", 2)
    return report(rank, standing=standing, spot=elsewhere, counts={"tp0": said(issued)}, **more)


def transfer(sent=0, received=0, opened=0, sends=(), receives=(), peer=1):
    return {"tp0": GroupCount(pairs={Rank(peer): PairCount(sent, received, opened, sends, receives)})}


@pytest.mark.parametrize("standing", [PARKED, CAUGHT])
def test_a_partner_that_stands_elsewhere_issues_the_counterpart(standing):
    decision = decide(waiting(), behind(standing=standing))
    match = Match(key("tp0"), b"4", 4)
    assert decision == Disentangle(match={1: (match,)}, void=frozenset({0}), missing={key("tp0"): 1})


def test_everything_that_a_partner_lacks_is_issued_in_order():
    decision = decide(waiting(count=said(4, 1)), behind(issued=1))
    assert [match.number for match in decision.match[1]] == [2, 3, 4]


@pytest.mark.parametrize("update", [Update.ARMED, Update.WRITING, Update.APPLIED])
def test_nobody_past_the_gate_gets_void_contents(update):
    decision = decide(waiting(update=update), behind())
    assert not decision.match
    assert f"unmatched: rank 0 is {update.value}" in decision.sever[key("tp0")]


def test_a_partner_past_the_gate_may_issue_a_counterpart():
    assert decide(waiting(), behind(update=Update.ARMED)).match


def test_an_operation_without_a_form_is_severed_with_the_reason():
    decision = decide(waiting(count=said(4, 3, forms=(b"3", b""))), behind())
    assert "unmatched: nobody can say what rank 1 would have to issue" in decision.sever[key("tp0")]


@pytest.mark.parametrize("by", ["collectives", "transfers"])
def test_more_than_is_remembered_is_one_reason_not_to_match_and_not_a_list_of_millions(by):
    """As if one member had begun to count anew and another had not, after a day."""
    if by == "collectives":
        reports = waiting(count=said(5_000_000, 4_999_999)), behind(issued=0)
        assert len(list(_collectives(census_of(*reports), key("tp0")))) == 1
    else:
        reports = (
            report(0, counts=transfer(sent=5_000_000, opened=1, sends=(b"s",) * 8), **WAITS),
            report(1, spot=Spot(key("dp1"), "all_reduce", 2), counts=transfer(peer=0)),
        )
        assert len(list(_transfers(census_of(*reports), key("tp0")))) == 1
    assert "unmatched: nobody can say what rank 1 would have to issue" in decide(*reports).sever[key("tp0")]


def test_who_stands_exactly_before_it_is_advanced_not_matched():
    parked = report(1, spot=Spot(key("tp0"), "all_reduce", 4), counts={"tp0": said(3)})
    assert decide(waiting(), parked) == Disentangle(advance=frozenset({1}))


def test_all_members_that_lack_a_collective_stand_or_none_issues_it():
    world = Spot(key("world"), "all_reduce", 4)
    inside = report(0, standing=BLOCKED, spot=world, counts={"world": said(4, 3)})
    others = [report(rank, counts={"world": said(3)}) for rank in (1, 2)]
    assert set(decide(inside, *others, report(3, counts={"world": said(3)})).match) == {1, 2, 3}
    stuck = report(3, standing=BLOCKED, spot=Spot(key("dp1"), "broadcast", 1), counts={"dp1": GroupCount(1, 0, 1)})
    assert not decide(inside, *others, stuck).match


def test_sends_that_nobody_received_are_received_into_nothing():
    sender = report(0, counts=transfer(sent=3, sends=(b"a", b"b", b"c")))
    receiver = report(1, update=Update.APPLIED, counts=transfer(received=1, peer=0))
    match = tuple(Match(key("tp0"), form, peer=Rank(0)) for form in (b"b", b"c"))
    assert decide(sender, receiver) == Disentangle(match={1: match}, missing={key("tp0"): 2})


def test_a_receive_that_is_waited_for_is_sent_nothing():
    spot = Spot(key("tp0"), "recv", 0, (), (Rank(1),))
    receiver = report(0, standing=BLOCKED, spot=spot, counts=transfer(received=1, opened=1, receives=(b"a",)))
    decision = decide(receiver, behind(issued=0))
    match = Match(key("tp0"), b"a", peer=Rank(0), is_send=True)
    assert decision == Disentangle(match={1: (match,)}, void=frozenset({0}), missing={key("tp0"): 1})


def test_a_group_is_not_matched_again_if_as_much_is_missing_as_before():
    decision = decide(waiting(), behind(), past=Past(missing={key("tp0"): 1}))
    assert "unmatched: it did not help" in decision.sever[key("tp0")]


def test_a_group_that_lost_a_member_is_not_matched():
    ahead = report(0, counts={"tp0": said(4, 3)})
    assert decide(ahead, behind(), doomed={"tp0": "rank 1 was lost"}) == Settled()


def test_nobody_is_advanced_in_a_group_in_which_somebody_has_issued_a_counterpart():
    parked = report(1, spot=Spot(key("tp0"), "all_reduce", 4), counts={"tp0": said(3)})
    decision = decide(waiting(), parked, past=Past(displaced={key("tp0")}))
    assert not decision.advance


def test_void_contents_are_not_carried_to_a_rank_past_its_gate():
    parked = report(1, spot=Spot(key("tp0"), "all_reduce", 4), counts={"tp0": said(3)})
    armed = waiting(update=Update.ARMED)
    assert decide(armed, parked).advance == {1}
    assert not decide(armed, parked, past=Past(void={Rank(1)})).advance


def test_who_goes_on_with_what_a_void_rank_gives_is_void_too():
    parked = report(1, spot=Spot(key("tp0"), "all_reduce", 4), counts={"tp0": said(3)})
    assert decide(waiting(), parked, past=Past(void={Rank(1)})).void == {0, 1}


def test_matched_groups_are_kept_once_everybody_counts_the_same():
    job = draining_job(3)
    (drain,) = play(job, stood(waiting(), behind()), stood(report(2)))
    assert drain.match == {1: (Match(key("tp0"), b"4", 4),)}
    assert play(job, stood(behind(issued=4), number=2)) == []
    play(job, stood(report(0, counts={"tp0": said(4)})))
    assert key("tp0") not in job.phase.census.rebuild()
