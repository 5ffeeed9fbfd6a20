from __future__ import annotations

import weakref

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.state import tensor_fingerprint
from megatron_flashrecovery.state.fingerprint import CHUNK_NBYTES, NBYTES, fingerprint
from megatron_flashrecovery.state.tensor_fingerprint import tensors_fingerprint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool]


def digest(*tensors: torch.Tensor) -> bytes:
    return tensors_fingerprint([(f"t{index}", tensor) for index, tensor in enumerate(tensors)])


@given(st.binary(max_size=500), st.integers(0, 500))
def test_a_fingerprint_does_not_depend_on_how_the_bytes_are_cut(data, at):
    assert fingerprint(data[:at], memoryview(data[at:])) == xxhash.xxh3_128_digest(data)


def test_a_fingerprint_of_more_than_one_chunk_is_that_of_the_whole():
    data = bytes(range(256)) * (CHUNK_NBYTES // 256) + b"tail"
    assert fingerprint(data) == xxhash.xxh3_128_digest(data)
    assert len(fingerprint()) == NBYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (7, 5), (1 << 17, 3)], ids=str)
def test_equal_tensors_have_one_digest_and_a_flipped_bit_another(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    if tensor.numel():
        other = tensor.clone()
        other.reshape(-1).view(torch.uint8)[-1] ^= 1
        assert digest(other) != digest(tensor)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param([torch.zeros(2)], [-torch.zeros(2)], id="two-signs-of-zero"),
        pytest.param([torch.zeros(1 << 18)], [-torch.zeros(1 << 18)], id="all-signs-of-zero"),
        pytest.param([torch.zeros(3)], [torch.zeros(4)], id="length"),
        pytest.param([torch.zeros(2, 2)], [torch.zeros(4)], id="shape"),
        pytest.param([torch.zeros(4)], [torch.zeros(4, dtype=torch.int32)], id="dtype"),
        pytest.param([torch.tensor([1, 2])], [torch.tensor([2, 1])], id="order-of-elements"),
        pytest.param([torch.ones(1), torch.zeros(1)], [torch.zeros(1), torch.ones(1)], id="order-of-tensors"),
        pytest.param([torch.zeros(1)], [torch.zeros(1), torch.zeros(0)], id="number-of-tensors"),
    ],
)
def test_what_differs_has_another_digest(left, right):
    assert digest(*left) != digest(*right)


def test_a_rows_place_counts():
    tensor = torch.arange(3 << 17)
    swapped = torch.cat([tensor[1 << 18 :], tensor[1 << 17 : 1 << 18], tensor[: 1 << 17]])
    assert digest(swapped) != digest(tensor)


@pytest.mark.parametrize("size", [1, 3, 5000, 1 << 15, (1 << 15) + 1, 1 << 18], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16], ids=str)
def test_a_flipped_bit_is_seen_wherever_it_is_among_large_and_small_tensors(dtype, size):
    tensors = [torch.zeros(number, dtype=dtype) for number in (7, size, 0, size, 1, 9)]
    seen = {digest(*tensors)}
    for tensor in tensors:
        for at in {0, len(tensor) // 2, len(tensor) - 1} if len(tensor) else ():
            tensor.view(torch.uint8).reshape(len(tensor), -1)[at, 0] ^= 1
            seen.add(digest(*tensors))
            tensor.view(torch.uint8).reshape(len(tensor), -1)[at, 0] ^= 1
    assert len(seen) == 1 + sum(len({0, len(tensor) // 2, len(tensor) - 1}) for tensor in tensors if len(tensor))


def test_of_large_tensors_that_have_to_be_copied_there_is_one_copy_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), []

    def words(tensor):
        most.append(len(alive))
        made = Words(tensor)
        alive.add(made)
        return made

    class Words(torch.Tensor):
        def __new__(cls, tensor):
            return tensor.reshape(-1).view(torch.int64).clone().as_subclass(cls)

    monkeypatch.setattr(tensor_fingerprint, "_words", words)
    digest(*(torch.zeros(1 << 18, dtype=torch.int64) for _ in range(5)))
    assert max(most) == 0


def test_names_count():
    assert tensors_fingerprint([("a", torch.zeros(1))]) != tensors_fingerprint([("b", torch.zeros(1))])


@given(st.lists(st.integers(0, (1 << 21) - 1), min_size=1, max_size=2, unique=True), st.integers(0, 31))
@settings(max_examples=60, deadline=None)
def test_no_one_or_two_flipped_bits_go_unseen(elements, bit):
    tensor = torch.zeros(1 << 21, dtype=torch.int32)
    before = digest(tensor[: 1 << 21])
    for element in elements:
        tensor[element] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert digest(tensor) != before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_has_the_digest_of_its_copy(dtype):
    whole = torch.arange(77).reshape(7, 11).to(dtype)
    for view in (whole[1:], whole[:, 1:], whole.t(), whole[3]):
        assert digest(view) == digest(view.clone())


def test_a_nan_payload_counts():
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest(nans[:1]) != digest(nans[1:])
