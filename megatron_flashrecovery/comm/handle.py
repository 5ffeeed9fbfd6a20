"""The stable handle that frameworks hold: a ``ProcessGroup`` whose communicator can be replaced under it.

Frameworks keep process groups in hundreds of places, so references are never hunted: the handle stays, and every
operation goes to the communicator of the moment. Each operation takes the same road: ask the session, count, issue,
wait, report; if it fails, ask again. Operations that C++ dispatches by a group's *name*
(``torch.ops._c10d_functional``) reach the handle too, because it is registered under that name; a failure inside a
compiled graph is not parked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Communicator, GroupIdentity, Severed, sever_together
from megatron_flashrecovery.comm.counterpart import counterpart, device_of, trace_of
from megatron_flashrecovery.comm.delegation import generate, put_on_face
from megatron_flashrecovery.comm.ledger import Ledger
from megatron_flashrecovery.comm.operation import POINT_TO_POINT, Call, read_call
from megatron_flashrecovery.comm.parking import Answer, Parking
from megatron_flashrecovery.comm.pending import AnsweredWork, PendingWork
from megatron_flashrecovery.comm.recording import Recorder, Replay
from megatron_flashrecovery.comm.tensor_bytes import fill, payload_of
from megatron_flashrecovery.comm.tree import Tree
from megatron_flashrecovery.comm.whereabouts import Whereabouts
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Epoch
from megatron_flashrecovery.core.reports import Match, Spot


class NotRepeatable(RuntimeError):
    """The session said "again", but the failed attempt may have spoilt the operation's inputs."""


class NotConnected(RuntimeError):
    """The rank is still joining and its groups have no communicator yet, or the group was destroyed."""


class FlashGroup(dist.ProcessGroup):
    """See the module. ``communicator`` and ``replay`` are written by the registry only, on the main thread."""

    def __init__(
        self,
        identity: GroupIdentity,
        parking: Parking,
        whereabouts: Whereabouts,
        make: Callable[[FlashGroup], Communicator],
    ) -> None:
        super().__init__(identity.rank, identity.size)  # type: ignore[call-arg]  # torch's stub lacks this one
        self.identity = identity
        put_on_face(self, identity.size, identity.rank, identity.backends)
        self.ledger = Ledger()
        self.communicator: Communicator | None = None
        self.tree: Tree | None = None
        self.epoch: Epoch | None = None
        """In which the communicator was made, or the tree linked, for the last time."""
        self.severed: str | None = None
        """Why, for whoever is making a communicator at this moment, or is about to."""
        self.severed_in: Epoch | None = None
        self._severing = threading.Lock()
        self.replay: Replay | None = None
        self.recorder: Recorder | None = None
        self.destroyed = False
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
            if self.replay is not None or self.destroyed:
                state = "was destroyed" if self.destroyed else "has no communicator while its rank is joining"
                raise NotConnected(f"group {self.identity.key} {state}")
            communicator = self.adopt(self._make(self))
        return communicator

    def adopt(self, communicator: Communicator) -> Communicator:
        """It is ours from now on. Raises ``Severed`` if that was ordered while it was made: whoever orders looks for a
        communicator after saying so, and we the other way round, so one of us sees the other."""
        self.communicator = communicator
        if (reason := self.severed) is not None:
            sever_together([communicator], reason)
            raise Severed(reason)
        return communicator

    def abort(self) -> None:
        """What a framework may ask for at its end; the registry severs instead."""
        self.destroyed = True
        self.disconnect()

    def shutdown(self) -> None:
        """The framework destroys the group: it is not rebuilt, counted or severed any more."""
        self.destroyed = True
        self.disconnect(gently=True)
        if self.tree is not None:
            self.tree.close()

    def sever(self, reason: str, epoch: Epoch | None) -> Communicator | None:
        """From any thread. Returns the communicator that is to be severed, together with others."""
        self.ledger.mark_broken(reason)
        with self._severing:
            self.severed_in = epoch
            self.severed = reason
            if self.tree is not None:
                self.tree.sever(reason)
        return self.communicator

    def rearm(self, epoch: Epoch) -> None:
        """What was severed in this epoch or before may be made again; what a newer one severed may not."""
        with self._severing:
            if self.severed_in is None or self.severed_in <= epoch:
                self.severed = None
                if self.tree is not None:
                    self.tree.rearm()

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

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        calls, self._batch = self._batch, None
        return self.start(calls, device) if calls else AnsweredWork([])

    def start(self, calls: Sequence[Call], device: torch.device | None = None) -> dist.Work:
        """Issue one call, or a batch on ``device``."""
        if self.replay is not None:
            source = [self.replay.answer(call) for call in calls][-1]
            return AnsweredWork(_outputs(calls), source)
        spot = self._spot(calls)
        verdict = self._parking.before(spot)
        if type(verdict) is Answer:
            return _answered(calls, verdict)
        pending = PendingWork(self, calls, spot, device)
        if calls[0].small and len(calls) == 1:
            pending.kept = [payload_of(tensor) for tensor in calls[0].inputs]
        if self.recorder is not None:
            pending.slots = [self.recorder.issued(call) for call in calls]
        if not self._issue_until_issued(pending):
            return pending
        if pending.kept is not None:
            # What an update depends on is known on the host before the update may begin.
            self.finish(pending, None, host=True)
        return pending

    def issue_counterparts(self, matches: Sequence[Match]) -> list[PendingWork]:
        """Issue them without asking the session, in order, sends and receives as one batch; counted as any other.

        Whether they end well is seen in the counts: a group that is severed meanwhile is broken for everybody.
        """
        issued = []
        for batch in _batches(matches):
            device = self._device(device_of(batch))
            ranks = self.identity.ranks
            calls = [
                counterpart(match, self.identity.size, -1 if match.peer is None else ranks.index(match.peer), device)
                for match in batch
            ]
            spot = self._spot(calls)
            assert spot.number == batch[0].number, f"{batch[0]} is to be issued after {self.ledger.issued} others"
            pending = PendingWork(self, calls, spot, device if len(calls) > 1 else None)
            try:
                self._issue(pending)
            except RuntimeError:
                break
            issued.append(pending)
        return issued

    def finish_counterpart(self, pending: PendingWork) -> None:
        """Wait until it is over, well or not."""
        self._whereabouts.enter(pending.spot)
        try:
            pending.await_attempt(None, host=True)
        except RuntimeError as error:
            self.ledger.fail(pending.entry, _first_line(error))
            pending.sever(_first_line(error))
            pending.abandon()
        else:
            self.ledger.complete(pending.entry)
        finally:
            pending.reported = True
            self._whereabouts.leave()

    def finish(self, pending: PendingWork, timeout: timedelta | None, host: bool = False) -> None:
        """Wait for a work, through failures and retries, until it is over or ``Interrupted`` unwinds."""
        if pending.discarded:
            raise Severed(f"{pending.spot.operation} of {pending.spot.group} was discarded by a recovery")
        host = host or self.recorder is not None  # what is recorded must have been computed
        while True:
            self._whereabouts.enter(pending.spot)
            try:
                complete = pending.await_attempt(timeout, host)
                break
            except RuntimeError as error:
                failure = error.with_traceback(None)  # its frames hold the communicator that is to be freed
            finally:
                self._whereabouts.leave()
            reason = _first_line(failure)
            self.ledger.fail(pending.entry, reason)
            # Only who talks to the lost member sees that it is gone. Passing it on frees the others, one after the
            # other but within milliseconds, before anybody is told that there is a loss.
            pending.sever(reason)
            pending.abandon()
            if self._is_answered(pending, failure) or not self._issue_until_issued(pending):
                return
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

    def _issue_until_issued(self, pending: PendingWork) -> bool:
        """False if the operation was answered instead."""
        while True:
            try:
                self._issue(pending)
                return True
            except RuntimeError as error:
                failure = error.with_traceback(None)
            if self._is_answered(pending, failure):
                return False

    def _issue(self, pending: PendingWork) -> None:
        calls, spot = pending.calls, pending.spot
        if spot.number:
            if len(calls) == 1:
                entry = self.ledger.issue(calls[0].signature, trace_of(calls[0]))
            else:
                entry = self.ledger.issue(tuple(call.signature for call in calls))
        else:
            ordered = calls if len(calls) == 1 else sorted(calls, key=_is_receive)
            entry = self.ledger.issue_pairs(spot.sends_to, spot.receives_from, list(map(trace_of, ordered)))
        self._whereabouts.enter(spot)
        try:
            tree = self.tree
            carrier = tree if tree is not None and len(calls) == 1 and tree.carries(calls[0]) else self.live()
            mark = carrier.transport(calls[0].outputs or calls[0].inputs).mark()
            pending.begin(carrier, entry, carrier.issue(calls, pending.device), mark)
        except (RuntimeError, ValueError, TypeError) as error:
            self.ledger.fail(entry, _first_line(error))
            raise
        finally:
            self._whereabouts.leave()
        self.ledger.watch(entry, pending)

    def _is_answered(self, pending: PendingWork, error: RuntimeError) -> bool:
        """Ask the session what now. False: issue it again, the inputs are as they were."""
        verdict = self._parking.failed(pending.spot, error)
        if type(verdict) is Answer:
            _answered(pending.calls, verdict)
            pending.answered()
            return True
        if pending.kept is not None:
            for tensor, payload in zip(pending.calls[0].inputs, pending.kept, strict=True):
                fill(tensor, payload)
            return False
        for call in pending.calls:
            reason = call.why_not_again()
            if reason is not None:
                raise NotRepeatable(f"{call.name} of group {self.identity.key} cannot be retried: {reason}") from error
        return False

    def _device(self, kind: str) -> torch.device:
        own = self.identity.device
        if own is not None and own.type == kind:
            return own
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

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


def _batches(matches: Sequence[Match]) -> list[list[Match]]:
    transfers = [match for match in matches if not match.number]
    return [*([match] for match in matches if match.number), *([transfers] if transfers else [])]


def _is_receive(call: Call) -> bool:
    return not call.sends


def _outputs(calls: Sequence[Call]) -> list[torch.Tensor]:
    return [tensor for call in calls for tensor in call.outputs]


def _answered(calls: Sequence[Call], answer: Answer) -> AnsweredWork:
    outputs = _outputs(calls)
    for tensor, payload in zip(outputs, answer.payloads, strict=True):
        fill(tensor, payload)
    return AnsweredWork(outputs)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


generate(FlashGroup)
