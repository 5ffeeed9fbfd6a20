"""Simulated communicators: they match operations, complete them late, and strand whoever waits for a dead member."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from megatron_flashrecovery.core.ids import GroupKey, Rank
from megatron_flashrecovery.core.reports import GroupCount, Match, PairCount


class Mismatch(AssertionError):
    """Members of one communicator issued different operations: a communicator was kept that should not have been."""


def mix(*parts: int) -> int:
    return hash(parts) & 0xFFFFFFFFFFFF


class Void(int):
    """Contents that nobody computed: given by a counterpart, or made of what came of one."""


@dataclass
class Handle:
    """One operation as one member sees it: a collective, or a batch of sends and receives."""

    endpoint: Endpoint
    operation: str
    number: int = 0
    sends: list[tuple[Rank, int]] = field(default_factory=list)
    """(receiver, index) of each send."""
    receives: list[tuple[Rank, int]] = field(default_factory=list)
    is_done: bool = False
    failed: str | None = None
    stuck: bool = False
    """A member died or cut the communicator in the middle: it completes for nobody who had not completed it."""
    result: int | None = None


class Communicator:
    """One incarnation of a group's communicator: a rebuilt group gets another one."""

    def __init__(
        self, key: GroupKey, members: tuple[Rank, ...], epoch: int, is_eager: bool, forms_kept: int = 0
    ) -> None:
        self.key = key
        self.members = members
        self.epoch = epoch
        self.is_eager = is_eager
        self.forms_kept = forms_kept
        self.endpoints: dict[Rank, Endpoint] = {}
        self.signatures: list[str] = []
        self.contributions: list[dict[Rank, int]] = []
        self.sent: dict[tuple[Rank, Rank], list[int]] = {}
        self.awaited: dict[tuple[Rank, Rank], int] = {}

    def join(self, rank: Rank) -> Endpoint:
        endpoint = self.endpoints[rank] = Endpoint(self, rank)
        return endpoint

    def is_connected(self) -> bool:
        return len(self.endpoints) == len(self.members)

    def is_quiet(self) -> bool:
        """Nothing is under way and nothing lies around undelivered."""
        if any(len(given) != len(self.members) for given in self.contributions):
            return False
        pairs = self.sent.keys() | self.awaited.keys()
        return all(len(self.sent.get(pair, ())) == self.awaited.get(pair, 0) for pair in pairs) and not any(
            endpoint.open for endpoint in self.endpoints.values()
        )

    def ripe(self, handle: Handle) -> bool:
        """Whether the handle can complete."""
        if handle.stuck or handle.is_done or handle.failed:
            return False
        if handle.number:
            is_next = handle.number == handle.endpoint.completed + 1
            return is_next and len(self.contributions[handle.number - 1]) == len(self.members)
        me = handle.endpoint.rank
        return all(len(self.sent.get((peer, me), ())) > index for peer, index in handle.receives) and (
            self.is_eager or all(self.awaited.get((me, peer), 0) > index for peer, index in handle.sends)
        )

    def forsake(self, rank: Rank, rng: Random, notice: float) -> list[Handle]:
        """A member is gone, or has cut its end. What others have under way with it completes or hangs, by chance; they
        see an error at once with probability ``notice``. Returns what failed."""
        failed = []
        for endpoint in self.endpoints.values():
            if endpoint.rank == rank:
                continue
            for handle in endpoint.open:
                is_concerned = handle.number or any(p == rank for p, _ in handle.sends + handle.receives)
                if not is_concerned or (self.ripe(handle) and rng.random() < 0.5):
                    continue
                handle.stuck = True
                if rng.random() < notice:
                    handle.failed = f"connection reset by rank {rank}"
                    endpoint.broken = endpoint.broken or handle.failed
                    failed.append(handle)
        return failed


class Endpoint:
    """A member's end of a communicator, with the counts that its handle reports."""

    def __init__(self, comm: Communicator, rank: Rank) -> None:
        self.comm = comm
        self.rank = rank
        self.issued = 0
        self.completed = 0
        self.digest = 0
        self.operations: list[str] = []
        self.sent: dict[Rank, int] = {}
        self.received: dict[Rank, int] = {}
        self.open_with: dict[Rank, int] = {}
        self.open: list[Handle] = []
        self.broken: str | None = None

    def count(self) -> GroupCount:
        peers = self.sent.keys() | self.received.keys()
        kept = self.comm.forms_kept
        pairs = {}
        for peer in peers:
            sent, received = self.sent.get(peer, 0), self.received.get(peer, 0)
            forms = ((b"transfer",) * min(kept, number) for number in (sent, received))
            pairs[peer] = PairCount(sent, received, self.open_with.get(peer, 0), *forms)
        recent = tuple(operation.encode() for operation in self.operations[-kept:]) if kept else ()
        return GroupCount(self.issued, self.completed, self.digest, pairs, self.broken, recent)

    def match(self, match: Match) -> Handle:
        """Issue a counterpart, with contents that nobody computed."""
        if match.peer is None:
            if match.number != self.issued + 1:
                raise Mismatch(f"{self.comm.key}: rank {self.rank} matches {match.number} after {self.issued}")
            return self.issue(match.form.decode(), Void())
        if match.is_send:
            return self.exchange("match", {match.peer: Void()}, ())
        return self.exchange("match", {}, (match.peer,))

    def issue(self, operation: str, value: int) -> Handle:
        """Contribute to the next collective."""
        comm = self.comm
        self.issued += 1
        handle = Handle(self, operation, self.issued)
        if len(comm.signatures) < self.issued:
            comm.signatures.append(operation)
            comm.contributions.append({})
        if comm.signatures[self.issued - 1] != operation:
            raise Mismatch(
                f"{comm.key} number {self.issued}: rank {self.rank} issued {operation}, "
                f"others {comm.signatures[self.issued - 1]}"
            )
        comm.contributions[self.issued - 1][self.rank] = value
        self.digest = mix(self.digest, *operation.encode())
        self.operations.append(operation)
        return self._begin(handle)

    def exchange(self, operation: str, sends: dict[Rank, int], receives: tuple[Rank, ...]) -> Handle:
        """Issue a batch of at most one send and one receive per peer."""
        comm, handle = self.comm, Handle(self, operation)
        for peer, value in sends.items():
            queue = comm.sent.setdefault((self.rank, peer), [])
            handle.sends.append((peer, len(queue)))
            queue.append(value)
            self.sent[peer] = self.sent.get(peer, 0) + 1
            if not comm.is_eager:
                self.open_with[peer] = self.open_with.get(peer, 0) + 1
        for peer in receives:
            index = comm.awaited.get((peer, self.rank), 0)
            comm.awaited[peer, self.rank] = index + 1
            handle.receives.append((peer, index))
            self.received[peer] = self.received.get(peer, 0) + 1
            self.open_with[peer] = self.open_with.get(peer, 0) + 1
        return self._begin(handle)

    def _begin(self, handle: Handle) -> Handle:
        if self.broken:
            handle.failed = self.broken
        else:
            ends = self.comm.endpoints
            dead = [member for member in self.comm.members if member in ends and ends[member].broken]
            peers = self.comm.members if handle.number else [p for p, _ in handle.sends + handle.receives]
            handle.stuck = any(m in peers for m in dead)
            self.open.append(handle)
        return handle

    def complete(self, handle: Handle) -> None:
        handle.is_done = True
        self.open.remove(handle)
        if handle.number:
            given = self.comm.contributions[handle.number - 1]
            handle.result = _result(*(given[member] for member in self.comm.members))
            self.completed += 1
            return
        for peer, _ in handle.receives:
            self.open_with[peer] -= 1
        if not self.comm.is_eager:
            for peer, _ in handle.sends:
                self.open_with[peer] -= 1
        handle.result = _result(*(self.comm.sent[peer, self.rank][index] for peer, index in handle.receives))

    def cut(self, reason: str) -> list[Handle]:
        """Sever this end: whatever is under way here fails. Returns that."""
        self.broken = self.broken or reason
        failed, self.open = self.open, []
        for handle in failed:
            handle.failed = reason
        return failed


def _result(*given: int) -> int:
    result = mix(*given)
    return Void(result) if any(isinstance(value, Void) for value in given) else result
