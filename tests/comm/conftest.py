"""Real processes for tests of groups: forked from a server that has torch already, on a store that outlives them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

HOST = "127.0.0.1"
_PRELOAD = ["torch.distributed", "megatron_flashrecovery.comm.registry", "megatron_flashrecovery.testing.parking"]


def _entry(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    place: tuple[int, str],
    results: Any,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    port, prefix = place
    store = dist.PrefixStore(prefix, dist.TCPStore(HOST, port, None, False, wait_for_workers=False))
    try:
        results.send((True, function(rank, world_size, store, *args)))
    except BaseException:
        results.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


class Ranks:
    """Runs ``function(rank, world_size, store, *args)`` in as many processes; each result must survive pickle."""

    def __init__(self, context: Any, port: int, prefix: str) -> None:
        self._context = context
        self._place = (port, prefix)
        self.processes: list[Any] = []

    def prefix(self, prefix: str) -> None:
        """Another job on the same store."""
        self._place = (self._place[0], f"{self._place[1]}/{prefix}")

    def store(self) -> Any:
        port, prefix = self._place
        return dist.PrefixStore(prefix, dist.TCPStore(HOST, port, None, False, wait_for_workers=False))

    def start(self, function: Callable[..., Any], rank: int, world_size: int, *args: Any) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_entry, args=(function, rank, world_size, self._place, theirs, args))
        process.start()
        theirs.close()
        self.processes.append(process)
        return process, ours

    def __call__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        deadline: float = 40,
        dying: Collection[int] = (),
    ) -> list[Any]:
        """The results by rank; -9 for those that were to be killed. Fails as soon as one rank fails."""
        started = [self.start(function, rank, world_size, *args) for rank in range(world_size)]
        return self.results(started, deadline, dying)

    def results(self, started: Sequence[tuple[Any, Any]], deadline: float, dying: Collection[int] = ()) -> list[Any]:
        until = time.monotonic() + deadline
        rank_of = {results: rank for rank, (_, results) in enumerate(started)}
        values: list[Any] = [None] * len(started)
        while rank_of:
            ready = multiprocessing.connection.wait(list(rank_of), max(0.0, until - time.monotonic()))
            if not ready:
                pytest.fail(f"no result in time from ranks {sorted(rank_of.values())}")
            for results in ready:
                rank = rank_of.pop(results)
                values[rank] = self._result(started[rank][0], rank, results, until, rank in dying)
        return values

    def _result(self, process: Any, rank: int, results: Any, until: float, dies: bool) -> Any:
        try:
            ok, value = results.recv()
        except EOFError:
            process.join()
            if not dies or process.exitcode != -9:
                pytest.fail(f"rank {rank} ended with exit code {process.exitcode}")
            return process.exitcode
        if not ok:
            pytest.fail(f"rank {rank}: {value}")
        process.join(max(0.0, until - time.monotonic()))
        assert process.exitcode == 0, f"rank {rank}: exit code {process.exitcode} after its result was sent"
        return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.failed = getattr(item, "failed", False) or report.failed
    return report


@pytest.fixture(scope="session")
def fork_server():
    """A context whose processes have imported torch already, and the port of a store that outlives all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()
    store = dist.TCPStore(HOST, 0, None, True, wait_for_workers=False)
    yield context, store.port
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture
def run_ranks(request, fork_server):
    ranks = Ranks(*fork_server, prefix=request.node.name)
    yield ranks
    failed = getattr(request.node, "failed", False)
    leaked = [process for process in ranks.processes if process.is_alive()]
    for process in leaked:
        process.kill()
        process.join()
    assert failed or not leaked, f"processes left running: {[process.pid for process in leaked]}"


@pytest.fixture(autouse=True)
def closed_communicators():
    """Gloo's event loops end on threads of their own: nothing of a test's is left when the next one begins."""
    yield
    for thread in threading.enumerate():
        if thread.name == "flashrecovery-close":
            thread.join(timeout=10)
