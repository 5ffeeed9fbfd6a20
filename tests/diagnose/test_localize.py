"""The one entry: the scan first, then GBGP for what it leaves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench import answers
from megatron_flashrecovery.diagnose import localize as entry
from megatron_flashrecovery.diagnose.elements import Kind
from megatron_flashrecovery.diagnose.localize import localize
from megatron_flashrecovery.diagnose.search import Search
from tests.diagnose.faulty import CLUSTER, QUICK, of_kind, scores_of, unknown

ROOT = Path(__file__).parents[2]


def test_what_the_topology_knows_is_left_to_the_scan():
    fault = of_kind(Kind.LEAF)
    found = localize(CLUSTER.topology, scores_of(fault), search=QUICK)
    assert (found.method, found.undetermined, found.region) == ("scan", None, ())
    assert found.suspects[0].element == CLUSTER.topology.elements[fault.element]


def test_a_cause_that_the_topology_does_not_know_is_said_to_be_none_of_it():
    fault = unknown(seed=1)
    found = localize(CLUSTER.topology, scores_of(fault, mu=1.5, seed=2), search=QUICK)
    assert found.method == "gbgp"
    assert "not in the topology" in found.undetermined or "missing from the topology" in found.undetermined
    assert np.isin(fault.ranks, found.region).mean() > 0.5


def test_time_that_is_over_is_said_where_nobody_is_blamed():
    scores = scores_of(unknown(), mu=1.0)
    found = localize(CLUSTER.topology, scores, search=dataclasses.replace(QUICK, seconds=1e-9))
    assert "stopped after 0 of 19 permutations" in found.undetermined


def test_without_the_extra_the_scan_is_all_there_is(monkeypatch):
    monkeypatch.setattr(entry, "is_installed", lambda: False)
    blamed = localize(CLUSTER.topology, scores_of(of_kind(Kind.HOST), mu=3.0))
    assert (blamed.method, blamed.undetermined) == ("scan", None)
    nobody = localize(CLUSTER.topology, scores_of(mu=0.0))
    assert nobody.method == "scan"
    assert "pip install 'megatron-flashrecovery[diagnose]'" in nobody.undetermined


def test_the_scan_works_in_an_interpreter_that_does_not_have_the_extra():
    script = (
        "import sys; sys.modules['scipy'] = sys.modules['pcst_fast'] = None\n"
        "from tests.diagnose.faulty import CLUSTER, of_kind, scores_of\n"
        "from megatron_flashrecovery.diagnose.elements import Kind\n"
        "from megatron_flashrecovery.diagnose import localization, localize\n"
        "found = localization.localize(CLUSTER.topology, scores_of(of_kind(Kind.HOST), mu=3.0))\n"
        "print(found.suspects[0].element)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("host node")


def test_healthy_scores_end_the_search_after_a_few_permutations():
    from megatron_flashrecovery.diagnose.regions import find_regions

    searched = find_regions(CLUSTER.topology, scores_of(mu=0.0, seed=4), Search(seconds=600.0))
    assert searched.regions == ()
    assert searched.permutations < 100


def test_an_answer_names_elements_by_what_they_reach():
    fault = of_kind(Kind.DEVICE)
    methods = ("threshold", "scan")
    found = dict(answers.answers(CLUSTER.topology, scores_of(fault, mu=4.0), methods))
    assert found["scan"].named([fault.ranks.tobytes()], 1) == 1
    assert found["scan"].f(fault.ranks) == 1
    assert found["threshold"].f(fault.ranks) > 0.6
    assert not found["threshold"].reaches
