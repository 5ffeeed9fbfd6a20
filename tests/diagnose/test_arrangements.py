"""Rows of permuted scores: what was observed is one of them, and looks like all others if all is well."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.diagnose import arrangements
from megatron_flashrecovery.diagnose.arrangements import arrange

STRATA = st.lists(st.integers(-1, 3), min_size=1, max_size=24).map(np.array)


def rows_of(strata, values, rows, seed=0):
    arranged = arrange(strata, rows, np.random.default_rng(seed))
    return arranged, np.hstack([part[np.arange(values.size)] for part in arranged.of(values)])


@settings(max_examples=60, deadline=None)
@given(STRATA, st.integers(1, 40), st.integers(0, 1000))
def test_every_row_exchanges_within_strata_and_one_is_what_was_observed(strata, rows, seed):
    ranks = np.arange(strata.size)
    arranged, found = rows_of(strata, ranks.astype(float), rows, seed)
    assert found.shape == (strata.size, rows)
    assert (found[:, arranged.observed] == ranks).all()
    for column in found.T.astype(int):
        assert sorted(column) == ranks.tolist()
        assert (strata[column] == strata).all()
        assert (column[strata < 0] == ranks[strata < 0]).all()


@pytest.mark.parametrize("strata", [np.zeros(6, int), np.repeat([0, 1], [4, 9])], ids=["one", "two"])
def test_rows_made_in_pieces_are_those_that_are_stored(strata, monkeypatch):
    values = np.arange(strata.size, dtype=float)
    _, stored = rows_of(strata, values, 50)
    monkeypatch.setattr(arrangements, "_SMALL", 0)
    _, pieces = rows_of(strata, values, 50)
    assert (stored == pieces).all()


def test_the_place_of_what_was_observed_is_uniform_among_rows():
    """Of a statistic that rotations do not leave alone: its p is exact, however few orders there are."""
    rng = np.random.default_rng(5)
    places = []
    for seed in range(400):
        values = rng.normal(size=12)
        arranged, found = rows_of(np.zeros(12, int), values, 10, seed)
        statistic = found[:3].sum(axis=0)
        places.append(int((statistic > statistic[arranged.observed]).sum()))
    counts = np.bincount(places, minlength=10)
    # 40 each; chi squared with 9 degrees of freedom is below 27.9 with probability 0.999.
    assert ((counts - 40) ** 2 / 40).sum() < 27.9
