"""The CPU stand-in for a CUDA device (installed by this tier's conftest, as the example does it)."""

import subprocess
import sys

import pytest
import torch

from megatron_flashrecovery.testing import cpu_device
from megatron_flashrecovery.testing.cpu_tensors import on_cpu


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda"), torch.device("cuda", 1)], ids=str)
def test_every_name_of_a_cuda_device_means_the_cpu(device):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones(1).new_empty(size=[2], device=device).device.type == "cpu"
    assert torch.zeros(2).to(device=device).device.type == "cpu"
    assert torch.zeros(2).to(device).device.type == "cpu"


@pytest.mark.parametrize("device", [None, "cpu", "meta", True, torch.float64], ids=str)
def test_what_names_no_cuda_device_stays_as_it_is(device):
    assert on_cpu(device) is device


def test_whoever_asks_for_a_gpu_is_told_the_truth():
    assert cpu_device.is_installed()
    assert not torch.cuda.is_available()
    assert not torch.zeros(1).is_cuda


def test_the_device_draws_from_the_cpu_generator():
    torch.cuda.manual_seed(5)
    expected = torch.cuda.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), expected)


def test_events_measure_time_and_streams_do_nothing():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        end.record()
    assert start.elapsed_time(end) >= 0.0


def test_installing_twice_and_uninstalling_gives_torch_back():
    run_alone("""
        def patched(): return torch.empty, torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream
        before = patched()
        cpu_device.install()
        cpu_device.install()
        assert torch.zeros(1, device="cuda").type() == "torch.cuda.FloatTensor"
        cpu_device.uninstall()
        assert patched() == before
        assert not cpu_device.is_installed()
    """)


def test_beside_a_gpu_nothing_happens():
    run_alone("""
        torch.cuda.is_available = lambda: True
        empty = torch.empty
        cpu_device.install()
        assert torch.empty is empty and not cpu_device.is_installed()
    """)


def run_alone(code: str) -> None:
    """In a process of its own, because this one needs its stand-in."""
    lines = [line.strip() for line in code.strip().splitlines()]
    script = "\n".join(["import torch", "from megatron_flashrecovery.testing import cpu_device", *lines])
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
