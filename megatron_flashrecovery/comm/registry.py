"""All groups of this process: made, counted, severed and rebuilt in the order in which the framework made them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from megatron_flashrecovery.comm.backlog import backlog, held_up_in
from megatron_flashrecovery.comm.communicator import Communicator, GroupIdentity, sever_together
from megatron_flashrecovery.comm.counterpart import device_of
from megatron_flashrecovery.comm.gloo_communicator import GlooTransport
from megatron_flashrecovery.comm.handle import FlashGroup
from megatron_flashrecovery.comm.install import GroupRequest, Installation
from megatron_flashrecovery.comm.nccl_communicator import NcclTransport
from megatron_flashrecovery.comm.parking import Parking
from megatron_flashrecovery.comm.recording import Recorder, Replay
from megatron_flashrecovery.comm.rendezvous import meet
from megatron_flashrecovery.comm.set_up import SetUp
from megatron_flashrecovery.comm.startup_record import StartupRecord
from megatron_flashrecovery.comm.tree import Tree
from megatron_flashrecovery.comm.whereabouts import Watch, Whereabouts
from megatron_flashrecovery.core.ids import Epoch, GroupKey, Rank
from megatron_flashrecovery.core.pace import OnDevice
from megatron_flashrecovery.core.reports import GroupCount, Match, Spot

TRANSPORTS = (GlooTransport, NcclTransport)
_RANKS_SPELLED_OUT = 16
_NOT_MADE = "its new communicator is not made yet"


class GroupRegistry:
    """The groups of one rank. ``store`` outlives every worker; ``joining`` is the record that a replacement replays."""

    def __init__(
        self,
        *,
        rank: Rank,
        world_size: int,
        store: Store,
        parking: Parking,
        epoch: Epoch,
        timeout: timedelta,
        tree_above: int = 64,
        joining: StartupRecord | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._parking = parking
        self._epoch = epoch
        self._timeout = timeout
        self._tree_above = tree_above
        self._joined_with = joining
        self._record = joining
        self._start_epoch = Epoch(joining.epoch) if joining is not None else epoch
        self._recording = joining is None
        self._groups: dict[GroupKey, FlashGroup] = {}
        self._same_ranks: Counter[tuple[Rank, ...]] = Counter()
        self._whereabouts = Whereabouts(watch)
        self._rest_of_start: dict[GroupKey, Replay] = {}
        self._set_up = SetUp(store)
        self._installation = Installation(self)

    def install(self) -> None:
        """From now on every group that this process makes, the world included, is a handle of this registry."""
        self._installation.install()

    def uninstall(self) -> None:
        """Take the patches back; for tests. Existing handles keep working."""
        self._installation.uninstall()

    @property
    def joining(self) -> bool:
        return self._record is not None

    @property
    def groups(self) -> Mapping[GroupKey, FlashGroup]:
        """In the order of creation, which is the same on all members. Destroyed ones are not among them."""
        return self._alive()

    def members(self, key: GroupKey) -> tuple[Rank, ...]:
        return self._groups[key].identity.ranks

    def groups_with(self, ranks: Iterable[Rank]) -> list[GroupKey]:
        wanted = set(ranks)
        return [key for key, group in self._alive().items() if not wanted.isdisjoint(group.identity.ranks)]

    def counts(self) -> dict[GroupKey, GroupCount]:
        """From any thread. Looks first whether outstanding operations are over."""
        alive = self._alive()
        for group in alive.values():
            group.ledger.refresh()
            group.ledger.drain()
        return {key: group.ledger.count() for key, group in alive.items()}

    def standing(self) -> tuple[Spot, float] | None:
        """The operation inside which a thread is blocked right now, and since when on the monotonic clock."""
        return self._whereabouts.standing()

    def backlog(self) -> OnDevice | None:
        """From any thread."""
        return backlog(self._alive().values())

    def held_up_in(self) -> Spot | None:
        """The operation in which the device waits for the others, also if no thread is inside of it: a framework may
        wait for its device anywhere. From any thread."""
        return held_up_in(self._alive().values())

    def outstanding(self) -> bool:
        return any(group.ledger.has_outstanding for group in self._alive().values())

    def errors(self) -> dict[GroupKey, str]:
        """Groups in which something has gone wrong without failing anybody's operation. From any thread; does not
        block. They count as broken from here on."""
        found: dict[GroupKey, str] = {}
        for key, group in self._alive().items():
            communicator = group.communicator
            if communicator is None or communicator.severed is not None:
                continue
            for transport in communicator.transports:
                if (error := transport.error()) is not None:
                    found[key] = error
                    group.ledger.mark_broken(error)
        return found

    def cut_a_connection(self) -> None:
        """As a network might: nobody is told. In the smallest group that has one, for in a large one some connections
        are never used."""
        for group in sorted(self._alive().values(), key=lambda group: group.identity.size):
            transports = group.communicator.transports if group.communicator is not None else ()
            if any(isinstance(each, GlooTransport) and each.cut_a_connection() for each in transports):
                return

    def sever(self, keys: Iterable[GroupKey], reason: str, epoch: Epoch | None = None) -> None:
        """From any thread; does not block. Everybody inside these groups fails at once, remote members included.

        ``epoch`` is the one that orders it. With it, a rebuild of an older epoch that is under way, or just about to
        begin, fails instead of waiting for a member that is gone.
        """
        groups = [self._groups[key] for key in keys if key in self._groups]
        communicators = [group.sever(reason, epoch) for group in groups if not group.destroyed]
        sever_together([each for each in communicators if each is not None], reason)

    def match(self, matches: Sequence[Match]) -> None:
        """On the thread that stands: issue these counterparts, and return when they are over, well or not."""
        by_group: dict[GroupKey, list[Match]] = {}
        for match in matches:
            by_group.setdefault(match.group, []).append(match)
        with _stream_beside(matches):
            # All are issued before any is waited for: the peers of one may come only after those of another.
            under_way = [
                (self._groups[key], work)
                for key, some in by_group.items()
                for work in self._groups[key].issue_counterparts(some)
            ]
            for group, work in under_way:
                group.finish_counterpart(work)

    def settle(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Block until what ``sever`` began is done. Call it before reporting: on NCCL nobody may free a communicator
        that another rank of the node has not finished aborting, and nobody frees before all have reported.
        ``on_wait`` is called several times a second while it blocks."""
        for group in self._alive().values():
            if group.communicator is not None and group.communicator.severed is not None:
                for transport in group.communicator.transports:
                    transport.settle(on_wait)

    def rebuild(self, keys: Iterable[GroupKey], epoch: Epoch) -> None:
        """On the main thread of every member, for the same groups: new communicators under the prefix of ``epoch``.

        Raises ``Severed`` if one of them is severed meanwhile, and ``RuntimeError`` if a member goes; what was not made
        then counts as broken, and has to be rebuilt in the next epoch.
        """
        self._epoch = epoch
        wanted = set(keys)
        chosen = [group for key, group in self._alive().items() if key in wanted]
        # As one batch, and all before any is freed (NVIDIA/nccl#1013, #863).
        sever_together([each for group in chosen if (each := group.communicator) is not None], "replaced")
        # All are closed before any is made, so that nobody waits for a member that is still stuck in an old one.
        for group in chosen:
            assert group.epoch != epoch, f"{group.identity.key} was made in epoch {epoch} already: its keys are used up"
            group.rearm(epoch)
            group.disconnect()
            group.ledger.mark_broken(_NOT_MADE)
        for group in chosen:
            self._connect(group)

    def go_live(self, epoch: Epoch) -> None:
        """A replacement takes its seat: every group gets its communicator, and operations go to it.

        See ``rehearse`` for what is left of its start.
        """
        self._epoch = epoch
        self._record = None
        self._rest_of_start = {key: group.replay for key, group in self._alive().items() if group.replay is not None}
        for group in self._alive().values():
            group.replay = None
            if c10d._world.pg_map.get(group) is not None:
                backend, _ = c10d._world.pg_map[group]
                prefix = f"{c10d._world.pg_names[group]}/"
                c10d._world.pg_map[group] = (backend, PrefixStore(prefix, self.bookkeeping_store()))
        for group in self._alive().values():
            group.rearm(epoch)
            group.ledger.mark_broken(_NOT_MADE)
        for group in self._alive().values():
            self._connect(group)

    def rehearse(self, on: bool) -> None:
        """While on, operations are answered from the rest of the record, as before ``go_live``: the replacement has its
        communicators, and its framework still does what the others have done long ago."""
        for key, group in self._alive().items():
            group.replay = self._rest_of_start.get(key) if on else None

    def reset_counts(self, keys: Iterable[GroupKey] | None = None) -> None:
        for key in list(self._groups) if keys is None else keys:
            self._groups[key].ledger.reset()

    def startup_record(self) -> StartupRecord:
        """What this rank's replacement would need to start without the others. A replacement hands its own on."""
        if self._joined_with is not None:
            return self._joined_with
        answers = {key: group.recorder.answers() for key, group in self._groups.items() if group.recorder is not None}
        return StartupRecord.of(self._start_epoch, answers)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Operations in here are no part of the start: a replacement does not issue them."""
        recorders = {group: group.recorder for group in self._groups.values()}
        for group in recorders:
            group.recorder = None
        try:
            yield
        finally:
            for group, recorder in recorders.items():
                group.recorder = recorder

    def stop_recording(self) -> None:
        """At the first protected step. Take ``startup_record`` before: what was recorded is dropped."""
        self._recording = False
        for group in self._groups.values():
            group.recorder = None

    def bookkeeping_store(self) -> Store:
        """For c10d's own keys. A replacement must not count itself in where its predecessor has been counted."""
        if self._record is not None:
            return HashStore()
        return PrefixStore(f"{self._start_epoch}/c10d/default_pg", self._store)

    def create(self, request: GroupRequest) -> FlashGroup:
        """Called by the installation for each group of which this rank is a member."""
        number = self._same_ranks[request.ranks]
        self._same_ranks[request.ranks] += 1
        identity = GroupIdentity(
            key=group_key(request.description, request.ranks, number),
            ranks=request.ranks,
            rank=request.rank,
            backends=request.backends,
            timeout=self._timeout,
            options=request.options,
            device=request.device,
        )
        if self._record is None and not self._recording:
            print(
                f"flashrecovery: WARNING: {identity.key} was made after the first step: a replacement lacks it, "
                f"so a loss in it restarts all of its members; make groups before the training loop",
                flush=True,
            )
        group = FlashGroup(identity, self._parking, self._whereabouts, self._make)
        self._groups[identity.key] = group
        if self._record is not None:
            group.replay = Replay(self.rank, identity.key, self._record.answers.get(str(identity.key), ()))
            return group
        if self._recording:
            group.recorder = Recorder()
        self._connect(group, eagerly=identity.device is not None)
        return group

    def _alive(self) -> dict[GroupKey, FlashGroup]:
        return {key: group for key, group in self._groups.copy().items() if not group.destroyed}

    def _make(self, group: FlashGroup, eagerly: bool = False) -> Communicator:
        store = self._store_of(group)
        meet(store, group.identity.size, lambda: group.severed, self._timeout)
        if self._recording and self._epoch == self._start_epoch:
            # Here the loss of a member ends it for all, so nobody needs to be freed.
            communicator = Communicator(group.identity, store)
            if eagerly:
                communicator.connect()
            return communicator
        return self._set_up.make(group.identity, self._prefix_of(group), lambda: group.severed, eagerly)

    def _connect(self, group: FlashGroup, eagerly: bool = True) -> None:
        """A job-sized group only gets its tree; its flat communicator is made when a large operation comes. Whoever is
        alone makes one when an operation comes, and Megatron-LM has some such groups that see none."""
        group.epoch = self._epoch
        if group.identity.size > self._tree_above:
            group.tree = group.tree or Tree(group.identity.rank, group.identity.size, self._timeout)
            if group.severed is not None:
                group.tree.sever(group.severed)  # ordered when there was none yet
            group.tree.relink(self._store_of(group), int(self._epoch))
        elif group.identity.size > 1:
            group.adopt(self._make(group, eagerly))
        group.ledger.begin()

    def _store_of(self, group: FlashGroup) -> Store:
        return PrefixStore(self._prefix_of(group), self._store)

    def _prefix_of(self, group: FlashGroup) -> str:
        return f"{self._epoch}/{group.identity.key}"


def _stream_beside(matches: Sequence[Match]) -> AbstractContextManager[object]:
    """A device's current stream may wait for operations that others match only now, and they for ours."""
    if any(device_of([match]) == "cuda" for match in matches):
        return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    return nullcontext()


def group_key(description: str, ranks: tuple[Rank, ...], number: int) -> GroupKey:
    """The same on all members, and readable: ``TENSOR_MODEL_PARALLEL_GROUP[4,5]#0``."""
    spelled = ",".join(str(rank) for rank in ranks)
    if len(ranks) > _RANKS_SPELLED_OUT:
        spelled = f"{len(ranks)}:{hashlib.blake2b(spelled.encode(), digest_size=8).hexdigest()}"
    return GroupKey(f"{description}[{spelled}]#{number}")
