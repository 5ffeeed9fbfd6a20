from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_flashrecovery.core.errors import SnapshotMismatch
from megatron_flashrecovery.state.live import live_offer, read_live, write_live
from megatron_flashrecovery.state.pieces import TensorPiece


def pieces(fill: float) -> list[TensorPiece]:
    tensors = [
        torch.full((3, 4), fill),
        torch.full((2, 5), fill, dtype=torch.bfloat16).t(),
        torch.empty(0),
        torch.tensor(fill),
    ]
    return [TensorPiece(f"p{index}", tensor, unique=False) for index, tensor in enumerate(tensors)]


def test_live_state_arrives_bit_for_bit():
    giver, taker = pieces(3.0), pieces(0.0)
    offer = live_offer(1, 5, 0, giver)
    sent = b"".join(read_live(giver))
    assert len(sent) == offer.nbytes
    at = 0
    for view in write_live(taker, offer):
        view[:] = sent[at : at + len(view)]
        at += len(view)
    assert at == len(sent)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(giver, taker, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda offer: live_offer(1, 5, 0, pieces(3.0)[1:]), "piece p1 where this worker has p0", id="pieces"
        ),
        pytest.param(lambda offer: replace(offer, manifest=b"\xc1"), "cannot be read", id="garbage"),
    ],
)
def test_other_pieces_are_refused_before_anything_is_written(change, reason):
    taker = pieces(0.0)
    with pytest.raises(SnapshotMismatch, match=f"rank 1, step 5 does not fit: .*{reason}"):
        next(write_live(taker, change(live_offer(1, 5, 0, pieces(3.0)))))
    assert taker[0].tensor.sum() == 0
