import pytest

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.core.planner import Holdings, Origin, RecoveryPlan, Unrecoverable, plan_recovery
from megatron_flashrecovery.core.reports import Update
from megatron_flashrecovery.core.shares import Source
from tests.core.jobs import A, B, census_of, key, report, used

ARMED, WRITING, APPLIED = Update.ARMED, Update.WRITING, Update.APPLIED
OWN, LIVE = Origin(Source.OWN), Origin(Source.LIVE)


def mirror(host):
    return Origin(Source.MIRROR, Rank(host))


def peer(rank, values=None):
    return Origin(Source.PEER, Rank(rank), None if values is None else Rank(values))


def plan(*reports, sharded=True, vault=None, failed=None, doomed=None):
    census = census_of(*reports, sharded=sharded, doomed=doomed)
    kept = {Rank(rank): tuple(map(Step, steps)) for rank, steps in (vault or {}).items()}
    return plan_recovery(1, census.seats, Holdings(census, kept, failed or {}))


@pytest.mark.parametrize(
    ("reports", "vault", "step", "origin_of"),
    [
        pytest.param([report(0), report(1), report(2)], {}, 5, {3: mirror(1)}, id="lost-before-the-update"),
        pytest.param([report(0), report(1, update=ARMED), report(2)], {}, 5, {3: mirror(1)}, id="armed-is-live-memory"),
        pytest.param(
            [report(0), report(1, guests=(4,)), report(2)],
            {},
            4,
            {0: OWN, 1: OWN, 2: OWN, 3: mirror(1)},
            id="mirror-one-behind",
        ),
        pytest.param(
            [report(0), report(1, guests=(4,)), report(2)], {3: (4, 5)}, 5, {3: OWN}, id="vault-when-the-mirror-lags"
        ),
        pytest.param([report(0), report(1), report(2)], {3: (4, 5)}, 5, {3: mirror(1)}, id="mirror-before-the-vault"),
        pytest.param(
            [report(0), report(1, update=WRITING), report(2, update=APPLIED)],
            {},
            5,
            {1: OWN, 2: OWN, 3: mirror(1)},
            id="half-written-goes-back",
        ),
        pytest.param(
            [report(0, 6), report(1, 5, guests=(4, 5)), report(2, 6)],
            {},
            5,
            {0: OWN, 2: OWN, 3: mirror(1)},
            id="some-have-completed-the-next",
        ),
        pytest.param([], {0: (4, 5), 1: (5,), 2: (5,), 3: (4, 5)}, 5, dict.fromkeys(range(4), OWN), id="all-at-once"),
        pytest.param(
            [report(0, own=(4,)), report(1), report(2)],
            {},
            5,
            {0: mirror(2), 3: mirror(1)},
            id="a-survivor-without-its-own-copy",
        ),
    ],
)
def test_a_sharded_job_resumes_at_the_newest_step_that_all_can_produce(reports, vault, step, origin_of):
    found = plan(*reports, vault=vault)
    assert isinstance(found, RecoveryPlan)
    assert (found.resume_step, found.origin_of, found.regather) == (step, origin_of, True)


@pytest.mark.parametrize(
    ("reports", "vault", "step", "origin_of"),
    [
        pytest.param([report(0), report(1), report(2)], {}, 5, {3: peer(1, values=1)}, id="a-peer-and-the-mirror"),
        pytest.param(
            [report(0), report(1, guests=()), report(2)], {3: (5,)}, 5, {3: peer(1)}, id="a-peer-and-the-vault"
        ),
        pytest.param(
            [report(0, update=APPLIED, own=(5, 6)), report(1, 6), report(2, 5, WRITING, own=(5, 6))],
            {},
            6,
            {2: peer(0), 3: peer(1, values=1)},
            id="applied-is-the-next-step",
        ),
        pytest.param(
            [report(0, 5), report(1, 6), report(2, 5)],
            {},
            None,
            [0, 2],
            id="nobody-in-a-group-can-follow",
        ),
        pytest.param([report(0), report(2)], {1: (5,), 3: (5,)}, None, [1, 3], id="all-peers-lost"),
    ],
)
def test_a_replicated_job_copies_from_a_peer_that_is_there_live(reports, vault, step, origin_of):
    found = plan(*reports, sharded=False, vault=vault)
    if step is None:
        assert isinstance(found, Unrecoverable)
        assert list(found.orphans) == origin_of
    else:
        assert isinstance(found, RecoveryPlan)
        assert (found.resume_step, found.origin_of, found.regather) == (step, origin_of, False)


def test_a_rank_that_is_lost_with_its_host_and_its_vault_is_named():
    found = plan(report(0), report(2))
    assert str(found) == "no copy of step 5 is left of rank 1, 3"


def test_nothing_left_at_all_is_said_so():
    assert str(plan()) == "no copy of any step is left"


def test_a_source_that_failed_is_tried_again_only_if_there_is_no_other():
    failed = {(Rank(3), mirror(1), Step(5)): 1}
    assert plan(report(0), report(1), report(2), vault={3: (5,)}, failed=failed).origin_of == {3: OWN}
    assert plan(report(0), report(1), report(2), failed=failed).origin_of == {3: mirror(1)}


def test_a_source_that_failed_twice_does_not_exist_and_an_older_step_may_be_left():
    found = plan(report(0), report(1), report(2), failed={(Rank(3), mirror(1), Step(5)): 2})
    assert (found.resume_step, found.origin_of[3]) == (4, mirror(1))
    failed = {(Rank(3), mirror(1), Step(step)): 2 for step in (4, 5)}
    assert str(plan(report(0), report(1), report(2), failed=failed)) == "no copy of step 5 is left of rank 3"


def test_every_rank_gets_a_share_and_givers_know_to_whom():
    found = plan(report(0), report(1), report(2), doomed={"dp1": "rank 3 was lost", "tp1": "rank 3 was lost"})
    shares = {share.rank: share for node in (A, B) for share in found.shares_of[node]}
    assert sorted(shares) == [0, 1, 2, 3]
    assert shares[1].gives_mirror_to == (3,)
    assert (shares[3].source, shares[3].giver, shares[3].rebuild) == (Source.MIRROR, 1, (key("dp1"), key("tp1")))
    assert (shares[0].source, shares[0].rebuild, shares[0].host, shares[0].guests) == (Source.LIVE, (), 2, (2,))
    assert found.kept == 3


def test_a_peer_gives_state_and_the_host_gives_values():
    found = plan(report(0), report(1, guests=()), report(2), sharded=False, vault={3: (5,)})
    giver = found.shares_of[A][1]
    assert (giver.gives_state_to, giver.gives_mirror_to) == ((3,), ())


def test_groups_are_kept_or_rebuilt_with_a_reason():
    counts = {"tp0": used(3), "world": used(2)}
    found = plan(report(0, counts=counts), report(1, counts={"tp0": used(3)}), report(2), doomed={"tp1": "lost"})
    assert found.rebuild == {key("tp1"): "lost", key("world"): "members issued 0 to 2 operations"}
