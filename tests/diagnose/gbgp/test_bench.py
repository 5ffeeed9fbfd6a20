"""What the bench makes of a solution, and that the document's first example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bench import gbgp, planted
from megatron_flashrecovery.diagnose import gbgp as library
from megatron_flashrecovery.diagnose.gbgp import Blocks, OneRatio, Problem
from tests.diagnose.gbgp.small import line

DOCUMENT = Path(__file__).parents[3] / "docs" / "gbgp.md"


def test_a_hit_is_counted_on_the_largest_region():
    problem = Problem(Blocks((line(10),)), OneRatio(np.ones(10)))
    truth = np.isin(np.arange(10), [0, 1, 2, 7, 8])
    x = np.isin(np.arange(10), [1, 2, 3, 4, 8]).astype(float)
    found = gbgp.hit(problem, x, truth)
    assert (found.precision, found.recall) == (0.5, 0.4)
    assert found.f == pytest.approx(4 / 9)
    assert gbgp.hit(problem, np.zeros(10), truth).f == 0


def test_the_methods_are_tried_on_the_same_instance():
    made = planted.static(400, 3, 40, mu=5, seed=0)
    samples = {}
    for _ in range(2):
        gbgp._keep(samples, "here", gbgp._tried_on_parts(made, 4, 5e-4))
    assert {name.split(", ")[1] for name in samples} == {"threshold", "uncut", "mp"}
    assert all(samples[f"here, {method}, F"][0] > 0.85 for method in ("threshold", "uncut", "mp"))
    assert samples["here, mp, F"][0] == samples["here, mp, F"][1]
    assert gbgp.table(samples).row_count == 3


def test_the_growth_of_time_is_a_power_of_the_size():
    sizes = (*gbgp._SIZES, gbgp._LARGE)
    samples = {f"network of networks, mu 5, {n}, mp, CPU seconds": [1.0, n**1.5, 1e9] for n in sizes}
    assert gbgp._growth(samples) == pytest.approx(1.5)


def test_the_first_example_of_the_document_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0]
    made = planted.evolving(mu=6, seed=0)
    names = {name: getattr(library, name) for name in library.__all__}
    exec(example, {**names, "edges": made.network.edges, "scores": made.scores})
    score = float(capsys.readouterr().out.split()[0])
    assert score > 6 * np.sqrt(made.truth.sum()) * 0.9
