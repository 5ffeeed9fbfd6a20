"""Gives a handle every operation that the installed torch's ``ProcessGroup`` has, and C++ a face to ask for names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from megatron_flashrecovery.comm.communicator import Communicator
from megatron_flashrecovery.comm.operation import COLLECTIVES, POINT_TO_POINT, QUERIES, REFUSED
from megatron_flashrecovery.core.errors import ConfigError


class Handle(Protocol):
    def run(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> dist.Work | None: ...
    def live(self) -> Communicator: ...


def generate(handle: type[Handle]) -> None:
    """Only what is there: older torches lack some names, newer ones bring others (see ``operation.unclassified``)."""
    for names, make in (
        (COLLECTIVES | POINT_TO_POINT, _operation),
        (QUERIES, _query),
        (REFUSED, _refusal),
    ):
        for name in names:
            if hasattr(dist.ProcessGroup, name) and name not in handle.__dict__:
                method = make(name)
                method.__name__ = method.__qualname__ = name
                setattr(handle, name, method)


def put_on_face(group: dist.ProcessGroup, size: int, rank: int, backends: tuple[tuple[str, str], ...]) -> None:
    """Register backends for C++ to ask for a group's name and default type (DDP and functional collectives do).

    They cannot be the live ones, because a registered backend cannot be replaced, and an abstract one cannot be made
    from Python. No operation reaches them: the conformance suite would see its results.
    """
    make = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    faces = {name: make(rank, size) for _, name in backends}
    for device, name in backends:
        kind = dist.Backend.backend_type_map[name]
        dist.ProcessGroup._register_backend(group, torch.device(device), kind, faces[name])
    default = "nccl" if "nccl" in faces else backends[0][1]
    dist.ProcessGroup._set_default_backend(group, dist.Backend.backend_type_map[default])


def _operation(name: str) -> Callable[..., object]:
    def operation(self: Handle, *args: object, **kwargs: object) -> dist.Work | None:
        return self.run(name, args, kwargs)

    return operation


def _query(name: str) -> Callable[..., object]:
    def query(self: Handle, *args: object, **kwargs: object) -> object:
        answer: object = getattr(self.live().inner, name)(*args, **kwargs)
        return answer

    return query


def _refusal(name: str) -> Callable[..., object]:
    def refuse(self: Handle, *args: object, **kwargs: object) -> object:
        raise ConfigError(f"{name} ties groups to a communicator that recovery replaces: use new_group instead")

    return refuse
