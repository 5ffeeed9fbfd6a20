"""How long it takes until a fault outside of processes is seen, on the toy job: a network that is cut between two nodes
(ten runs, with network namespaces), a connection that is shut between living ranks, and what the kernel says of a
device (ten of each in one run; the kernel's log is written to, so root is needed, and no NVIDIA driver).

A shut connection is timed from the first operation that fails of it to the order to stop. A node of two ranks is killed
with all of its processes, and what took its place, too, three in one run; that is timed until every rank has done a
step again.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.launched import with_recovery
from bench.report import Figure, write
from megatron_flashrecovery.detect.kernel_log import KMSG
from megatron_flashrecovery.runtime.journal import FILE_NAME, Line, read_journal
from tests.processes.launcher import TOY, Job, Running, processes_of
from tests.processes.nodes import routed, several_nodes, two_nodes

TIMES, EVERY, SPARES = 10, 10, 3
_TIMEOUT = 580.0
_AT_MOST = {"network cut": 3.0, "connection reset": 1.0, "device error in the kernel's log": 1.0}


def main() -> None:
    measure: dict[str, Callable[[], list[float]]] = {
        "network cut": lambda: [network_cut() for _ in range(TIMES)],
        "connection reset": connection_reset,
        "device error in the kernel's log": device_error,
    }
    samples = {kind: take() for kind, take in measure.items()}
    samples["node"] = nodes_killed()
    write("detection_nodes", figures(samples), samples)


def figures(samples: dict[str, list[float]]) -> list[Figure]:
    found = []
    for kind in _AT_MOST:
        seconds = samples[kind]
        found.append(Figure(f"detection of {kind}, median of {TIMES}", statistics.median(seconds), "s"))
        found.append(Figure(f"detection of {kind}, worst", max(seconds), "s", at_most=_AT_MOST[kind]))
    name = "a node killed to first step on a spare node"
    found.append(Figure(f"{name}, median of {SPARES}", statistics.median(samples["node"]), "s"))
    found.append(Figure(f"{name}, worst", max(samples["node"]), "s"))
    return found


def network_cut() -> float:
    """Until the controller counts the node as lost."""
    job = Job(TOY, ranks=2, arguments=("--steps", "1000000"))
    with ExitStack() as stack:
        network = stack.enter_context(routed())
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        nodes = stack.enter_context(two_nodes(job, Path(directory), network.places))
        nodes.first.wait_for(lambda: nodes.first.steps_done() > 5, "some steps")
        network.cut()
        cut = time.time()
        for node in (nodes.first, nodes.second):
            node.process.communicate(timeout=_TIMEOUT)
        (lost,) = nodes.first.journal("NodeLost")
        return lost.time - cut


def nodes_killed() -> list[float]:
    job = Job(TOY, ranks=2, arguments=("--steps", "1000000", "--compute", "0.02"))
    with (
        tempfile.TemporaryDirectory() as directory,
        several_nodes(job, Path(directory), spares=SPARES) as several,
    ):
        nodes = [several.start(node) for node in range(2 + SPARES)]
        nodes[0].wait_for(lambda: nodes[0].count("NodeJoined") == SPARES, "all spare nodes", _TIMEOUT)
        return [node_killed(nodes[0], node) for node in nodes[1:-1]]


def node_killed(first: Running, node: Running) -> float:
    upto = first.steps_done() + EVERY
    first.wait_for(lambda: first.steps_done() >= upto, f"{EVERY} steps", _TIMEOUT)
    done = first.count("FirstStepNoted")
    killed = time.time()
    for pid in processes_of(node.process.pid):
        os.kill(pid, signal.SIGKILL)
    first.wait_for(lambda: first.count("FirstStepNoted") == done + 4, "a step of all four ranks", _TIMEOUT)
    return max(line.time for line in first.journal("FirstStepNoted")) - killed


def connection_reset() -> list[float]:
    cuts = tuple(f"network:rank={number % 4},step={EVERY * (number + 1)},at=forward" for number in range(TIMES))
    with tempfile.TemporaryDirectory() as directory:
        lines = journal_of(Job(TOY, 4, ("--steps", str(EVERY * (TIMES + 1))), injections=cuts), Path(directory))
    told, parked = _first_of_each_epoch(lines, "OperationsFailed"), _first_of_each_epoch(lines, "Park")
    assert len(parked) == TIMES, parked
    # A failure is told in the epoch that it ends.
    return [parked[epoch] - told[epoch - 1] for epoch in parked]


def device_error() -> list[float]:
    job = Job(TOY, TIMES, ("--steps", "1000000", "--pretend-devices"))
    said: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        with with_recovery(job, Path(directory)) as launched:
            for rank in range(TIMES):
                launched.wait_for_step(launched.steps_done() + EVERY, _TIMEOUT)
                said.append(_say(f"NVRM: Xid (PCI:0000:f0:{rank:02x}): 74, pid=1, NVLink: a bench says so"))
                # Another one in the same recovery would be the same loss of two ranks.
                launched.wait_for(lambda: len(_lost(Path(directory))) == len(said), "the loss", _TIMEOUT)
        lost = [line.time for line in _lost(Path(directory))]
    return [seen - told for told, seen in zip(said, lost, strict=True)]


def journal_of(job: Job, directory: Path) -> list[Line]:
    with with_recovery(job, directory) as launched:
        launched.must_end(_TIMEOUT)
    return list(read_journal(directory / FILE_NAME))


def _lost(directory: Path) -> list[Line]:
    return [line for line in read_journal(directory / FILE_NAME) if line.name == "WorkersLost"]


def _first_of_each_epoch(lines: list[Line], name: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in lines:
        if line.name == name:
            epoch = int(line.body.get("epoch", line.epoch))
            found.setdefault(epoch, line.time)
    return found


def _say(line: str) -> float:
    log = os.open(KMSG, os.O_WRONLY)
    os.write(log, line.encode() + b"\n")
    os.close(log)
    return time.time()
