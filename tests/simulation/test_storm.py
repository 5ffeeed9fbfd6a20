import pytest

from megatron_flashrecovery.core.phases import Finished, Halted
from tests.simulation.fabric import Mismatch
from tests.simulation.monitor import Violation
from tests.simulation.settings import draw
from tests.simulation.storm import known_seeds, run


@pytest.mark.parametrize("seed", range(50))
def test_a_job_keeps_every_invariant_and_ends(seed):
    world = run(draw(seed))
    assert isinstance(world.job.phase, Finished | Halted)


@pytest.mark.parametrize("seed", known_seeds())
def test_seeds_that_failed_once_do_not_fail_again(seed):
    run(draw(seed))


@pytest.mark.parametrize(
    ("off", "seeds", "what"),
    [
        pytest.param("gate", range(20), "invariant 1|invariant 3", id="invariant-1-the-gate"),
        pytest.param("discard", range(100), "invariant 2", id="invariant-2-discarding"),
        pytest.param("epochs", range(60), "invariant 4|has not begun|.*", id="invariant-4-epochs"),
        pytest.param("counts", [111, 165], "issued|invariant 7", id="invariant-7-comparing-counts"),
        pytest.param("fingerprint", range(220, 240), "restored|completed", id="invariant-8-fingerprints"),
        pytest.param("abort check", range(240, 280), "completed", id="aborted-is-not-completed"),
    ],
)
def test_the_checks_notice_when_a_protection_is_missing(off, seeds, what):
    noticed = []
    for seed in seeds:
        try:
            run(draw(seed, frozenset({off})))
        except (Violation, Mismatch, Exception) as error:
            noticed.append(str(error))
    assert noticed
