"""The checks of a simulated run: the eight invariants, the numbers, and the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_flashrecovery.core.coordinator import Job
from megatron_flashrecovery.core.ids import Epoch, OrderNumber, Rank, Step
from megatron_flashrecovery.core.member import Order
from megatron_flashrecovery.core.messages import BeginTraining, Park
from megatron_flashrecovery.core.phases import Draining, Executing, Staffing
from megatron_flashrecovery.core.reports import Report, Update
from tests.simulation.program import undisturbed

if TYPE_CHECKING:
    from tests.simulation.worker import Worker
    from tests.simulation.world import World


_GOOD_REASONS = ("times without progress", "deadlines missed", "restarted", "was suspected", "without a completed step")


class Violation(AssertionError):
    """Something happened that must never happen."""


class Monitor:
    def __init__(self, world: World) -> None:
        self.world = world
        self.expected = undisturbed(world.settings.model).states
        self.acknowledged: dict[Rank, int] = {}
        self.final: dict[Rank, tuple[int, int, int]] = {}
        self.obeyed: dict[str, tuple[Epoch, OrderNumber]] = {}
        self.completed = 0

    def blame(self, what: str) -> None:
        """``direct checks`` off: only what follows from a broken invariant counts, not that it was broken."""
        if "direct checks" not in self.world.off or not what.startswith("invariant"):
            raise Violation(what)

    # --- while it runs -----------------------------------------------------------------------------------------------

    def on_acknowledged(self, guest: Rank, step: int) -> None:
        self.acknowledged[guest] = max(step, self.acknowledged.get(guest, -1))

    def on_discarded(self, rank: Rank) -> None:
        self.acknowledged[rank] = -1

    def on_step(self, worker: Worker) -> None:
        """A rank has completed a step: invariant 1, and the numbers."""
        needed = worker.step - 1 if worker.model.sharded else worker.step
        for rank in range(worker.model.size):
            if self.acknowledged.get(Rank(rank), -1) < needed:
                self.blame(
                    f"invariant 1: rank {worker.rank} completed step {worker.step} "
                    f"before the mirror of rank {rank} of step {needed} was acknowledged"
                )
        self._compare(worker, "completed")
        self.completed = max(self.completed, worker.step)

    def on_use(self, worker: Worker, what: str) -> None:
        """Void contents end with the call that they were given to."""
        if worker.is_void:
            self.blame(f"void contents reach rank {worker.rank}: {what} in step {worker.step + 1}")

    def _compare(self, worker: Worker, what: str) -> None:
        params, master, values = self.expected[worker.step][worker.rank]
        have = (worker.params, worker.master, worker.values)
        # Aborted gathers leave garbage in the parameters of a sharded rank; they are gathered again on recovery.
        if worker.model.sharded and worker.has_abort_begun and what == "completed":
            params = worker.params
        if have != (params, master, values):
            self.blame(f"rank {worker.rank} {what} step {worker.step} with {have}, not {(params, master, values)}")

    def on_obeyed(self, worker: Worker, order: Order) -> None:
        """Invariant 4."""
        before = self.obeyed.get(worker.name, (worker.started_for, OrderNumber(-1)))
        if isinstance(order, BeginTraining):
            if worker.name in self.obeyed or order.epoch != worker.started_for:
                self.blame(f"invariant 4: rank {worker.rank} began epoch {order.epoch} after {before}")
            return
        if isinstance(order, Park):
            if order.epoch <= before[0] and before[1] >= 0:
                self.blame(f"invariant 4: rank {worker.rank} parked for epoch {order.epoch} in epoch {before[0]}")
        elif order.epoch != worker.member.epoch or order.number <= before[1]:
            self.blame(f"invariant 4: rank {worker.rank} obeyed order {order.number} of epoch {order.epoch}")
        self.obeyed[worker.name] = (order.epoch, order.number)

    def on_executed(self, worker: Worker) -> None:
        """Invariants 2 and 3, on one rank."""
        newer = [step for slots in [worker.own, *worker.guests.values()] for step in slots if step > worker.step]
        if newer:
            self.blame(
                f"invariant 2: rank {worker.rank} resumes at step {worker.step} and keeps a snapshot of {newer[0]}"
            )
        host = self.world.worker_on(self.world.settings.host_of[worker.rank])
        is_present = host is not None and host.data_epoch == worker.data_epoch
        if host is not None and is_present and worker.step not in host.guests.get(worker.rank, {}):
            self.blame(f"invariant 3: rank {worker.rank} executed the plan without a mirror of step {worker.step}")
        self._compare(worker, "restored")

    # --- decisions of the coordinator --------------------------------------------------------------------------------

    def on_planned(self, job: Job, reports: dict[Rank, Report], vault: dict[Rank, tuple[Step, ...]]) -> None:
        """Invariant 6, by brute force over what was reported."""
        assert isinstance(job.phase, Executing)
        step = job.phase.plan.resume_step
        newest = self.newest_producible(job, reports, vault)
        is_older = newest is not None and step < newest
        if newest != step and not (is_older and job.failed):
            self.blame(f"invariant 6: resume at step {step}, but every rank can produce {newest}")
        done = max((worker.step for worker in self.world.living()), default=0)
        if step < done - 1 and not job.failed:
            self.blame(f"more than one step is computed twice: resume at step {step}, {done} was completed")

    def newest_producible(
        self, job: Job, reports: dict[Rank, Report], vault: dict[Rank, tuple[Step, ...]]
    ) -> int | None:
        model, host_of = self.world.settings.model, self.world.settings.host_of
        for step in range(model.steps, -1, -1):
            trusted = {rank for rank in host_of if rank not in job.poisoned or (rank, step) in job.renewed}
            live = {rank for rank, report in reports.items() if rank in trusted and self._holds(report, step)}
            holders = set()
            for index in range(model.size):
                rank = Rank(index)
                report, host = reports.get(rank), reports.get(host_of[rank])
                has_copy = (rank in trusted and step in (vault.get(rank, ()) if report is None else report.own)) or (
                    host is not None and self._keeps(job, host, rank, step)
                )
                dp = model.groups[model.key(rank, "dp") or ""]  # type: ignore[index]
                if has_copy and (model.sharded or any(peer in live for peer in dp)):
                    holders.add(rank)
            if len(holders) == model.size:
                return step
        return None

    def _keeps(self, job: Job, host: Report, rank: Rank, step: int) -> bool:
        is_new = host.rank not in job.poisoned or (rank, step) in job.renewed
        return is_new and step in host.guests.get(rank, ())

    def _holds(self, report: Report, step: int) -> bool:
        at = (
            report.step + 1
            if report.update is Update.APPLIED and not self.world.settings.model.sharded
            else report.step
        )
        return at == step and step in report.own and report.update is not Update.WRITING

    def on_resume(self, job: Job) -> None:
        """Invariants 2, 3 and 7, over everybody: groups are whole, quiet and the same for all members."""
        epoch = job.epoch
        living = self.world.living()
        timelines = {worker.timeline for worker in living if worker.member.epoch == epoch}
        if len(timelines) > 1:
            self.blame(f"timelines are mixed at step {job.last_resume}")
        for worker in living:
            if worker.member.epoch == epoch:
                self.on_use(worker, "the job resumes")
        for key, members in self.world.settings.model.groups.items():
            ends = [worker.ends[key] for worker in living if worker.rank in members and worker.member.epoch == epoch]
            if len({id(end.comm) for end in ends}) > 1:
                self.blame(f"invariant 7: members of {key} hold different communicators in epoch {epoch}")
            if len(ends) == len(members) and not any(end.broken for end in ends) and not ends[0].comm.is_quiet():
                self.blame(f"invariant 7: something is under way in {key} as epoch {epoch} resumes")
            if len({(end.issued, end.completed, end.digest) for end in ends}) > 1:
                self.blame(f"invariant 7: members of {key} count differently in epoch {epoch}")

    # --- the end -----------------------------------------------------------------------------------------------------

    def on_finished(self, worker: Worker) -> None:
        self.final[worker.rank] = (worker.params, worker.master, worker.values)
        self.world.luck.on_phase("finishing")

    def on_all_finished(self) -> None:
        steps = self.world.settings.model.steps
        if self.final != self.expected[steps]:
            wrong = [rank for rank, state in self.expected[steps].items() if self.final.get(rank) != state]
            self.blame(f"the final state of ranks {wrong} is not that of the undisturbed run")

    def on_given_up(self, reason: str, lost: set[Rank]) -> None:
        """A state is gone only if whoever had it was lost together with whoever kept a copy."""
        model, host_of = self.world.settings.model, self.world.settings.host_of
        # Between two writes of one update nobody has a state, if the reduction there needed the lost rank.
        is_beyond_help = len(lost | self.world.luck.cut) > 1 or model.chained
        is_true = any(host_of[rank] in lost for rank in lost) if model.sharded else is_beyond_help
        if not is_true and not self.world.luck.has_corrupted:
            self.blame(f"gave up although only {sorted(lost)} were lost: {reason}")

    def on_halted(self, job: Job, before: object, reason: str) -> None:
        """A job may stop only for a reason that is true."""
        if isinstance(before, Staffing | Draining) and reason.startswith("no copy"):
            if self.newest_producible(job, before.census.reports, job.vault) is not None and not job.failed:
                self.blame(f"halted although a step can be produced: {reason}")
        elif reason.startswith("no node has room"):
            if not job.seats.homeless:
                self.blame(f"halted although every seat has a node: {reason}")
        elif reason.startswith("communication failed") and self.world.luck.cut:
            return
        elif "hold different parameters" in reason:
            pass  # nobody can say since when: a state that may be wrong is no state
        elif not any(each in reason for each in _GOOD_REASONS):
            self.blame(f"halted for no good reason: {reason}")
        if "was suspected" in reason:
            return
        if job.checkpoint is not None and job.restarts < job.config.max_restarts and not job.seats.homeless:
            self.blame(f"halted although there is a checkpoint of step {job.checkpoint}: {reason}")
