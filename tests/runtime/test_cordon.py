"""Lists of hosts as a scheduler wants them."""

import pytest

from megatron_flashrecovery.runtime.cordon import compressed, drain_commands


@pytest.mark.parametrize(
    ("hosts", "written"),
    [
        pytest.param([], "", id="none"),
        pytest.param(["n7"], "n7", id="one"),
        pytest.param(["login", "n7"], "login,n7", id="without-a-number"),
        pytest.param(["n3", "n1", "n2", "n7"], "n[1-3,7]", id="ranges"),
        pytest.param(["n9", "n10", "n11"], "n[9-11]", id="of-other-widths"),
        pytest.param(["n08", "n09", "n10"], "n[08-10]", id="with-leading-zeros"),
        pytest.param(["n1", "n01"], "n01,n1", id="which-are-others"),
        pytest.param(["gpu-a1", "gpu-b1"], "gpu-a1,gpu-b1", id="prefixes"),
        pytest.param(["n1-ib", "n2-ib"], "n[1-2]-ib", id="suffix"),
        pytest.param(["n1", "n1"], "n1", id="twice"),
    ],
)
def test_a_list_is_as_short_as_slurm_writes_it(hosts, written):
    assert compressed(hosts) == written


def test_hosts_with_the_same_reason_are_drained_together_and_a_reason_is_no_command():
    reasons = {"n1": ["leaf l0"], "n2": ["leaf l0"], "n9": ["device n9/3", 'a "$(reboot)"']}
    assert drain_commands(reasons) == [
        'scontrol update NodeName=n[1-2] State=DRAIN Reason="flashrecovery: leaf l0"',
        "scontrol update NodeName=n9 State=DRAIN Reason=\"flashrecovery: device n9/3; a '_(reboot)'\"",
    ]
