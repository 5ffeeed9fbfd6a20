from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from megatron_flashrecovery.core.errors import ConfigError, SnapshotMismatch
from megatron_flashrecovery.state.content import needed_bytes
from megatron_flashrecovery.state.copying import HostCopier, check_copies, copier_for
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.pieces import TensorPiece
from megatron_flashrecovery.state.snapshot import Snapshots
from megatron_flashrecovery.state.tensor_fingerprint import tensors_fingerprint, word_sums


def test_pieces_on_the_cpu_are_copied_at_once():
    assert isinstance(copier_for([torch.ones(1)]), HostCopier)
    assert isinstance(copier_for([]), HostCopier)


def test_pieces_on_two_devices_are_an_error_that_names_them():
    with pytest.raises(ConfigError, match="cuda:0, cuda:1"):
        copier_for([SimpleNamespace(device=torch.device(f"cuda:{index}")) for index in range(2)])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda copy: copy.fill_(float("nan")), id="nan"),
        pytest.param(lambda copy: copy[50:].zero_(), id="only-half-has-arrived"),
        pytest.param(lambda copy: copy.view(torch.uint8)[399:].bitwise_xor_(1), id="one-bit"),
    ],
)
def test_a_copy_that_is_not_what_the_device_holds_is_no_snapshot(spoil):
    device = [torch.ones(3, dtype=torch.bfloat16), torch.arange(100.0) + 1]
    copies = [tensor.clone() for tensor in device]
    check_copies(copies, word_sums(device))
    spoil(copies[1])
    with pytest.raises(SnapshotMismatch, match="not what the device holds"):
        check_copies(copies, word_sums(device))


@pytest.mark.gpu
def test_a_device_comes_back_bit_for_bit():
    live = [torch.randn(1 << 20, device="cuda"), torch.randn(7, 5, device="cuda").bfloat16().t()]
    pieces = [TensorPiece(f"p{index}", tensor, True) for index, tensor in enumerate(live)]
    fd = os.memfd_create("gpu")
    os.ftruncate(fd, 2 * needed_bytes(pieces, {}))
    memory = Memory(fd)
    own = Snapshots(0, memory.slots, copier_for(live))
    before = [tensor.clone() for tensor in live]
    own.capture(1, 0, pieces, {})
    own.seal(1)
    for tensor in live:
        tensor.zero_()
    own.restore(1, pieces)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(live, before, strict=True))
    own.close()
    memory.close()
    os.close(fd)


@pytest.mark.gpu
def test_host_and_device_agree_on_a_digest():
    tensor = torch.randn(3_000_001)
    assert tensors_fingerprint([("t", tensor)]) == tensors_fingerprint([("t", tensor.cuda())])
