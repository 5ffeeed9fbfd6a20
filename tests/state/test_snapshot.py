from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_flashrecovery.core.errors import ConfigError, SnapshotMismatch
from megatron_flashrecovery.state.content import needed_bytes
from megatron_flashrecovery.state.encoding import encode_values
from megatron_flashrecovery.state.fingerprint import fingerprint
from megatron_flashrecovery.state.pieces import TensorPiece
from megatron_flashrecovery.state.slot import HEADER_NBYTES
from megatron_flashrecovery.state.snapshot import Snapshots

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def state(fill: int = 1) -> list[TensorPiece]:
    tensors = {
        "masters": torch.arange(35.0).reshape(5, 7) + fill,
        "moments": torch.full((3, 4), float(fill), dtype=torch.bfloat16).t(),
        "count": torch.tensor(fill),
        "empty": torch.empty(0, 2),
        "flags": torch.tensor([True, False, fill > 1]),
        "odd": torch.full((3,), fill, dtype=torch.uint8),
    }
    return [TensorPiece(name, tensor, unique=True) for name, tensor in tensors.items()]


def same(left: list[TensorPiece], right: list[TensorPiece]) -> bool:
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(left, right, strict=True))


@pytest.fixture
def own(slots):
    made = Snapshots(4, slots(1 << 17))
    yield made
    made.close()


def taken(own: Snapshots, step: int, epoch: int = 0) -> None:
    own.capture(step, epoch, state(step), {"step": step, "rng": torch.arange(step)})
    own.seal(step)


@pytest.mark.parametrize("step", [6, 7])
def test_both_generations_can_be_restored(own, step):
    for each in (5, 6, 7):
        taken(own, each)
    restored = state(99)
    values = own.restore(step, restored)
    assert same(restored, state(step))
    assert (values["step"], values["rng"].tolist()) == (step, list(range(step)))


def test_a_restore_writes_in_place_also_into_parameters(own):
    parameter = torch.nn.Parameter(torch.ones(3))
    own.capture(1, 0, [TensorPiece("p", parameter, True)], {})
    own.seal(1)
    address = parameter.data_ptr()
    with torch.no_grad():
        parameter.zero_()
    own.restore(1, [TensorPiece("p", parameter, True)])
    assert parameter.tolist() == [1, 1, 1]
    assert (parameter.data_ptr(), parameter.requires_grad) == (address, True)


def test_a_snapshot_that_is_not_sealed_is_no_source(own):
    taken(own, 1)
    own.capture(2, 0, state(2), {})
    assert own.steps() == (1,)
    with pytest.raises(SnapshotMismatch, match=r"rank 4 has no snapshot of step 2, only of \[1\]"):
        own.restore(2, state())
    with pytest.raises(SnapshotMismatch, match="no sealed snapshot of step 2"):
        own.content(2)


def test_a_snapshot_is_what_the_tensors_were_when_it_was_captured(own):
    live = state(1)
    own.capture(1, 0, live, {})
    for piece in live:
        piece.tensor.zero_()
    own.seal(1)
    own.restore(1, live)
    assert same(live, state(1))


def test_what_is_announced_is_what_is_sent(own):
    own.capture(1, 3, state(), {"a": 1})
    offer = own.seal(1)
    again, content = own.content(1)
    assert (offer, len(content), fingerprint(content)) == (again, offer.nbytes, offer.fingerprint)
    assert (offer.id.rank, offer.id.step, offer.id.epoch) == (4, 1, 3)


def test_values_alone_make_a_snapshot(own):
    own.capture(1, 0, [], {"loss_scale": 2.0})
    own.seal(1)
    assert own.restore(1, []) == {"loss_scale": 2.0}


@pytest.mark.parametrize("where", ["manifest", "body", "values", "last byte"])
def test_a_corrupted_byte_is_a_mismatch_and_the_older_step_is_still_there(own, where):
    taken(own, 1)
    taken(own, 2)
    offer, content = own.content(2)
    content[{"manifest": 40, "body": 4096 + 8, "values": offer.nbytes - 30, "last byte": offer.nbytes - 1}[where]] ^= 4
    restored = state(99)
    with pytest.raises(SnapshotMismatch, match="rank 4, step 2, epoch 0 is not what was sealed"):
        own.restore(2, restored)
    assert same(restored, state(99))
    own.restore(1, restored)
    assert same(restored, state(1))


def test_a_body_that_has_become_nan_is_a_mismatch(own):
    taken(own, 1)
    _, content = own.content(1)
    torch.frombuffer(content, dtype=torch.float32, count=35, offset=4096).fill_(float("nan"))
    with pytest.raises(SnapshotMismatch):
        own.restore(1, state())


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        pytest.param(state()[:-1], "piece odd is not known here", id="one-fewer"),
        pytest.param([*state(), TensorPiece("more", torch.zeros(1), True)], "piece more is missing", id="one-more"),
        pytest.param(
            [TensorPiece("other", state()[0].tensor, True), *state()[1:]],
            "piece masters where this worker has other",
            id="name",
        ),
        pytest.param(
            [TensorPiece("masters", torch.zeros(7, 5), True), *state()[1:]],
            r"piece masters is torch.float32\[5, 7\], here torch.float32\[7, 5\]",
            id="shape",
        ),
        pytest.param(
            [TensorPiece("masters", torch.zeros(5, 7, dtype=torch.int32), True), *state()[1:]],
            r"piece masters is torch.float32\[5, 7\], here torch.int32\[5, 7\]",
            id="dtype",
        ),
    ],
)
def test_other_pieces_than_were_captured_are_a_mismatch_that_names_the_first(own, pieces, reason):
    taken(own, 1)
    with pytest.raises(SnapshotMismatch, match=f"rank 4, step 1 does not fit: {reason}"):
        own.restore(1, pieces)


def test_a_discard_forgets_what_is_sealed_and_what_is_captured(own):
    taken(own, 1)
    taken(own, 2)
    own.capture(3, 0, state(3), {})
    own.discard_newer_than(1)
    assert own.steps() in ((), (1,))
    with pytest.raises(SnapshotMismatch, match="discarded"):
        own.seal(3)
    taken(own, 2, epoch=1)
    assert own.steps()[-1] == 2


def test_a_discard_in_the_middle_of_sealing_wins(own, monkeypatch):
    taken(own, 1)
    own.capture(2, 0, state(2), {})

    def discard_meanwhile(content):
        own.discard_newer_than(1)
        return fingerprint(content)

    monkeypatch.setattr("megatron_flashrecovery.state.snapshot.fingerprint", discard_meanwhile)
    with pytest.raises(SnapshotMismatch, match="discarded before it was complete"):
        own.seal(2)
    assert own.steps() == (1,)


def test_a_worker_that_starts_anew_finds_what_its_predecessor_sealed(slots):
    memory = slots(1 << 17)
    for _ in range(2):
        before = Snapshots(4, memory)
        taken(before, 5)
        before.capture(6, 0, state(6), {})
        before.close()
    after = Snapshots(4, memory)
    restored = state(0)
    assert after.steps() == (5,)
    assert after.restore(5, restored)["step"] == 5
    assert same(restored, state(5))


def test_values_may_double_and_no_more(slots):
    first = {"x": b"v" * 100_000}
    own = Snapshots(0, slots(needed_bytes(state(), first) - HEADER_NBYTES))
    own.capture(1, 0, state(), {"x": b"v" * 200_000})
    own.seal(1)
    too_long = {"x": b"v" * 300_000}
    with pytest.raises(ConfigError, match=r"\d+ bytes longer than its slot") as caught:
        own.capture(2, 0, state(), too_long)
    assert f"{len(encode_values(too_long))} bytes of values" in str(caught.value)
    own.capture(2, 0, state(), {})
    own.seal(2)
    assert own.steps() == (1, 2)


def test_a_mirror_of_its_own_rank_can_be_received_and_restored(slots, own):
    taken(own, 1)
    offer, content = own.content(1)
    replacement = Snapshots(4, slots(1 << 17))
    intake = replacement.intake()
    intake.begin(offer)[:] = content
    intake.commit(offer)
    restored = state(0)
    replacement.restore(1, restored)
    assert same(restored, state(1))
    assert intake.begin(offer) is None


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()), max_size=6
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pieces_come_back_bit_for_bit(slots, shapes, seed):
    generator = torch.Generator().manual_seed(seed)

    def make() -> list[TensorPiece]:
        tensors = [torch.randint(0, 2, shape, generator=generator).to(dtype) for dtype, shape, _ in shapes]
        turned = [
            tensor.t() if turn and tensor.dim() == 2 else tensor
            for tensor, (_, _, turn) in zip(tensors, shapes, strict=True)
        ]
        return [TensorPiece(f"p{index}", tensor, True) for index, tensor in enumerate(turned)]

    before, after = make(), make()
    own = Snapshots(0, slots(needed_bytes(before, {})))
    own.capture(1, 0, before, {})
    own.seal(1)
    own.restore(1, after)
    assert all(torch.equal(a.tensor.float(), b.tensor.float()) for a, b in zip(before, after, strict=True))
