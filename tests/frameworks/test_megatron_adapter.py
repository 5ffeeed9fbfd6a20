"""Whatever a recovery does to a rank, the run goes on bit for bit: losses, gradient norms and final state."""

import json

import pytest

from tests.frameworks.launching import ROOT, torchrun
from tests.frameworks.megatron_scenarios import SCENARIOS, VARIANTS

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of all scenarios, on both ranks of one job: starting it takes longer than most of them."""
    out = tmp_path_factory.mktemp("scenarios")
    torchrun(2, ROOT / "tests" / "frameworks" / "megatron_scenarios.py", [str(out)], timeout=280.0)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", ["protection alone", *SCENARIOS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bit_changes(differences, variant, scenario):
    assert [rank[variant][scenario] for rank in differences] == ["", ""]
