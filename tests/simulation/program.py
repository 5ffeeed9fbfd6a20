"""What a simulated rank computes: one training step as a generator of operations, and the undisturbed run.

The numbers are hashes, so that every lost, stale, repeated or foreign contribution shows in the state of the next step.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

from megatron_flashrecovery.core.ids import Rank
from tests.simulation.fabric import Communicator, Endpoint, Handle, mix
from tests.simulation.settings import Model


@dataclass(frozen=True)
class Collective:
    """Waits for its result. ``is_told``: a small reduction after the gate, whose result a peer could be told."""

    kind: str
    operation: str
    value: int
    is_told: bool = False


@dataclass(frozen=True)
class Begin:
    """An asynchronous collective; yields its handle."""

    kind: str
    operation: str
    value: int


@dataclass(frozen=True)
class Await:
    handle: Handle


@dataclass(frozen=True)
class Exchange:
    """A batch of sends and receives in the pipeline group."""

    operation: str
    sends: dict[Rank, int]
    receives: tuple[Rank, ...]


@dataclass(frozen=True)
class Arm:
    """The reduced gradients are final."""


@dataclass(frozen=True)
class Gate:
    """Wait until the mirror that this step depends on is acknowledged."""


@dataclass(frozen=True)
class BeforeWrite:
    """Go on only if no abort has begun."""


@dataclass(frozen=True)
class Pause:
    """Somebody else may go first."""


Ask: TypeAlias = Collective | Begin | Await | Exchange | Arm | Gate | BeforeWrite | Pause
Program: TypeAlias = Generator[Ask, int | Handle | None, None]


class Memory(Protocol):
    """What a step reads and writes. ``phase`` is told how far the update is."""

    rank: Rank
    model: Model
    step: int
    params: int
    master: int
    values: int

    def mark(self, update: str) -> None: ...


def initial(model: Model, rank: Rank) -> tuple[int, int, int]:
    """Parameters, optimizer state, values of step 0."""
    tp, pp, _ = model.place(rank)
    if not model.sharded:
        master = mix(tp, pp)
        return mix(master), master, mix(rank, 99)
    masters = [mix(member, 5) for member in model.groups[_dp(model, rank)]]
    return mix(*masters), mix(rank, 5), mix(rank, 99)


def _dp(model: Model, rank: Rank) -> str:
    key = model.key(rank, "dp")
    assert key is not None
    return key


def train_step(me: Memory) -> Program:
    """From the state of one step to that of the next."""
    model = me.model
    _, pp, dp = model.place(me.rank)
    me.values = mix(me.values, 7)
    local = yield from _forward_and_backward(me, mix(me.params, dp, me.step + 1, me.values))
    if model.pp > 1 and pp in (0, model.pp - 1):
        local = mix(local, _int((yield Collective("embedding", "embedding grads", local))))
    reduced = []
    handles = []
    for bucket in range(model.buckets):
        handles.append((yield Begin("dp", f"grads {bucket}", mix(local, bucket))))
    for handle in handles:
        assert isinstance(handle, Handle)
        reduced.append(_int((yield Await(handle))))
    if not model.buckets:
        reduced.append(_int((yield Collective("dp", "grads", local))))
    grads = mix(*reduced, dp if model.sharded else 0)
    yield Arm()
    yield Gate()
    if model.agreement is not None:
        yield Collective(model.agreement, "agreement", 1, is_told=True)
    norm = 0
    if model.norm is not None:
        norm = _int((yield Collective(model.norm, "norm", grads, is_told=True)))
    yield BeforeWrite()
    me.mark("writing")
    me.master = mix(me.master, grads, norm)
    yield Pause()
    if model.chained:
        norm = _int((yield Collective(model.norm or "mp", "second norm", grads + 1, is_told=True)))
        yield BeforeWrite()
        me.master = mix(me.master, norm)
    me.mark("applied")
    yield Pause()
    if model.sharded:
        me.params = _int((yield Collective("dp", "gather", me.master)))
    else:
        me.params = mix(me.master)
    if model.loss:
        yield Collective("dp", "loss", mix(me.step + 1), is_told=True)


def _forward_and_backward(me: Memory, start: int) -> Generator[Ask, int | Handle | None, int]:
    """One forward, one backward over the pipeline, with the batched exchanges in the middle."""
    model = me.model
    tp, pp, dp = model.place(me.rank)
    before = model.rank_at(tp, pp - 1, dp) if pp > 0 else None
    after = model.rank_at(tp, pp + 1, dp) if pp < model.pp - 1 else None
    ahead = min(model.microbatches, model.pp - pp - 1)
    total, x = start, 0

    def receive(name: str, peer: Rank | None) -> Generator[Ask, int | Handle | None, int]:
        return _int((yield Exchange(name, {}, (peer,)))) if peer is not None else 0

    for _ in range(ahead):
        x = yield from receive("recv forward", before)
        x = mix(start, x, _int((yield Collective("tp", "forward", mix(start, x)))))
        if after is not None:
            yield Exchange("send forward", {after: x}, ())
    if model.microbatches > ahead:
        x = yield from receive("recv forward", before)
    for index in range(model.microbatches - ahead):
        x = mix(start, x, _int((yield Collective("tp", "forward", mix(start, x)))))
        grad = 1 if after is None else _int((yield Exchange("send forward recv backward", {after: x}, (after,))))
        total = mix(total, grad, _int((yield Collective("tp", "backward", mix(total, grad)))))
        if before is not None and index < model.microbatches - ahead - 1:
            x = _int((yield Exchange("send backward recv forward", {before: total}, (before,))))
        elif before is not None:
            yield Exchange("send backward", {before: total}, ())
    for _ in range(ahead):
        grad = yield from receive("recv backward", after)
        total = mix(total, grad, _int((yield Collective("tp", "backward", mix(total, grad)))))
        if before is not None:
            yield Exchange("send backward", {before: total}, ())
    return total


def _int(value: int | Handle | None) -> int:
    assert isinstance(value, int)
    return value


class _Quiet:
    """A rank of the undisturbed run."""

    def __init__(self, model: Model, rank: Rank) -> None:
        self.rank, self.model, self.step = rank, model, 0
        self.params, self.master, self.values = initial(model, rank)
        self.ends: dict[str, Endpoint] = {}
        self.program: Program = train_step(self)
        self.waits: Handle | None = None
        self.answer: int | Handle | None = None

    def mark(self, update: str) -> None:
        pass


@dataclass(frozen=True)
class Undisturbed:
    """``states[step][rank]`` = (parameters, optimizer state, values); ``turns`` of main threads in all."""

    states: list[dict[Rank, tuple[int, int, int]]]
    turns: int


@cache
def undisturbed(model: Model) -> Undisturbed:
    """The run in which nothing happens, in lock step."""
    ranks = [_Quiet(model, Rank(index)) for index in range(model.size)]
    comms = {key: Communicator(key, members, 0, is_eager=True) for key, members in model.groups.items()}
    for quiet in ranks:
        for kind in ("tp", "pp", "dp", "mp", "world", "embedding"):
            if (key := model.key(quiet.rank, kind)) is not None:
                quiet.ends[kind] = comms[key].join(quiet.rank)
    states = [{quiet.rank: (quiet.params, quiet.master, quiet.values) for quiet in ranks}]
    turns = 0
    for step in range(model.steps):
        going = set(range(model.size))
        while going:
            moved = [index for index in sorted(going) if _go(ranks[index])]
            turns += len(moved)
            assert moved, f"the undisturbed run of {model} hangs in step {step + 1}"
            going -= {index for index in moved if ranks[index].program.gi_frame is None}
        for quiet in ranks:
            quiet.step += 1
            quiet.program, quiet.answer = train_step(quiet), None
        states.append({quiet.rank: (quiet.params, quiet.master, quiet.values) for quiet in ranks})
    return Undisturbed(states, turns)


def _go(quiet: _Quiet) -> bool:
    if quiet.waits is not None:
        while not quiet.waits.is_done:
            ripe = [handle for handle in quiet.waits.endpoint.open if handle.endpoint.comm.ripe(handle)]
            if not ripe:
                return False
            quiet.waits.endpoint.complete(ripe[0])
        quiet.answer, quiet.waits = quiet.waits.result, None
    try:
        ask = quiet.program.send(quiet.answer)
    except StopIteration:
        return True
    quiet.answer = None
    match ask:
        case Collective(kind, operation, value):
            quiet.waits = quiet.ends[kind].issue(operation, value)
        case Begin(kind, operation, value):
            quiet.answer = quiet.ends[kind].issue(operation, value)
        case Exchange(operation, sends, receives):
            quiet.waits = quiet.ends["pp"].exchange(operation, sends, receives)
        case Await(handle):
            quiet.waits = handle
        case _:
            pass
    return True
