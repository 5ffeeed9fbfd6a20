"""Copies between live tensors and host memory: at once on the CPU, on a stream of their own for a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import torch

from megatron_flashrecovery.core.errors import ConfigError, SnapshotMismatch
from megatron_flashrecovery.state.tensor_fingerprint import word_sums

Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Target and source, of the same dtype and shape."""


class Copier(Protocol):
    def prepare(self, memory: torch.Tensor) -> None:
        """Host memory (flat, uint8) that copies will go to or come from, many times."""

    def copy_out(self, pairs: Sequence[Pair]) -> Callable[[], None]:
        """From live tensors to host memory. The returned call waits, on any thread, until the bytes are there; until
        then nobody may write to the sources. It raises ``SnapshotMismatch`` if other bytes are there."""

    def copy_in(self, pairs: Sequence[Pair]) -> None:
        """From host memory to live tensors; done when it returns."""

    def close(self) -> None:
        """Undo ``prepare``."""


def copier_for(tensors: Iterable[torch.Tensor]) -> Copier:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    if not devices:
        return HostCopier()
    if len(devices) > 1:
        raise ConfigError(f"pieces of one rank are on several devices ({', '.join(sorted(map(str, devices)))})")
    return DeviceCopier(devices.pop())


class HostCopier:
    """Everything is on the CPU."""

    def prepare(self, memory: torch.Tensor) -> None:
        pass

    def copy_out(self, pairs: Sequence[Pair]) -> Callable[[], None]:
        _copy(pairs)
        return _nothing

    def copy_in(self, pairs: Sequence[Pair]) -> None:
        _copy(pairs)

    def close(self) -> None:
        pass


class DeviceCopier:
    """Pinned host memory and a side stream (no GPU has run this yet: ``-m gpu``).

    The sources are next written by the optimizer, behind the gate, and the gate is passed only after the mirror of
    these copies is acknowledged: so the training stream need not wait for the side stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered: list[int] = []

    def prepare(self, memory: torch.Tensor) -> None:
        # Not pin_memory: the memory is the agent's. Pageable copies are correct too, only slow and synchronous, so a
        # refused registration (a low locked-memory limit) is no error.
        address = memory.data_ptr()
        if int(torch.cuda.cudart().cudaHostRegister(address, memory.numel(), 0)) == 0:  # type: ignore[no-untyped-call]
            self._registered.append(address)
        else:
            # The device remembers the refusal as its last error, and blames the next kernel for it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self._device).neg_()

    def copy_out(self, pairs: Sequence[Pair]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(pairs)
            for _, source in pairs:
                source.record_stream(self._stream)
            said = torch.empty(len(pairs), dtype=torch.int64, pin_memory=True)
            if pairs:
                said.copy_(word_sums([source for _, source in pairs]), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)

        def wait() -> None:
            done.synchronize()
            check_copies([target for target, _ in pairs], said)

        return wait

    def copy_in(self, pairs: Sequence[Pair]) -> None:
        _copy(pairs)
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._registered.clear()


def check_copies(targets: Sequence[torch.Tensor], said: torch.Tensor) -> None:
    """Whether host memory has what the device says it had (``word_sums``). Mirrors that held NaN while their owners
    were clean, fingerprinted as they were, are how others lost a cluster."""
    if targets and not torch.equal(word_sums(targets), said):
        raise SnapshotMismatch("a copy in host memory is not what the device holds: it is no snapshot")


def _copy(pairs: Sequence[Pair]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source, non_blocking=True)


def _nothing() -> None:
    pass
