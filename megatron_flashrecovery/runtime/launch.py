"""``flashrecovery run``: one process per node that is the agent of it, and on node 0 the controller too."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

from megatron_flashrecovery import __version__
from megatron_flashrecovery.comm.control import ControlClient
from megatron_flashrecovery.core.coordinator import Job, JobConfig
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import NodeId
from megatron_flashrecovery.runtime import node_messages
from megatron_flashrecovery.runtime.agent import Agent
from megatron_flashrecovery.runtime.chronicle import Chronicle
from megatron_flashrecovery.runtime.controller import Controller
from megatron_flashrecovery.runtime.diagnostician import Diagnostician
from megatron_flashrecovery.runtime.echo import Echo
from megatron_flashrecovery.runtime.heartbeat import Heart
from megatron_flashrecovery.runtime.injections import refuse_impossible
from megatron_flashrecovery.runtime.launch_config import LaunchConfig
from megatron_flashrecovery.runtime.spool import Spool
from megatron_flashrecovery.runtime.workers import Workers
from megatron_flashrecovery.state.vault import Vault

_GRACE = 5.0
_UNEXPLAINED = "the launcher ended"


class Interruption(Exception):
    """The launcher was told to end at once by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"told to end at once by {signal.Signals(number).name}")
        self.number = number


def run(config: LaunchConfig) -> int:
    """Until the job is over. Returns the exit code: 0 if every rank finished. Raises ``ConfigError``."""
    if not config.module and not Path(config.script).is_file():
        raise ConfigError(f"the script {config.script} does not exist")
    refuse_impossible(config.injections)
    config = dataclasses.replace(config, token=config.token or secrets.token_hex(16))
    workers = Workers(
        config.script,
        config.log_dir / "logs",
        _worker_environment(config),
        preload=config.preload and not config.module,
        hooks=config.hooks,
    )
    told = _Told()
    try:
        with told.listening(), _controller(config, told) as (address, stop_controller):
            return _serve(config, workers, address, stop_controller, told)
    except Interruption as interruption:
        print(f"flashrecovery: {interruption}: ending {len(workers.living)} workers", file=sys.stderr, flush=True)
        return 128 + interruption.number
    finally:
        workers.close(_GRACE if told.first is None else 0.0)  # else they have had their time


def _serve(
    config: LaunchConfig, workers: Workers, address: str, stop_controller: Callable[[str], None], told: _Told
) -> int:
    node = config.node
    here = "no workers here yet" if config.is_spare else f"{config.nproc_per_node} workers here"
    print(f"flashrecovery: {here}, records in {config.log_dir}", file=sys.stderr, flush=True)
    if not workers.cold_because:
        print("flashrecovery: doing the script's imports, for all workers at once", file=sys.stderr, flush=True)
    seconds = workers.wait_for_server(config.deadlines.join_timeout)
    if workers.cold_because:
        print(f"flashrecovery: workers start cold: {workers.cold_because}", file=sys.stderr, flush=True)
    else:
        print(f"flashrecovery: the imports took {seconds:.1f} s", file=sys.stderr, flush=True)
    control = ControlClient(address, node_messages.control_codec(), config.token, __version__)
    vault = Vault()
    agent = Agent(config, node, workers, control, vault)
    failures: list[Exception] = []

    def on_end(reason: Exception | None) -> None:
        if reason is not None:
            failures.append(reason)
            agent.hear(node_messages.Dismiss(str(reason), 2 if isinstance(reason, ConfigError) else 1, at_once=True))

    control.start(agent.hear, on_end)
    heart = Heart(node, control, config.deadlines.heartbeat_interval, agent.injections)
    echo = Echo(config.log_dir / "logs" / f"rank{config.world_size - 1}.log", sys.stdout)
    if config.shutdown_timeout:
        told.pass_on = agent.hear
    ending = _UNEXPLAINED
    try:
        dismissal = agent.run(echo.follow)
        ending = dismissal.failure
        echo.follow()
    except (Interruption, ConfigError) as stopped:
        ending = str(stopped)
        raise
    finally:
        told.pass_on = None  # from here on a signal ends this launcher
        heart.stop()
        agent.close()
        stop_controller(ending)  # before the connection ends, which would look like the loss of this node
        control.close()
        vault.close()
    if not dismissal.failure:
        for never in agent.injections.never_happened():
            print(f"flashrecovery: WARNING: {never}", file=sys.stderr)
    if dismissal.failure:
        what = "this node leaves the job" if dismissal.at_once else "the job stops"
        print(f"flashrecovery: {what}: {dismissal.failure}", file=sys.stderr, flush=True)
    workers.close(_GRACE if told.first is None else 0.0)  # nodes that come late are waited for without them
    return dismissal.exit_code if told.first is None else 128 + told.first


@contextmanager
def _controller(config: LaunchConfig, told: _Told) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of the controller, and how to stop it, with the reason for the record; on node 0 it runs in a thread
    of this process for as long as this lasts, and until every node has come, if the launcher was not told to end."""
    if config.node_rank != 0:
        yield f"{config.master_addr}:{config.master_port}", lambda _reason: None
        return
    store_port, keep_store = _open_store(config)
    chronicle = Chronicle(config)
    seats = {NodeId(f"node{node_rank}"): config.first_seats(node_rank) for node_rank in range(config.nnodes)}
    deadlines = config.deadlines
    job_config = JobConfig(
        drain_timeout=deadlines.drain_timeout,
        join_timeout=deadlines.join_timeout,
        execute_timeout=deadlines.execute_timeout,
        max_restarts=config.max_restarts,
        hang_timeout=deadlines.hang_timeout,
        slow_factor=config.slow_factor,
        spare_nodes=config.spare_nodes,
    )
    job = Job.start(job_config, seats, sharded=True)
    spool = Spool(config.log_dir) if config.allow_injection or config.injections else None
    diagnostician = Diagnostician(config.log_dir, config.topology, os.environ) if config.diagnosis else None
    controller = Controller(config, job, (config.master_addr, store_port), chronicle, spool, diagnostician)
    ending = _UNEXPLAINED
    loop = asyncio.new_event_loop()
    # Not the thread itself: a join that a signal interrupts makes it look as if it had ended.
    is_over = threading.Event()

    def run() -> None:
        try:
            loop.run_until_complete(controller.run())
        finally:
            is_over.set()

    thread = threading.Thread(target=run, name="flashrecovery-controller", daemon=True)
    try:
        port = loop.run_until_complete(controller.start(config.master_addr, config.master_port))
        thread.start()

        def stop(reason: str) -> None:
            has_stopped, until = threading.Event(), time.monotonic() + _GRACE
            loop.call_soon_threadsafe(controller.stop, reason)
            loop.call_soon_threadsafe(has_stopped.set)
            # The loop may have ended with these two unread.
            while not is_over.is_set() and not has_stopped.wait(0.05) and time.monotonic() < until:
                pass

        try:
            yield f"{config.master_addr}:{port}", stop
            if told.first is None:
                with suppress(Interruption):  # the job is over, whatever becomes of those who are late
                    is_over.wait()
        except (Interruption, ConfigError) as stopped:
            ending = str(stopped)
            raise
        finally:
            stop(ending)
            loop.call_soon_threadsafe(controller.leave)
            is_over.wait(_GRACE)
    finally:
        chronicle.close(ending)
        if diagnostician is not None:
            diagnostician.close()
        if spool is not None:
            spool.close()
        if is_over.is_set() or thread.ident is None:
            loop.close()
        del keep_store


def _open_store(config: LaunchConfig) -> tuple[int, object]:
    """The store that workers meet in. It lives here because no worker outlives the job."""
    import torch.distributed as dist  # a second of imports that only node 0 needs

    # By itself it would listen on every interface.
    listener = socket.create_server((config.master_addr, 0), backlog=4096)
    store = dist.TCPStore(
        config.master_addr,
        listener.getsockname()[1],
        None,
        True,
        timedelta(seconds=config.deadlines.join_timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store.port, store


def _worker_environment(config: LaunchConfig) -> Mapping[str, str]:
    environment = dict(os.environ)
    if config.nproc_per_node > 1:
        # As torchrun does: by default every worker would take every core.
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


@dataclasses.dataclass
class _Told:
    """The signal that this launcher was told to end by, and who passes it on to the workers, once there are some."""

    first: int | None = None
    pass_on: Callable[[object], None] | None = None

    def hear(self, number: int, _frame: FrameType | None) -> None:
        if self.first is not None or self.pass_on is None or number == signal.SIGINT:
            raise Interruption(number)
        self.first = number
        self.pass_on(signal.Signals(number))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM lets the workers end by themselves; a second one, or SIGINT, ends them at once."""
        before = {number: signal.signal(number, self.hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
