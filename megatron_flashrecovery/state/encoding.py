"""Small values as bytes: msgpack with tensors as dtype, shape and bytes. Equal values give equal bytes; no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from megatron_flashrecovery.state.pieces import Value

_TENSOR = 1
_BIG_INT = 2
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class UnencodableValue(TypeError):
    """A value that would come back as something else; the message says where it is, and what would do instead."""


def encode_values(values: Mapping[str, Value]) -> bytes:
    """Tensors are copied to the host; keys are sorted. Raises ``UnencodableValue``."""
    return _encoder.encode({name: _portable(value, name) for name, value in values.items()})


def decode_values(data: bytes | memoryview) -> dict[str, Value]:
    """What ``encode_values`` was given, tensors on the CPU and in memory of their own."""
    decoded: dict[str, Value] = _decoder.decode(data)
    return decoded


def dtype_named(name: str) -> torch.dtype:
    """The dtype that ``str`` calls so (``torch.bfloat16``). Raises ``KeyError``."""
    return _DTYPES[name]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _portable(value: object, path: str) -> object:
    if isinstance(value, torch.Tensor):
        return _portable_tensor(value)
    # Exact types: a subclass (numpy.float64, an enum, a named tuple) would come back as its base.
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        assert isinstance(value, int)
        return value if -(1 << 63) <= value < 1 << 64 else _portable_int(value)
    if kind is list:
        assert isinstance(value, list)
        return [_portable(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if kind is dict:
        assert isinstance(value, dict)
        return {_key(key, path): _portable(item, f"{path}[{key!r}]") for key, item in value.items()}
    raise UnencodableValue(
        f"value {path} is a {kind.__module__}.{kind.__qualname__}: make it a number, str, bytes, list, dict or tensor"
    )


def _key(key: object, path: str) -> str:
    if type(key) is not str:
        raise UnencodableValue(f"value {path} has the key {key!r}: make it a str")
    return key


def _portable_int(value: int) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _portable_tensor(tensor: torch.Tensor) -> msgspec.msgpack.Ext:
    on_host = tensor.detach().cpu().contiguous()
    head = _encoder.encode((str(on_host.dtype), tuple(on_host.shape)))
    return msgspec.msgpack.Ext(_TENSOR, len(head).to_bytes(4, "little") + head + bytes(raw_bytes(on_host)))


def _from_ext(code: int, data: memoryview) -> Any:  # noqa: ANN401 - what msgspec expects of an extension hook
    match code:
        case 1:
            return _to_tensor(data)
        case 2:
            return int.from_bytes(data, "little", signed=True)
        case _:
            raise msgspec.DecodeError(f"extension {code} is none of ours: do all ranks run the same version?")


def _to_tensor(data: memoryview) -> torch.Tensor:
    start = 4 + int.from_bytes(data[:4], "little")
    dtype, shape = _head_decoder.decode(data[4:start])
    tensor = torch.empty(shape, dtype=dtype_named(dtype))
    if tensor.numel():
        raw_bytes(tensor)[:] = data[start:]
    return tensor


_head_decoder = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...]])
_decoder = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=_from_ext)
