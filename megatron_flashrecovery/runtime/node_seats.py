"""The seats of one node, and what its agent keeps for whoever takes them next.

A spare node has none until it is given those of a lost node; one that is left out has none any more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from megatron_flashrecovery.core.ids import Epoch, Rank, Step, WorkerId
from megatron_flashrecovery.core.messages import RestartAll
from megatron_flashrecovery.runtime.dialogue import Described, InjectionOrder, Seat
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.seat import FROM_CHECKPOINT
from megatron_flashrecovery.runtime.torchrun_environment import torchrun_environment


class NodeSeats:
    """The agent's. ``store`` is where the workers of the job meet; no port until that is known."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self._first = frozenset(config.first_seats(config.node_rank))
        self.ranks: tuple[Rank, ...] = ()
        self.store = ("", 0)
        self.begun_in = Epoch(-1)
        """The newest start of the whole job that this node has heard of."""
        self.described: dict[Rank, Described] = {}
        self._attempt = 0
        self._environment: dict[str, str] = {}
        self._skip: tuple[Step, ...] = ()
        self._taken: Counter[Rank] = Counter()
        self._ready: set[Rank] = set()
        self._startup: dict[Rank, bytes] = {}
        self._reported: dict[Rank, dict[str, Step]] = defaultdict(dict)

    def add(self, ranks: Iterable[Rank]) -> None:
        self.ranks = tuple(sorted({*self.ranks, *ranks}))

    def give_up(self, ranks: Collection[Rank]) -> None:
        """They are another node's from now on."""
        self.ranks = tuple(rank for rank in self.ranks if rank not in ranks)
        for rank in ranks:
            self.described.pop(rank, None)

    def begin_anew(self, order: RestartAll) -> None:
        """Whatever was kept belongs to a start that is over."""
        self.begun_in = order.epoch
        self._attempt += 1
        self._skip = order.skip
        self._ready.clear()
        self._startup.clear()
        self._reported.clear()
        self.described.clear()
        if order.from_checkpoint:
            self._environment[FROM_CHECKPOINT] = "1"

    def note_ready(self, rank: Rank, startup: bytes) -> None:
        self._ready.add(rank)
        if startup:
            self._startup[rank] = startup

    def note_reported(self, rank: Rank, name: str, step: Step) -> None:
        self._reported[rank][name] = step

    def are_ready(self) -> bool:
        """Whether somebody sits on each seat, and has come to the first step."""
        return bool(self.ranks) and self._ready.issuperset(self.ranks)

    def are_described(self) -> bool:
        return self.described.keys() == set(self.ranks)

    def takes_part(self, seat: Seat) -> bool:
        """Whether the script there has asked for recovery; who joins replaces one that has."""
        return seat.joining or seat.rank in self.described or seat.rank in self._ready

    def has_started(self, seat: Seat) -> bool:
        """Whether a script came to its first step there: then it can be run like this."""
        return seat.joining or seat.rank in self._ready

    def seat(self, rank: Rank, epoch: Epoch, joining: bool, injections: tuple[InjectionOrder, ...]) -> Seat:
        """What the next worker of this rank is told."""
        config = self._config
        self._taken[rank] += 1
        # Workers of one rank are told apart by name, also those of different nodes.
        where = "" if rank in self._first else f"@{config.node}"
        return Seat(
            rank=rank,
            worker=WorkerId(f"rank{rank}.{self._taken[rank]}{where}"),
            node=config.node,
            epoch=epoch,
            joining=joining,
            startup=self._startup.get(rank, b"") if joining else b"",
            world_size=config.world_size,
            ranks_per_node=config.nproc_per_node,
            store_host=self.store[0],
            store_port=self.store[1],
            token=config.token,
            script=config.script,
            module=config.module,
            script_args=config.script_args,
            environment={**self._environment, **torchrun_environment(config, rank, self.store, self._attempt)},
            injections=injections,
            drain_timeout=config.deadlines.drain_timeout,
            execute_timeout=config.deadlines.execute_timeout,
            join_timeout=config.deadlines.join_timeout,
            reported=self._reported[rank],
            skip=self._skip,
            may_move=config.spare_nodes > 0,
        )
