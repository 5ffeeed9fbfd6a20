"""The bill counts two steps of own and of guests' state, and what crosses between nodes."""

from __future__ import annotations

import pytest

from megatron_flashrecovery.core.bill import NodeBill, bill, readable
from megatron_flashrecovery.core.ids import NodeId, Rank
from megatron_flashrecovery.core.mirroring import Placement
from megatron_flashrecovery.core.model_size import GptShape, Parameters, count_parameters, unique_nbytes
from megatron_flashrecovery.core.outlook import Arrangement, Outlook, outlook

A, B = NodeId("a"), NodeId("b")
NODES = {Rank(0): A, Rank(1): A, Rank(2): B}


def test_memory_is_two_steps_of_own_and_of_guests_and_only_other_nodes_cost_network():
    placement = Placement({Rank(0): Rank(2), Rank(1): Rank(0), Rank(2): Rank(1)})
    found = bill(placement, NODES, {Rank(0): 10, Rank(1): 20, Rank(2): 30})
    assert found.nodes == (
        NodeBill(A, ranks=2, own=60, guests=100, sent=10, received=30),
        NodeBill(B, ranks=1, own=60, guests=20, sent=30, received=10),
    )
    assert (found.mirrored, found.memory) == (30, 240)


def test_a_node_without_enough_memory_is_named_with_the_remedy():
    found = bill(Placement({Rank(0): Rank(2), Rank(2): Rank(0)}), NODES, {Rank(0): 2**30, Rank(2): 2**30})
    assert found.shortage({A: 4 * 2**30, B: 4 * 2**30}) is None
    assert "node b has 1 GiB of free memory and needs 4 GiB" in (found.shortage({A: 2**40, B: 2**30}) or "")


@pytest.mark.parametrize(
    ("peers", "kind", "instances", "nbytes"),
    [
        pytest.param(4, "distributed", 1, 3000, id="a-share"),
        pytest.param(4, "plain", 1, 0, id="peers-have-it"),
        pytest.param(4, "distributed", 2, 0, id="another-instance-has-it"),
        pytest.param(1, "plain", 1, 12000, id="nobody-else-has-it"),
        pytest.param(1, "distributed", 1, 12000, id="nobody-else-has-a-share"),
    ],
)
def test_unique_is_what_no_peer_has(peers, kind, instances, nbytes):
    assert unique_nbytes(1000, peers, kind, instances) == nbytes


def test_a_known_model_has_the_known_number_of_parameters():
    gpt3 = GptShape(num_layers=96, hidden_size=12288, num_attention_heads=96, vocab_size=51200)
    assert count_parameters(gpt3).dense == pytest.approx(175e9, rel=0.01)


def test_experts_are_counted_apart():
    shape = GptShape(
        num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=10, num_experts=4, moe_ffn_hidden_size=16
    )
    assert count_parameters(shape) == Parameters(dense=2 * (256 + 32 + 16) + 80 + 8, expert=2 * 4 * 2 * 8 * 16)


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (5 * 2**40, "5 TiB")])
def test_bytes_are_written_for_people(nbytes, text):
    assert readable(nbytes) == text


def test_odd_groups_and_fatal_nodes_are_warned_of():
    peers = {Rank(0): (Rank(0), Rank(1)), Rank(1): (Rank(0), Rank(1)), Rank(2): (Rank(2),)}
    found = outlook(Arrangement(NODES, peers, dict.fromkeys(NODES, 1), sharded=False))
    assert isinstance(found, Outlook)
    said = "\n".join(found.warnings)
    assert "no data-parallel peer" in said
    assert "differ in size (1, 2)" in said
    assert "these nodes is not survived: a" in said
