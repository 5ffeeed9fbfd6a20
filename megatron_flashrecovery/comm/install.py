"""Makes every group that a process creates a stable handle, by c10d's own bookkeeping.

All of ``init_process_group``, ``new_group``, ``new_subgroups*`` and device meshes end in one function of c10d, which
can be told to use a backend that somebody registered. We register one whose "backend" is the handle, and ask for it
there; names, tags and rank mappings stay c10d's business. What c10d then says about the group (``get_backend``) is put
right to the backend inside.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.core.errors import ConfigError, SeamChanged
from megatron_flashrecovery.core.ids import Rank

BACKEND = "flashrecovery"


@dataclass(frozen=True)
class GroupRequest:
    """What a framework asked c10d for."""

    ranks: tuple[Rank, ...]
    rank: int
    backends: tuple[tuple[str, str], ...]
    timeout: timedelta
    description: str
    options: Any
    device: torch.device | None


class GroupMaker(Protocol):
    rank: Rank
    world_size: int

    @property
    def joining(self) -> bool: ...
    def bookkeeping_store(self) -> Store: ...
    def create(self, request: GroupRequest) -> FlashGroup: ...


class Installation:
    """What is patched, and how to take it back. One at a time in a process."""

    def __init__(self, maker: GroupMaker) -> None:
        self._maker = maker
        self._request: GroupRequest | None = None
        self._undo: list[tuple[Any, str, Any]] = []
        self._original: dict[str, Callable[..., Any]] = {}
        self._signature: dict[str, inspect.Signature] = {}

    def install(self) -> None:
        if BACKEND.upper() in dist.Backend._plugins:
            raise ConfigError("flash recovery's groups are already installed in this process")
        dist.Backend.register_backend(BACKEND, self._create, extended_api=True, devices=["cpu", "cuda"])
        replacements = self._replacements()
        for name in replacements:
            original = getattr(c10d, name, None)
            if original is not None:
                self._original[name] = original
                self._signature[name] = inspect.signature(original)
            elif name != "shrink_group":  # older torch has none
                raise SeamChanged(f"torch {torch.__version__} has no distributed_c10d.{name}")
        # torch's own modules (device meshes, pipelining) have imported some of these names. No other module is touched:
        # each of thousands would cost a worker a copy of the page that it shares with the fork server.
        for key in [key for key in tuple(sys.modules) if key.startswith("torch.distributed")]:
            module = sys.modules.get(key)
            held = getattr(module, "__dict__", {})
            for name, original in self._original.items():
                if held.get(name) is original:
                    self._undo.append((module, name, original))
                    setattr(module, name, replacements[name])

    def uninstall(self) -> None:
        for module, name, original in reversed(self._undo):
            setattr(module, name, original)
        self._undo.clear()
        dist.Backend._plugins.pop(BACKEND.upper(), None)

    def _replacements(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "init_process_group": self._init_process_group,
            "_new_process_group_helper": self._new_process_group_helper,
            "_get_split_source": _no_split_source,
            "_store_based_barrier": self._store_based_barrier,
            "split_group": _split_group,
            "shrink_group": _refuse_shrink,
            "batch_isend_irecv": self._batch_isend_irecv,
        }

    def _create(self, _options: object, _backend_options: object) -> FlashGroup:
        request, self._request = self._request, None
        assert request is not None, "only our own helper asks for this backend"
        return self._maker.create(request)

    def _init_process_group(self, *args: object, **kwargs: object) -> None:
        original = self._original["init_process_group"]
        arguments = self._signature["init_process_group"].bind(*args, **kwargs).arguments
        for name, ours in (("rank", self._maker.rank), ("world_size", self._maker.world_size)):
            if arguments.get(name, -1) not in (-1, ours):
                raise ConfigError(f"init_process_group was given {name} {arguments[name]}, the launcher says {ours}")
        # Never a rendezvous by environment: the store must outlive every worker, the one of rank 0 included.
        arguments.pop("init_method", None)
        arguments |= {"store": self._maker.bookkeeping_store(), "rank": self._maker.rank}
        arguments["world_size"] = self._maker.world_size
        original(**arguments)

    def _new_process_group_helper(self, *args: object, **kwargs: object) -> tuple[dist.ProcessGroup, Store | None]:
        original = self._original["_new_process_group_helper"]
        arguments = self._signature["_new_process_group_helper"].bind(*args, **kwargs).arguments
        backend = dist.Backend(arguments["backend"])
        config = c10d.BackendConfig(backend)
        device = arguments.pop("device_id", None)
        ranks = arguments["global_ranks_in_group"] or range(arguments["group_size"])
        self._request = GroupRequest(
            ranks=tuple(Rank(rank) for rank in ranks),
            rank=arguments["group_rank"] if arguments["group_rank"] is not None else -1,
            backends=tuple((kind, str(name)) for kind, name in config.get_device_backend_map().items()),
            timeout=arguments["timeout"],
            description=arguments.get("group_desc") or "group",
            options=arguments.get("backend_options"),
            device=device,
        )
        arguments["backend"] = dist.Backend(BACKEND)
        try:
            group, store = original(**arguments)
        finally:
            self._request = None
        if isinstance(group, FlashGroup):
            c10d._world.pg_map[group] = (str(backend), store)
            c10d._world.pg_backend_config[group] = str(config)
        return group, store

    def _store_based_barrier(self, *args: object, **kwargs: object) -> None:
        if not self._maker.joining:
            self._original["_store_based_barrier"](*args, **kwargs)

    def _batch_isend_irecv(self, p2p_op_list: list[dist.P2POp]) -> Sequence[dist.Work]:
        groups = {op.group or c10d._get_default_group() for op in p2p_op_list}
        group = next(iter(groups), None)
        if not isinstance(group, FlashGroup) or len(groups) > 1:
            return self._original["batch_isend_irecv"](p2p_op_list)  # type: ignore[no-any-return]
        c10d._check_p2p_op_list(p2p_op_list)
        group._start_coalescing(p2p_op_list[0].tensor.device)
        for op in p2p_op_list:
            tensor = torch.view_as_real(op.tensor) if op.tensor.is_complex() else op.tensor
            (group.send if op.op is dist.isend else group.recv)([tensor], op.group_peer, op.tag)
        work = group._end_coalescing(p2p_op_list[0].tensor.device)
        # As many as torch returns without coalescing, for callers that pair them with their operations.
        return [work] * (1 if group.coalesces(p2p_op_list[0].tensor.device) else len(p2p_op_list))


def _no_split_source(_pg: object) -> None:
    """A communicator split from another one shares its fate; ours are replaced one by one."""


def _split_group(
    parent_pg: dist.ProcessGroup | None = None,
    split_ranks: list[list[int]] | None = None,
    timeout: timedelta | None = None,
    pg_options: object = None,
    group_desc: str | None = None,
    backend: str | None = None,
) -> dist.ProcessGroup | None:
    """As torch's, but each part gets a communicator of its own instead of a part of the parent's."""
    parent = dist.get_process_group_ranks(parent_pg or c10d._get_default_group())
    for part in split_ranks or []:
        ranks = sorted(parent[position] for position in part)
        if dist.get_rank() in ranks:
            part_group: dist.ProcessGroup = dist.new_group(
                ranks,
                timeout=timeout,
                backend=backend or dist.get_backend(parent_pg),
                pg_options=pg_options,
                use_local_synchronization=True,
                group_desc=group_desc,
            )
            return part_group
    if not split_ranks:
        raise ValueError("split_ranks cannot be None or empty")
    return None


def _refuse_shrink(*_args: object, **_kwargs: object) -> None:
    raise ConfigError("shrink_group gives up ranks, flash recovery replaces them: use one of the two")
