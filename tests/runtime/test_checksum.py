"""What data-parallel peers say of the parameters that they share."""

import pytest
import torch

from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.runtime.checksum import Checksum, differing
from megatron_flashrecovery.runtime.injection import Fault
from megatron_flashrecovery.runtime.tensor_faults import damage
from megatron_flashrecovery.state.pieces import TensorPiece

STEPS = 5


def pieces(dtype=torch.float32):
    torch.manual_seed(1)
    return [
        TensorPiece(f"p{index}", torch.randn(size).to(dtype), unique=False) for index, size in enumerate((7, 1, 16))
    ]


def body(checksum):
    return memoryview(checksum.piece.tensor.numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", range(3))
def test_one_wrong_bit_anywhere_shows_within_so_many_steps(which, dtype):
    mine, theirs = pieces(dtype), pieces(dtype)
    own, other = Checksum(mine, STEPS), Checksum(theirs, STEPS)
    damage(Fault.BITFLIP, theirs[which].tensor)
    found = []
    for step in range(10, 10 + STEPS):
        own.take(Step(step))
        other.take(Step(step))
        found += differing(body(own), {Rank(3): body(other)})[1]
    assert found == [3]


def test_the_same_parameters_never_differ_and_other_steps_say_nothing():
    own, other = Checksum(pieces(), STEPS), Checksum(pieces(), STEPS)
    for step in range(2 * STEPS):
        own.take(Step(step))
        other.take(Step(step))
        assert differing(body(own), {Rank(3): body(other), Rank(4): memoryview(b"")}) == (step, [])
    other.take(Step(99))
    assert differing(body(own), {Rank(3): body(other)})[1] == []


def test_more_parts_than_values_are_fine():
    own = Checksum(pieces()[1:2], 64)
    sums = set()
    for step in range(64):
        own.take(Step(step))
        sums.add(int(own.piece.tensor[1]))
    assert len(sums) == 2, "one part has the value, the others have none"
