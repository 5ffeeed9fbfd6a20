"""The launcher's configuration: torchrun's names, checked when it is built."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime.injection import Fault, Injection
from megatron_flashrecovery.runtime.launch_config import Deadlines, LaunchConfig
from megatron_flashrecovery.runtime.moment import Moment


def test_the_fields_are_these_and_a_new_one_is_a_decision():
    assert [field.name for field in fields(LaunchConfig)] == [
        "script",
        "script_args",
        "module",
        "nnodes",
        # A node that waits costs as much as one that trains: how many are worth it is the user's to say.
        "spare_nodes",
        "nproc_per_node",
        "node_rank",
        "master_addr",
        "master_port",
        "rdzv_id",
        "max_restarts",
        "spares_per_node",
        "log_dir",
        "injections",
        # A run that takes faults from whoever can write its --log-dir must be told so.
        "allow_injection",
        "shutdown_timeout",
        "preload",
        "hooks",
        "deadlines",
        # Which difference matters depends on the hardware: nodes of two kinds are no fault.
        "slow_factor",
        # A diagnosis takes a minute of one core of node 0, now and then: a site may have another use for it.
        "diagnosis",
        # Switches and power domains are the site's, nothing in a job tells them.
        "topology",
        "token",
    ]
    assert [field.name for field in fields(Deadlines)] == [
        "heartbeat_interval",
        "heartbeat_timeout",
        "drain_timeout",
        "join_timeout",
        "execute_timeout",
        "hang_timeout",
    ]


@pytest.mark.parametrize("moment", list(Moment))
def test_an_injection_reads_back_what_it_writes(moment):
    spec = f"kill:rank=5,step=6,at={moment.value}"
    assert Injection.parse(spec) == Injection(5, 6, moment)
    assert str(Injection.parse(spec)) == spec


def test_the_fields_order_does_not_matter_and_the_signals_name_is_accepted():
    assert Injection.parse("SIGKILL:at=mirror,step=1,rank=0") == Injection(0, 1, Moment.MIRROR, Fault.KILL)


def test_a_fault_may_come_whenever_the_step_is_computed():
    spec = "nan:rank=1,step=4,at=backward,times=always"
    assert Injection.parse(spec) == Injection(1, 4, Moment.BACKWARD, Fault.NAN, {"times": "always"})
    assert str(Injection.parse(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        pytest.param("burn:rank=5,step=6,at=backward", "unknown fault 'burn'", id="fault"),
        pytest.param("kill", "'' is not of the form key=value", id="empty"),
        pytest.param("kill:rank=5,step=6", "at is missing", id="missing"),
        pytest.param("kill:rank=5,step=6,at=lunch", "no moment 'lunch': at is one of forward backward", id="moment"),
        pytest.param("kill:rank=5,step=6,at=mirror,by=me", "unknown key 'by'", id="key"),
        pytest.param("nan:rank=1,step=6,at=forward,times=2", "times=2 is none of 1 always", id="times"),
        pytest.param("nan:rank=1,step=6,at=mirror", "in the thread that mirrors, which does not nan", id="no-tensor"),
        pytest.param("kill:rank=-5,step=6,at=mirror", "rank=-5", id="negative"),
        pytest.param("kill:rank=5,step=0,at=mirror", "step=0", id="step-zero"),
        pytest.param("kill:rank=five,step=6,at=mirror", "rank=five", id="no-number"),
        pytest.param("kill:rank=0,step=99999999999999999999,at=mirror", "step=99999999999999999999", id="huge"),
    ],
)
def test_a_wrong_injection_is_named(spec, says):
    with pytest.raises(ConfigError) as raised:
        Injection.parse(spec)
    assert says in str(raised.value)
    assert spec in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"nproc_per_node": 0}, "--nproc-per-node 0", id="no-ranks"),
        pytest.param({"nnodes": 2, "node_rank": 2, "master_port": 1, "token": "x"}, "--node-rank 2", id="node-rank"),
        pytest.param(
            {"nnodes": 2, "spare_nodes": 1, "node_rank": 3, "master_port": 1, "token": "x"},
            r"--node-rank 3: must be from 0 to 2, below --nnodes 2 \+ --spare-nodes 1",
            id="spare-node-rank",
        ),
        pytest.param(
            {"nnodes": 2, "node_rank": -1, "master_port": 1, "token": "x"},
            "--node-rank -1: must be from 0 to 1, below --nnodes 2",
            id="negative-node-rank",
        ),
        pytest.param({"spare_nodes": 1}, "--spare-nodes 1: give --nnodes 2 or more, too", id="spare-nodes-alone"),
        pytest.param(
            {"nnodes": 2, "spare_nodes": -1, "master_port": 1, "token": "x"},
            "--spare-nodes -1: must be at least 0",
            id="negative-spare-nodes",
        ),
        pytest.param({"nnodes": 2, "token": "x"}, "--master-port is missing", id="no-port"),
        pytest.param({"nnodes": 2, "master_port": 1}, "FLASHRECOVERY_TOKEN is not set", id="no-token"),
        pytest.param({"master_port": 70000}, "--master-port 70000", id="port"),
        pytest.param({"spares_per_node": -1}, "--spares-per-node -1", id="spares"),
        pytest.param({"topology": Path("nowhere.json")}, "--topology nowhere.json does not exist", id="topology"),
        pytest.param({"slow_factor": 0.9}, "--slow-factor 0.9: give more than 1, or 0", id="slow-factor"),
        pytest.param(
            {"nproc_per_node": 4, "injections": (Injection(4, 1, Moment.MIRROR),)},
            "no rank 4 in a job of 4",
            id="injected-rank",
        ),
        pytest.param(
            {"nproc_per_node": 4, "injections": (Injection(3, 1, None, Fault.DROP_HEARTBEATS),)},
            "needs no heartbeats of it, so nothing would follow: use two nodes",
            id="heartbeats-of-one-node",
        ),
        pytest.param(
            {"nnodes": 2, "nproc_per_node": 2, "master_port": 1, "token": "x"}
            | {"injections": (Injection(1, 1, None, Fault.DROP_HEARTBEATS),)},
            "so nothing would follow: name a rank from 2 on",
            id="heartbeats-of-node-0",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_when_it_is_built(settings, says):
    with pytest.raises(ConfigError, match=says):
        LaunchConfig(script="train.py", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"heartbeat_interval": 0.0}, id="zero"),
        pytest.param({"heartbeat_interval": 5.0}, id="interval-beyond-timeout"),
        pytest.param({"heartbeat_timeout": 30.0}, id="timeout-beyond-drain"),
        pytest.param({"join_timeout": -1.0}, id="negative"),
    ],
)
def test_deadlines_are_positive_and_in_order(settings):
    with pytest.raises(ConfigError, match="--"):
        Deadlines(**settings)


def test_ranks_sit_on_the_first_nodes_at_first_and_spare_ones_have_none():
    several = {"nnodes": 2, "spare_nodes": 1, "nproc_per_node": 2, "master_port": 1, "token": "x"}
    nodes = [LaunchConfig(script="train.py", node_rank=node_rank, **several) for node_rank in range(3)]
    assert {node.world_size for node in nodes} == {4}
    assert [node.first_seats(node.node_rank) for node in nodes] == [(0, 1), (2, 3), ()]
    assert [node.is_spare for node in nodes] == [False, False, True]


def test_the_token_is_never_shown():
    assert "secret" not in repr(LaunchConfig(script="train.py", token="secret"))
