"""What is in a slot: the manifest of the tensors, their bytes (the body), and the encoded values. It describes itself,
so a mirror is this one run of bytes and the network need not know what it means."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from megatron_flashrecovery.core.errors import ConfigError, SnapshotMismatch
from megatron_flashrecovery.state.encoding import encode_values
from megatron_flashrecovery.state.manifest import Manifest, decode_manifest, manifest_of
from megatron_flashrecovery.state.memory import aligned
from megatron_flashrecovery.state.pieces import TensorPiece, Value
from megatron_flashrecovery.state.slot import HEADER_NBYTES

_PREAMBLE = struct.Struct("<QQQ")
_PAGE = 4096
# Values grow: counters get longer, a data position gets a new entry. Twice what the first step has, and then some.
_VALUES_HEADROOM_NBYTES = 64 << 10


@dataclass(frozen=True)
class Content:
    """A snapshot's content, read in place: the views are of the slot's memory."""

    manifest: Manifest
    body: memoryview
    values: memoryview


def needed_bytes(tensors: Sequence[TensorPiece], values: Mapping[str, Value]) -> int:
    """How long a slot must be for these pieces, with room for values to grow."""
    manifest = manifest_of(tensors)
    start = body_at(len(manifest.encode()))
    room = 2 * len(encode_values(values)) + _VALUES_HEADROOM_NBYTES
    return aligned(HEADER_NBYTES + start + manifest.body_nbytes + room, _PAGE)


def body_at(manifest_nbytes: int) -> int:
    return aligned(_PREAMBLE.size + manifest_nbytes, _PAGE)


def content_nbytes(manifest: Manifest, packed: bytes, values: bytes, capacity: int) -> int:
    """How long the content will be. Raises ``ConfigError`` if ``capacity`` is less, saying by how much."""
    tensors_nbytes = body_at(len(packed)) + manifest.body_nbytes
    total = tensors_nbytes + len(values)
    if total > capacity:
        raise ConfigError(
            f"a snapshot of {tensors_nbytes} bytes of tensors and {len(values)} bytes of values is "
            f"{total - capacity} bytes longer than its slot: values may at most double after the first step"
        )
    return total


def write_frame(room: memoryview, manifest: Manifest, packed: bytes, values: bytes) -> None:
    """Everything but the body, whose tensors go to ``body_at(len(packed))``."""
    body_nbytes = manifest.body_nbytes
    _PREAMBLE.pack_into(room, 0, len(packed), body_nbytes, len(values))
    room[_PREAMBLE.size : _PREAMBLE.size + len(packed)] = packed
    start = body_at(len(packed)) + body_nbytes
    room[start : start + len(values)] = values


def read_content(content: memoryview) -> Content:
    """Raises ``SnapshotMismatch``: the parts do not add up, or the manifest cannot be read."""
    if len(content) < _PREAMBLE.size:
        raise SnapshotMismatch(f"a snapshot of {len(content)} bytes is too short to be one")
    manifest_nbytes, body_nbytes, values_nbytes = _PREAMBLE.unpack_from(content)
    start = body_at(manifest_nbytes)
    if start + body_nbytes + values_nbytes != len(content):
        raise SnapshotMismatch(f"the parts of a snapshot of {len(content)} bytes do not add up to its length")
    try:
        manifest = decode_manifest(content[_PREAMBLE.size : _PREAMBLE.size + manifest_nbytes])
    except msgspec.DecodeError as error:
        raise SnapshotMismatch(f"the manifest of a snapshot cannot be read: {error}") from None
    if manifest.body_nbytes != body_nbytes:
        raise SnapshotMismatch(f"a snapshot's tensors need {manifest.body_nbytes} bytes, but it has {body_nbytes}")
    return Content(manifest, content[start : start + body_nbytes], content[start + body_nbytes :])
