import pytest

from megatron_flashrecovery.core.ids import OrderNumber
from megatron_flashrecovery.core.reports import Standing
from tests.core.jobs import census_of, key, pairs, report, used


def verdict(group, **said):
    reports = [report(int(rank[1:]), counts={group: count} if count else {}) for rank, count in said.items()]
    return census_of(*reports).rebuild().get(key(group))


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        pytest.param(used(3), used(3), None, id="same-count-and-hash"),
        pytest.param(None, None, None, id="never-used"),
        pytest.param(used(0, digest=0), None, None, id="not-used-and-not-mentioned"),
        pytest.param(used(3), used(4), "members issued 3 to 4 operations", id="one-is-ahead"),
        pytest.param(used(3), None, "members issued 0 to 3 operations", id="one-never-used-it"),
        pytest.param(used(3), used(3, digest=8), "different operations up to number 3", id="other-operations"),
        pytest.param(used(3, 2), used(3), "an operation is under way on rank 0", id="issued-and-not-completed"),
        pytest.param(used(3), used(3, broken="connection reset"), "rank 1: connection reset", id="broken"),
        pytest.param(pairs(r1=(2, 1, 0)), pairs(r0=(1, 2, 0)), None, id="as-many-sends-as-receives"),
        pytest.param(pairs(r1=(2, 0, 0)), pairs(r0=(0, 1, 0)), "rank 0 to rank 1: 1 sends not", id="undelivered"),
        pytest.param(pairs(r1=(0, 0, 0)), pairs(r0=(0, 1, 1)), "an operation is under way", id="receive-open"),
        pytest.param(pairs(r1=(0, 0, 0)), pairs(r0=(0, 1, 0)), "1 receives never sent", id="received-from-nobody"),
    ],
)
def test_a_group_is_kept_only_if_every_member_has_the_same_quiet_communicator(first, second, reason):
    found = verdict("tp0", r0=first, r1=second)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_doomed_group_is_rebuilt_whatever_its_members_say():
    census = census_of(report(0), report(1), doomed={"tp0": "rank 1 was lost"})
    assert census.rebuild() == {key("tp0"): "rank 1 was lost"}


def test_a_later_report_replaces_an_earlier_one():
    census = census_of(report(0, counts={"tp0": used(3, 2)}), report(1, counts={"tp0": used(3)}))
    census.record(report(0, counts={"tp0": used(3)}), OrderNumber(1))
    assert census.rebuild() == {}


@pytest.mark.parametrize(
    ("number", "counts", "is_newer"),
    [
        pytest.param(1, used(2), False, id="counts-went-back"),
        pytest.param(0, used(4), False, id="older-order"),
        pytest.param(2, used(2), True, id="newer-order"),
        pytest.param(1, used(3), True, id="repeated"),
    ],
)
def test_an_older_report_does_not_replace_a_newer_one(number, counts, is_newer):
    census = census_of(report(0, counts={"tp0": used(3)}))
    assert census.record(report(0, counts={"tp0": counts}), OrderNumber(number)) is is_newer


def test_who_is_blocked_is_forgotten_when_they_stand_elsewhere():
    census = census_of(report(0, standing=Standing.BLOCKED))
    assert census.blocked == {0}
    census.record(report(0), OrderNumber(1))
    assert census.blocked == set()
