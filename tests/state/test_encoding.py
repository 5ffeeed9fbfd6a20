from __future__ import annotations

import collections
import enum

import msgspec
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_flashrecovery.state.encoding import UnencodableValue, decode_values, encode_values

# Half-precision complex numbers are an experiment of torch's, and warn; quantised ones are no plain bytes.
DTYPES = sorted(
    {
        dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and dtype is not torch.complex32 and not str(dtype).startswith("torch.q")
    },
    key=str,
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_values_come_back_as_they_were(values):
    decoded = decode_values(encode_values(values))
    assert decoded == values
    assert repr(sorted(decoded.items())) == repr(sorted(decode_values(encode_values(decoded)).items()))


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_equal_values_give_equal_bytes(values):
    assert encode_values(dict(reversed(values.items()))) == encode_values(values)


@pytest.mark.parametrize("value", [True, 1, 1.0, -0.0, 2**64, -(2**200), 2**63, float("inf")], ids=repr)
def test_a_number_keeps_its_type_and_sign(value):
    (decoded,) = decode_values(encode_values({"x": value})).values()
    assert (type(decoded), repr(decoded)) == (type(value), repr(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_a_tensor_keeps_dtype_shape_and_every_bit(dtype, shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    tensor = (torch.arange(count, dtype=torch.uint8) % 2).view(dtype).reshape(shape)
    decoded = decode_values(encode_values({"rng": [tensor]}))["rng"][0]
    assert (decoded.dtype, decoded.shape) == (dtype, shape)
    assert torch.equal(decoded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_decoded_tensor_has_memory_of_its_own():
    data = bytearray(encode_values({"x": torch.ones(4)}))
    tensor = decode_values(memoryview(data))["x"]
    data[:] = bytes(len(data))
    assert torch.equal(tensor, torch.ones(4))


def test_a_view_that_needs_a_gradient_is_encoded_too():
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).t()
    assert torch.equal(decode_values(encode_values({"x": tensor}))["x"], tensor.detach())


@pytest.mark.parametrize(
    ("value", "place"),
    [
        pytest.param((1, 2), r"x is a builtins.tuple", id="tuple"),
        pytest.param([{"k": {1}}], r"x\[0\]\['k'\] is a builtins.set", id="set"),
        pytest.param(numpy.float64(1), r"x is a numpy.float64", id="numpy-scalar"),
        pytest.param(numpy.zeros(1), r"numpy.ndarray", id="numpy-array"),
        pytest.param({1: 2}, r"x has the key 1", id="key"),
        pytest.param(enum.IntEnum("E", "A").A, r"\.E:", id="enum"),
        pytest.param(collections.OrderedDict(), r"collections.OrderedDict", id="dict-subclass"),
        pytest.param(torch.float32, r"torch.dtype", id="dtype"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused_by_its_place(value, place):
    with pytest.raises(UnencodableValue, match=place):
        encode_values({"x": value})


def test_an_extension_of_another_version_is_refused():
    data = msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(99, b"")})
    with pytest.raises(msgspec.DecodeError, match="extension 99"):
        decode_values(data)
