"""Checkpoints that Megatron-LM writes in the background, and what becomes of them when a rank is lost.

Upstream's ``async_utils`` has a queue of saves that are under way, the same on every rank, and writers in processes of
their own. A replacement knows of none, so after a loss nobody does: whoever survives ends his writers, and the queue is
empty everywhere. A save counts as complete by its marker, which is written when all ranks have written everything.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import psutil
import torch

from megatron_flashrecovery.adapters.megatron_lm.checkpoint import directory_of, newest_saved
from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession
from megatron_flashrecovery.core.errors import SeamChanged
from megatron_flashrecovery.core.ids import Step

_QUEUE, _RESULTS = "_async_calls_queue", "_results_queue"
_QUEUES_OF_WRITER = ("queue", "preload_q", "comp_q")
_SHARED = "_persistent_"
"""Newer versions keep the writer and its queues at the class, under names that begin so."""
_GONE_WITHIN = 10.0


class AsyncSaves:
    """``args`` are upstream's. Without ``--async-save`` it does nothing."""

    def __init__(self, session: LoopSession, args: Any) -> None:
        self._session = session
        self._args = args
        self._under_way: list[Step] = []
        self._finalised: set[Step] = set()
        self._has_news = False
        self._utils: ModuleType
        self._files: ModuleType
        if args.async_save:
            self._utils = importlib.import_module("megatron.training.async_utils")
            self._files = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
            for module, name in ((self._utils, _QUEUE), (self._files, _RESULTS)):
                _seam(module, name)

    def around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function of that name, watched if it begins or ends a save."""
        if not self._args.async_save:
            return original
        if name == "save_checkpoint":
            return lambda iteration, *rest, **named: self._begin(original, Step(iteration), *rest, **named)
        if name == "maybe_finalize_async_save":
            return lambda *args, **named: self._finalise(original, *args, **named)
        return original

    def take_news(self) -> bool:
        """Whether the marker may have moved since the last time."""
        had, self._has_news = self._has_news, False
        return had

    def abandon(self) -> None:
        """The job has lost a rank. Its own queue is gone with it, and so are its writers."""
        if not self._args.async_save:
            return
        self._count_finalised()
        if cut := [*self._end()]:
            newest = newest_saved(self._args.save)
            cut_short = ", ".join(str(step) for step in cut if step != newest)
            if cut_short:
                left = f"the newest checkpoint is that of step {newest}" if newest else "there is no checkpoint yet"
                print(f"flashrecovery: the save of step {cut_short} was cut short; {left}", flush=True)

    def give_up(self) -> None:
        """This process ends by an error: it must not wait for writers that nobody will ever end."""
        if self._args.async_save:
            self._end()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, original: Callable[..., Any], step: Step, *rest: Any, **named: Any) -> Any:
        resumed = self._session.last_resume
        if resumed is not None and resumed <= step <= resumed + 1:
            if self._is_complete(step):
                print(f"flashrecovery: the checkpoint of step {step} is complete, and not written again", flush=True)
                return None
            self._forget_files(step)
        before = self._length()
        try:
            return original(step, *rest, **named)
        finally:
            self._under_way += [step] * (self._length() - before)

    def _finalise(self, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        self._count_finalised()
        del self._under_way[: len(self._under_way) - self._length()]
        return result

    def _count_finalised(self) -> None:
        """Those that upstream has taken out of its queue. If that was cut short, only the marker says whether it is
        complete, and on some ranks the writers may even be at work yet."""
        over = self._under_way[: len(self._under_way) - self._length()]
        self._finalised.update(over)
        self._has_news = self._has_news or bool(over)

    def _is_complete(self, step: Step) -> bool:
        """Agreed on by all: this job has finalised it, and its marker says so. To write it once more would leave none
        to start from for as long as that takes."""
        marked = torch.distributed.get_rank() == 0 and newest_saved(self._args.save) == step
        mine = [int(step in self._finalised), int(marked)]
        told = torch.tensor(mine, dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.min().item())

    def _forget_files(self, step: Step) -> None:
        """What a writer that was ended, but is not yet out of the kernel, still writes must not reach the new files."""
        for path in directory_of(self._args.save, step).glob(f"*__{torch.distributed.get_rank()}_*.distcp"):
            path.unlink(missing_ok=True)

    def _length(self) -> int:
        queue = getattr(self._utils, _QUEUE)
        return 0 if queue is None else len(_seam(queue, "async_calls"))

    def _end(self) -> list[Step]:
        """End all writers, and empty the queue. Returns the steps whose saves were under way."""
        queue = getattr(self._utils, _QUEUE)
        cut, self._under_way = self._under_way, []
        if queue is None:
            return cut
        _seam(queue, "call_idx")
        if cut:
            callers = [active.async_caller for active in queue.async_calls]
            callers += [getattr(queue, name, None) for name in ("persistent_caller", "_persistent_caller")]
            for caller in {id(caller): caller for caller in callers if caller is not None}.values():
                _end_writer(caller)
            for owner, name in ((queue, "persistent_caller"), (type(queue), "_persistent_caller")):
                if hasattr(owner, name):
                    setattr(owner, name, None)
            self._renew_results()
        queue.async_calls.clear()
        queue.call_idx = -1  # the replacement begins to count, too
        return cut

    def _renew_results(self) -> None:
        """Where writers leave what they have written: what an abandoned one has left must not be taken for new."""
        results = getattr(self._files, _RESULTS)
        if results is not None:
            setattr(self._files, _RESULTS, _seam(results, "_manager").Queue())


def _end_writer(caller: Any) -> None:
    process = _seam(caller, "process")
    if process is not None:
        _end_tree(process.pid)
        process.join(_GONE_WITHIN)
    owner = type(caller)
    for name in (*_QUEUES_OF_WRITER, *(_SHARED + name for name in _QUEUES_OF_WRITER)):
        queue = getattr(caller, name, None)
        if queue is not None:
            queue.cancel_join_thread()  # nobody is left to read from it
            queue.close()
    for name in ("process", *_QUEUES_OF_WRITER):
        if hasattr(owner, _SHARED + name):
            setattr(owner, _SHARED + name, None)
    caller.process = None


def _end_tree(pid: int) -> None:
    """A process and all that it has started: stopped first, so that it starts no more meanwhile."""
    try:
        root = psutil.Process(pid)
        root.suspend()
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in members:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + _GONE_WITHIN
    while any(_lives(member) for member in members) and time.monotonic() < deadline:
        time.sleep(0.001)


def _lives(member: psutil.Process) -> bool:
    try:
        return member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _seam(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", type(owner).__name__)
        raise SeamChanged(f"{where} has no {name}: in this version of Megatron-LM leave --async-save away")
    return getattr(owner, name)
