"""The stable handle that frameworks hold: a ``ProcessGroup`` whose communicator can be replaced under it.

Frameworks keep process groups in hundreds of places, so references are never hunted: the handle stays, and every operation
goes to the communicator of the moment. Each operation takes the same road: ask the session, count, issue, wait, report; if
it fails, ask again. Operations that C++ dispatches by a group's *name* (``torch.ops._c10d_functional``) reach the handle
too, because it is registered under that name; a failure inside a compiled graph is not parked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from megatron_flashrecovery.comm.communicator import Communicator, GroupIdentity
from megatron_flashrecovery.comm.ledger import Ledger
from megatron_flashrecovery.comm.operation import COLLECTIVES, POINT_TO_POINT, QUERIES, REFUSED, Call, read_call
from megatron_flashrecovery.comm.parking import Answer, Parking
from megatron_flashrecovery.comm.pending import AnsweredWork, PendingWork
from megatron_flashrecovery.comm.recording import Recorder, Replay
from megatron_flashrecovery.comm.tensor_bytes import fill, payload_of
from megatron_flashrecovery.comm.whereabouts import Whereabouts
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank
from megatron_flashrecovery.core.messages import Spot


class NotRepeatable(RuntimeError):
    """The session said "again", but the failed attempt may have spoilt the operation's inputs."""


class NotConnected(RuntimeError):
    """The rank is still joining: its groups have no communicator yet."""


class SmallRoad(Protocol):
    """Another way for small operations of a group that is too large to be rebuilt flat (the tree)."""

    severed: str | None

    def carries(self, call: Call) -> bool: ...
    def run(self, call: Call) -> None: ...


class FlashGroup(dist.ProcessGroup):
    """See the module. ``communicator`` and ``replay`` are written by the registry only, on the main thread."""

    def __init__(
        self,
        identity: GroupIdentity,
        parking: Parking,
        whereabouts: Whereabouts,
        make: Callable[[FlashGroup], Communicator],
    ) -> None:
        super().__init__(identity.rank, identity.size)
        self.identity = identity
        _put_on_face(self, identity)
        self.ledger = Ledger()
        self.communicator: Communicator | None = None
        self.small_road: SmallRoad | None = None
        self.replay: Replay | None = None
        self.recorder: Recorder | None = None
        self._parking = parking
        self._whereabouts = whereabouts
        self._make = make
        self._batch: list[Call] | None = None

    # --- what c10d asks about a group ---

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(device) for device, _ in self.identity.backends]

    @property
    def bound_device_id(self) -> torch.device | None:
        return self.identity.device

    @bound_device_id.setter
    def bound_device_id(self, device: torch.device | None) -> None:
        if device is not None and device != self.identity.device:
            raise ConfigError(f"group {self.identity.key} is bound to {self.identity.device}, not {device}")

    def name(self) -> str:
        return self.identity.backends[-1][1]

    _get_backend_name = name

    def getBackendName(self) -> str:
        """What C++ sees: hearing "gloo", DDP's logger casts the registered backend to gloo's class and crashes."""
        return "flashrecovery"

    def live(self) -> Communicator:
        """The communicator, created now if this group makes it lazily."""
        communicator = self.communicator
        if communicator is None:
            if self.replay is not None:
                raise NotConnected(f"group {self.identity.key} has no communicator while its rank is joining")
            communicator = self.communicator = self._make(self)
        return communicator

    def abort(self) -> None:
        """What a framework may ask for at its end; the registry severs through the communicator instead."""
        self.disconnect()

    def shutdown(self) -> None:
        """The framework destroys the group."""
        self.disconnect(gently=True)

    def disconnect(self, gently: bool = False) -> None:
        """Close the communicator, on the main thread."""
        communicator, self.communicator = self.communicator, None
        if communicator is not None:
            communicator.close(gently)

    def coalesces(self, device: torch.device) -> bool:
        """Whether the backend issues batches as one."""
        return self.replay is None and bool(self.live().inner._get_backend(device).supports_coalescing)

    # --- operations ---

    def run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.Work | None:
        call = read_call(name, args, kwargs)
        if self._batch is not None:
            # Not issued before the batch ends: only then is it known with whom, and a batch is one place to park at.
            self._batch.append(call)
            return None
        return self.start((call,))

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> dist.Work | None:
        calls, self._batch = self._batch, None
        return self.start(calls, device) if calls else None

    def start(self, calls: Sequence[Call], device: torch.device | None = None) -> dist.Work:
        """Issue one call, or a batch on ``device``."""
        if self.replay is not None:
            source = [self.replay.answer(call) for call in calls][-1]
            return AnsweredWork(_outputs(calls), source)
        spot = self._spot(calls)
        verdict = self._parking.before(spot)
        if type(verdict) is Answer:
            return _answered(calls, verdict)
        call = calls[0]
        small = call.small and len(calls) == 1
        kept = [payload_of(tensor) for tensor in call.inputs] if small else None
        slots = [self.recorder.issued(each) for each in calls] if self.recorder is not None else ()
        pending: PendingWork | None = None
        while True:
            try:
                pending = self._issue(calls, spot, device, pending)
                break
            except RuntimeError as error:
                verdict = self._ask_again(calls, spot, error, kept is not None)
                if type(verdict) is Answer:
                    return _answered(calls, verdict)
                _put_back(call, kept)
        pending.slots, pending.kept, pending.device = slots, kept, device
        if small:
            # What an update depends on is known on the host before the update may begin.
            self.finish(pending, None, host=True)
        return pending

    def finish(self, pending: PendingWork, timeout: timedelta | None, host: bool = False) -> None:
        """Wait for a work, through failures and retries, until it is over or ``Interrupted`` unwinds."""
        calls, spot = pending.calls, pending.spot
        while True:
            self._whereabouts.enter(spot)
            try:
                complete = pending.await_attempt(timeout, host)
            except RuntimeError as error:
                self._whereabouts.leave()
                self.ledger.fail(pending.entry, str(error).partition("\n")[0])
                pending.abandon()
                verdict = self._ask_again(calls, spot, error.with_traceback(None), pending.kept is not None)
                if type(verdict) is Answer:
                    _answered(calls, verdict)
                    pending.settle()
                    pending.reported = True
                    return
                _put_back(calls[0], pending.kept)
                self._issue(calls, spot, pending.device, pending)
                continue
            except BaseException:
                self._whereabouts.leave()
                raise
            self._whereabouts.leave()
            break
        if complete:
            self._report(pending)

    def _report(self, pending: PendingWork) -> None:
        self.ledger.complete(pending.entry)
        pending.reported = True
        if pending.source >= 0:
            self.ledger.received_from(self.identity.ranks[pending.source])
        if pending.slots and self.recorder is not None:
            for slot in pending.slots:
                self.recorder.completed(slot, pending.source)
        told = [payload_of(tensor) for tensor in pending.calls[0].outputs] if pending.kept is not None else None
        self._parking.completed(pending.spot, told)

    def _issue(
        self, calls: Sequence[Call], spot: Spot, device: torch.device | None, again: PendingWork | None
    ) -> PendingWork:
        communicator = self.live()
        if spot.number:
            entry = self.ledger.issue(calls[0].signature if len(calls) == 1 else tuple(c.signature for c in calls))
        else:
            entry = self.ledger.issue_pairs(spot.sends_to, spot.receives_from)
        self._whereabouts.enter(spot)
        try:
            works = _issue_on(communicator, calls, device)
        except RuntimeError as error:
            self.ledger.fail(entry, str(error).partition("\n")[0])
            raise
        finally:
            self._whereabouts.leave()
        if again is None:
            again = PendingWork(self, calls, spot, entry, communicator, works)
        else:
            again.renew(communicator, entry, works)
        self.ledger.watch(entry, again)
        return again

    def _ask_again(self, calls: Sequence[Call], spot: Spot, error: RuntimeError, intact: bool) -> Any:
        verdict = self._parking.failed(spot, error)
        if type(verdict) is not Answer and not intact:
            for call in calls:
                reason = call.why_not_again()
                if reason is not None:
                    raise NotRepeatable(
                        f"{call.name} of group {self.identity.key} cannot be retried: {reason}"
                    ) from error
        return verdict

    def _spot(self, calls: Sequence[Call]) -> Spot:
        key = self.identity.key
        if len(calls) == 1 and calls[0].peer < 0 and calls[0].name != "recv_anysource":
            return Spot(key, calls[0].name, self.ledger.issued + 1)
        ranks = self.identity.ranks
        if all(call.name in POINT_TO_POINT for call in calls):
            name = calls[0].name if len(calls) == 1 else "batch"
            sends = tuple(ranks[call.peer] for call in calls if call.sends)
            receives = tuple(ranks[call.peer] for call in calls if not call.sends and call.peer >= 0)
            return Spot(key, name, 0, sends, receives)
        return Spot(key, "coalesced", self.ledger.issued + 1)


def _put_on_face(group: FlashGroup, identity: GroupIdentity) -> None:
    """Give C++ backends to ask for names and the default type (DDP and functional collectives do). They cannot be the live ones, because
    a registered backend cannot be replaced. No operation reaches them; the conformance suite would see it."""
    make = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
    faces = {name: make(identity.rank, identity.size) for _, name in identity.backends}
    for device, name in identity.backends:
        backend_type = dist.Backend.backend_type_map[name]
        dist.ProcessGroup._register_backend(group, torch.device(device), backend_type, faces[name])
    default = "nccl" if "nccl" in faces else identity.backends[0][1]
    dist.ProcessGroup._set_default_backend(group, dist.Backend.backend_type_map[default])


def _issue_on(communicator: Communicator, calls: Sequence[Call], device: torch.device | None) -> Sequence[Any]:
    inner = communicator.inner
    if device is None or len(calls) == 1:
        return [call.issue(inner) for call in calls]
    if not inner._get_backend(device).supports_coalescing:
        return [call.issue(inner) for call in calls]
    # Group start, all operations, group end: single sends and receives can deadlock 1F1B on NCCL with nobody failing.
    inner._start_coalescing(device)
    for call in calls:
        call.issue(inner)
    return [inner._end_coalescing(device)]


def _outputs(calls: Sequence[Call]) -> list[torch.Tensor]:
    return [tensor for call in calls for tensor in call.outputs]


def _answered(calls: Sequence[Call], answer: Answer) -> AnsweredWork:
    outputs = _outputs(calls)
    for tensor, payload in zip(outputs, answer.payloads, strict=True):
        fill(tensor, payload)
    return AnsweredWork(outputs)


def _put_back(call: Call, kept: Sequence[bytes] | None) -> None:
    if kept is not None:
        for tensor, payload in zip(call.inputs, kept, strict=True):
            fill(tensor, payload)


def _operation(name: str) -> Callable[..., dist.Work | None]:
    def operation(self: FlashGroup, *args: Any, **kwargs: Any) -> dist.Work | None:
        return self.run(name, args, kwargs)

    operation.__name__ = operation.__qualname__ = name
    return operation


def _query(name: str) -> Callable[..., Any]:
    def query(self: FlashGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.live().inner, name)(*args, **kwargs)

    query.__name__ = query.__qualname__ = name
    return query


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: FlashGroup, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{name} ties groups to a communicator that recovery replaces: use new_group instead")

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def _generate(names: frozenset[str], make: Callable[[str], Callable[..., Any]]) -> None:
    """Only what the installed torch has: older ones lack some names, newer ones bring others (see ``unclassified``)."""
    for name in names:
        if hasattr(dist.ProcessGroup, name) and name not in FlashGroup.__dict__:
            setattr(FlashGroup, name, make(name))


_generate(COLLECTIVES | POINT_TO_POINT, _operation)
_generate(QUERIES, _query)
_generate(REFUSED, _refusal)
