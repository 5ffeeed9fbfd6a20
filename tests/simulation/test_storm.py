import pytest

from megatron_flashrecovery.core.errors import ImpossibleTransition
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


def what_goes_wrong(seed, *off):
    try:
        run(draw(seed, frozenset(off)))
    except (AssertionError, Mismatch, Violation, ImpossibleTransition) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("off", "seed", "what"),
    [
        pytest.param("gate", 13, "invariant 1", id="1-the-gate"),
        pytest.param("discard", 6, "invariant 2", id="2-discarding"),
        pytest.param("gate", 49, "invariant 3", id="3-the-new-mirror-is-part-of-execution"),
        pytest.param("epochs", 58, "invariant 4", id="4-epochs"),
        pytest.param("counts+matching", 141, "invariant 7", id="7-comparing-counts"),
        pytest.param("fingerprint", 14, "restored step", id="8-fingerprints"),
        pytest.param("abort check", 28, "completed step", id="aborted-is-not-completed"),
        pytest.param("poison", 16, "rank 3 is restored from a poisoned snapshot", id="copies-that-may-be-wrong"),
        pytest.param("before", 71, "void contents reach rank 0: agreement is told", id="void-before-the-update-only"),
        pytest.param("gate check+abort check", 388, "void contents reach rank 0: it is armed", id="void-at-the-gate"),
    ],
)
def test_a_protection_that_is_missing_is_noticed(off, seed, what):
    assert what in what_goes_wrong(seed, *off.split("+"))


@pytest.mark.parametrize(
    ("off", "seed", "what"),
    [
        pytest.param("gate", 394, "gave up although only [1] were lost", id="1-a-state-is-lost"),
        pytest.param("discard", 6, "nothing can happen any more", id="2-the-job-hangs"),
        pytest.param("epochs", 22, "no plan of this epoch was given", id="4-orders-of-another-epoch-are-executed"),
        pytest.param(
            "counts+matching", 275, "rank 9 issued gather, others grads 0", id="7-a-replay-meets-old-operations"
        ),
        pytest.param("counts+matching", 815, "completed step 1 with", id="7-a-replay-gets-an-old-activation"),
    ],
)
def test_a_protection_that_is_missing_has_consequences(off, seed, what):
    """Not only that the invariant is broken, which the monitor knows, but what comes of it."""
    assert what in what_goes_wrong(seed, *off.split("+"), "direct checks")
