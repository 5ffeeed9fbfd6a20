"""Live state on its way from a data-parallel peer to a replacement: its bytes in order, through one staging buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import torch

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.core.ids import Epoch, Rank, Step
from megatron_flashrecovery.core.snapshot import Offer, SnapshotId
from megatron_flashrecovery.state.encoding import raw_bytes
from megatron_flashrecovery.state.manifest import decode_manifest, difference, manifest_of
from megatron_flashrecovery.state.pieces import TensorPiece

_STAGING_NBYTES = 32 << 20


def live_offer(rank: Rank, step: Step, epoch: Epoch, pieces: Sequence[TensorPiece]) -> Offer:
    """What announces ``read_live``; its fingerprint follows the bytes."""
    manifest = manifest_of(pieces)
    nbytes = sum(piece.nbytes for piece in pieces)
    return Offer(SnapshotId(rank, step, epoch), nbytes, manifest=manifest.encode())


def read_live(pieces: Sequence[TensorPiece]) -> Iterator[memoryview]:
    """The bytes of the pieces, one after the other. Each view is good until the next one is asked for."""
    for piece in pieces:
        flat = piece.tensor.detach().contiguous().reshape(-1)
        if flat.device.type == "cpu":
            if piece.nbytes:
                yield raw_bytes(flat)
            continue
        step = max(1, _STAGING_NBYTES // flat.element_size())
        for start in range(0, len(flat), step):
            yield raw_bytes(flat[start : start + step].cpu())


def write_live(pieces: Sequence[TensorPiece], offer: Offer) -> Iterator[memoryview]:
    """Where the bytes of ``read_live`` go: fill each view, then ask for the next one; the pieces are written then.

    Raises ``SnapshotMismatch`` before the first: the giver's pieces are not these.
    """
    try:
        reason = difference(decode_manifest(offer.manifest), manifest_of(pieces))
    except msgspec.DecodeError as error:
        reason = f"its manifest cannot be read: {error}"
    if reason is not None:
        raise SnapshotMismatch(f"live state of rank {offer.id.rank}, step {offer.id.step} does not fit: {reason}")
    for piece in pieces:
        yield from _write_tensor(piece.tensor.detach())


def _write_tensor(tensor: torch.Tensor) -> Iterator[memoryview]:
    if not tensor.numel():
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield raw_bytes(tensor)
        return
    with_all = torch.empty(tensor.shape, dtype=tensor.dtype)
    yield raw_bytes(with_all)
    tensor.copy_(with_all)
