"""What one seed decides about a simulated job before it starts: its layout, its framework, its bad luck."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random

from megatron_flashrecovery.core.ids import GroupKey, NodeId, Rank
from megatron_flashrecovery.core.job import JobConfig

LAYOUTS = [(2, 2, 2), (1, 2, 4), (2, 1, 4), (1, 4, 2), (2, 2, 3), (2, 4, 2), (1, 1, 8), (2, 2, 4), (4, 1, 2), (1, 2, 2)]
_ALARMS = 0.15
_WATCHES = 0.25
_POISONS = 0.2
_CUTS = 0.2
_DIAGNOSES = 0.2
_IN_PLAN = 0.3
PARALLEL = ["tp", "pp", "dp", "mp", "world", "embedding"]


@dataclass(frozen=True)
class Model:
    """Everything that the numbers of a run depend on. ``norm`` is the group of the gradient norm, if there is one."""

    tp: int
    pp: int
    dp: int
    steps: int
    microbatches: int
    buckets: int
    sharded: bool
    norm: str | None
    chained: bool
    loss: bool

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.dp

    @cached_property
    def groups(self) -> dict[GroupKey, tuple[Rank, ...]]:
        members: dict[str, list[Rank]] = {}
        for index in range(self.size):
            for kind in PARALLEL:
                if (key := self.key(Rank(index), kind)) is not None:
                    members.setdefault(key, []).append(Rank(index))
        return {GroupKey(key): tuple(ranks) for key, ranks in members.items()}

    def place(self, rank: Rank) -> tuple[int, int, int]:
        """Tensor, pipeline and data parallel position."""
        return rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp

    def rank_at(self, tp: int, pp: int, dp: int) -> Rank:
        return Rank(tp + self.tp * (dp + self.dp * pp))

    def key(self, rank: Rank, kind: str) -> GroupKey | None:
        tp, pp, dp = self.place(rank)
        if kind == "embedding" and (self.pp < 2 or pp not in (0, self.pp - 1)):
            return None
        where = {"tp": (pp, dp), "pp": (tp, dp), "dp": (tp, pp), "mp": (dp,), "world": (), "embedding": (tp, dp)}[kind]
        return GroupKey(kind + "".join(f"-{index}" for index in where))

    @property
    def agreement(self) -> str | None:
        """The group of the message without which the reductions after the gate would not connect all ranks."""
        if self.norm == "world":
            return None
        return "dp" if self.norm == "mp" else "world"


@dataclass(frozen=True)
class Fault:
    """``when``: a moment, as a share of the main-thread turns of a run, or as the phase that begins."""

    when: str
    share: float
    delay: int
    victims: str
    kind: str


@dataclass(frozen=True)
class Settings:
    """One simulated run. ``off`` names protections that are switched off, to see whether the checks notice.
    ``watches``: agents tell how long steps take, and of those that do not stop who is busy and who hangs. Drawn apart.
    """

    seed: int
    model: Model
    nodes: int
    config: JobConfig
    faults: tuple[Fault, ...]
    spares: int
    spare_delay: float
    is_eager: bool = True
    returns_garbage: bool = False
    parks_at_write: bool = True
    keeps_told_last: bool = True
    has_vault: bool = True
    late_mirrors: float = 0.02
    notice: float = 0.3
    checkpoint_every: int = 0
    forms_kept: int = 8
    watches: bool = False
    are_suspected: bool = False
    """Every device was suspected once before."""
    off: frozenset[str] = frozenset()

    @cached_property
    def seats(self) -> dict[NodeId, tuple[Rank, ...]]:
        per_node = -(-self.model.size // self.nodes)
        ranks = [Rank(index) for index in range(self.model.size)]
        blocks = [ranks[start : start + per_node] for start in range(0, len(ranks), per_node)]
        return {NodeId(f"n{index}"): tuple(block) for index, block in enumerate(blocks)}

    @cached_property
    def host_of(self) -> dict[Rank, Rank]:
        shift = 1 if self.nodes == 1 else -(-self.model.size // self.nodes)
        return {Rank(index): Rank((index + shift) % self.model.size) for index in range(self.model.size)}


def draw(seed: int, off: frozenset[str] = frozenset()) -> Settings:
    """Everything about a run follows from its seed."""
    rng = Random(f"settings {seed}")
    tp, pp, dp = rng.choice(LAYOUTS)
    sharded = rng.random() < 0.5
    model = Model(
        tp,
        pp,
        dp,
        steps=rng.choice([2, 3, 4]),
        microbatches=rng.choice([1, 2]),
        buckets=rng.choice([0, 1, 2]),
        sharded=sharded,
        norm=rng.choice(["world", "world", None] if sharded else ["mp", "mp", "world", None]),
        chained=rng.random() < 0.2,
        loss=rng.random() < 0.5,
    )
    patience = rng.choice([1.0, 1.0, 1.0, 0.1])
    config = JobConfig(
        drain_timeout=6.0 * patience,
        drain_grace=0.3,
        join_timeout=10.0 * patience,
        execute_timeout=10.0 * patience,
        max_rounds=rng.choice([2, 3]),
        max_restarts=3,
    )
    nodes = rng.choice([1, 2, 2, 3, 4])
    return Settings(
        seed,
        model,
        nodes,
        config,
        faults=(
            *(_draw_fault(rng, nodes) for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 4]))),
            *_draw_alarm(seed, off),
            *_draw_poison(seed, off),
            *_draw_cut(seed, off),
            *_draw_numbers(seed, off),
            *_draw_diagnosis(seed, off),
            *_draw_in_plan(seed, off),
        ),
        spares=rng.choice([0, 1, 1, 2]),
        spare_delay=rng.choice([0.0, 0.5, 5.0]),
        is_eager=rng.random() < 0.6,
        returns_garbage=rng.random() < 0.4,
        parks_at_write=rng.random() < 0.5,
        keeps_told_last=rng.random() < 0.8,
        has_vault=rng.random() < 0.6,
        late_mirrors=rng.choice([0.02, 0.02, 0.5]),
        notice=rng.choice([0.0, 0.3, 1.0]),
        checkpoint_every=rng.choice([0, 0, 1, 2]),
        are_suspected=Random(f"suspects {seed}").random() < 0.3,
        forms_kept=0 if "matching" in off else rng.choice([0, 1, 2, 8, 8, 8]),
        watches=not off and Random(f"watch {seed}").random() < _WATCHES,
        off=off,
    )


def _draw_alarm(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Sometimes all are told to hang though nobody does. Drawn apart, so that the rest of a seed stays what it was."""
    rng = Random(f"alarm {seed}")
    if off or rng.random() > _ALARMS:
        return ()
    return (Fault("turn", rng.random(), rng.choice([0, 3, 30]), "one", "alarm"),)


def _draw_numbers(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Sometimes numbers are said to be bad, or peers to differ, by all, one or two. Drawn apart like alarms."""
    rng = Random(f"numbers {seed}")
    if off or rng.random() > _ALARMS:
        return ()
    kinds = ["numbers", "numbers", "numbers", "differ"]
    return tuple(
        Fault("turn", rng.random(), rng.choice([0, 3, 30]), rng.choice(["one", "two", "all"]), rng.choice(kinds))
        for _ in range(rng.choice([1, 1, 2, 3]))
    )


def _draw_diagnosis(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Sometimes a diagnosis blames a node, and sometimes all. Drawn apart, too."""
    rng = Random(f"diagnosis {seed}")
    if off or rng.random() > _DIAGNOSES:
        return ()
    when = rng.choice(["turn"] * 4 + ["Draining", "Staffing", "Executing", "Training"])
    return (Fault(when, rng.random() / 2, rng.choice([0, 3, 30]), rng.choice(["one", "one", "all"]), "diagnosis"),)


def _draw_in_plan(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Sometimes a plan is overtaken while it is carried out, somewhere in it. Drawn apart, too."""
    rng = Random(f"in a plan {seed}")
    if off or rng.random() > _IN_PLAN:
        return ()
    kinds, victims = ["kill", "cut", "cut", "pause"], ["one", "one", "two", "replacement", "host and guest"]
    return (
        Fault("turn", rng.random(), 0, "one", "kill"),
        *(
            Fault("Executing", 0.0, int(rng.random() * 120), rng.choice(victims), rng.choice(kinds))
            for _ in range(rng.choice([1, 1, 2]))
        ),
    )


def _draw_poison(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Memory of some ranks turns out wrong. Drawn apart, too."""
    rng = Random(f"poison {seed}")
    if off - {"poison"} or rng.random() > _POISONS:
        return ()
    when = ["turn"] * 3 + ["Draining", "Staffing", "Executing", "WRITING"]
    victims = ["one", "one", "replacement"]
    return tuple(
        Fault(rng.choice(when), rng.random(), rng.choice([0, 3, 30]), rng.choice(victims), "poison")
        for _ in range(rng.choice([1, 1, 2, 3]))
    )


def _draw_cut(seed: int, off: frozenset[str]) -> tuple[Fault, ...]:
    """Sometimes a connection goes while everybody lives. Drawn apart, too."""
    rng = Random(f"cut {seed}")
    if off or rng.random() > _CUTS:
        return ()
    when = rng.choice(["turn"] * 4 + ["Draining", "Staffing", "Executing", "Training", "WRITING", "Starting"])
    return tuple(
        Fault(when, rng.random(), rng.choice([0, 3, 30, 100]), "one", "cut") for _ in range(rng.choice([1, 1, 2]))
    )


def _draw_fault(rng: Random, nodes: int) -> Fault:
    kinds = ["kill"] * 8 + ["hang", "pause", "corrupt"] + (["node"] * 2 if nodes > 1 else [])
    return Fault(
        when=rng.choice(
            ["turn"] * 6 + ["Draining", "Staffing", "Executing", "Training", "WRITING", "Starting", "finishing"]
        ),
        share=rng.random(),
        delay=rng.choice([0, 0, 3, 10, 30, 100, 300]),
        victims=rng.choice(["one"] * 6 + ["two", "three", "host and guest", "replacement", "peers", "all"]),
        kind=rng.choice(kinds),
    )
