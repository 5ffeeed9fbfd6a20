"""`flashrecovery run`: start a training script on this node's ranks, and replace the ones that are lost."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_flashrecovery.commands.arguments import Arguments, directory_of_records
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime.injection import help_of_spec

if TYPE_CHECKING:
    from megatron_flashrecovery.runtime.launch_config import LaunchConfig

PURPOSE = "start a training script, and replace the ranks that are lost"
TOKEN = "FLASHRECOVERY_TOKEN"
TESTED_TORCH = ("2.13",)
HOOKS = ("megatron_flashrecovery.adapters.megatron_lm.hooks:install",)
"""For scripts that are not ours to change. They wait for the framework to be imported, and do nothing without it."""

_LOGS = "the output of rank N is in logs/rankN.log of --log-dir"

# Flags of torchrun that have no place here.
UNSUPPORTED = {
    "--no-python": "workers are forked from a Python that has imported what the script imports",
    "--run-path": "give the script itself",
    "--start-method": "workers are forked from a preloaded process, or started cold",
    "--redirects": _LOGS,
    "--tee": _LOGS,
    "--local-ranks-filter": _LOGS,
    "--logs-specs": _LOGS,
    "--event-log-handler": "events are in journal.jsonl of --log-dir",
    "--duplicate-stdout-filters": _LOGS,
    "--duplicate-stderr-filters": _LOGS,
    "--rdzv-conf": "ranks do not meet by a rendezvous, node 0 seats them",
    "--virtual-local-rank": "every rank sees all devices of its node",
    "--numa-binding": "bind the launcher itself, its workers inherit it",
    "--local-addr": "a node reaches the others by --master-addr",
    "--signals-to-handle": "SIGTERM is passed on to the workers, SIGINT ends the job at once",
}


def add_arguments(parser: Arguments) -> None:
    add = parser.add_flag
    add("--nnodes", default="1", metavar="N", help="number of nodes (1)")
    add("--nproc-per-node", default="1", metavar="N", help="ranks per node: a number, gpu, cpu or auto (1)")
    add("--spare-nodes", type=int, default=0, metavar="S", help=_SPARE_NODES)
    add("--node-rank", type=int, default=None, metavar="N", help="number of this node, from 0 on (0 of one node)")
    add("--master-addr", default=None, metavar="HOST", help="address of node 0 (127.0.0.1)")
    add("--master-port", type=int, default=None, metavar="PORT", help="a free port of node 0 (any, for one node)")
    add("--rdzv-backend", default="static", choices=("static", "c10d"), help="accepted for torchrun's sake")
    add("--rdzv-endpoint", default=None, metavar="HOST:PORT", help="the same as --master-addr and --master-port")
    add("--rdzv-id", default="none", metavar="ID", help="name of the job (none)")
    add("--standalone", action="store_true", help="one node, any free port: the default")
    add("--max-restarts", type=int, default=3, metavar="N", help="how often all workers may be started again (3)")
    add("--monitor-interval", type=float, default=None, help="accepted for torchrun's sake: agents need no interval")
    add("--role", default=None, help="accepted for torchrun's sake")
    add("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    add(
        "--log-dir",
        type=directory_of_records,
        default=None,
        metavar="DIR",
        help="records and output of the workers (flashrecovery-logs/TIME-PID)",
    )
    add("--spares-per-node", type=int, default=0, metavar="K", help="workers that wait, imports done, for a seat (0)")
    add("--no-preload", action="store_true", help="start every worker cold, without the imports done beforehand")
    add("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help=_SHUTDOWN)
    add("--inject", action="append", default=[], metavar="SPEC", help=help_of_spec())
    add(
        "--allow-injection",
        action="store_true",
        help="let `flashrecovery inject` lose ranks later on (--inject does, too)",
    )
    add("--overwrite", action="store_true", help="delete the records of an earlier run in --log-dir")
    for name, what in _DEADLINES.items():
        add(f"--{name}", type=float, default=None, metavar="SECONDS", help=what)
    add("--slow-factor", type=float, default=1.5, metavar="FACTOR", help=_SLOW)
    add("--no-diagnosis", action="store_true", help="do not look for who is to blame for slow ranks and losses")
    add("--topology", type=Path, default=None, metavar="FILE", help="describes the cluster for that (docs/diagnose.md)")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("script_args", metavar="ARGS", nargs=argparse.REMAINDER, help="flags of the script")


_SPARE_NODES = "nodes that wait, imports done, for the seats of a lost one: the same command, numbered from N on (0)"
_SHUTDOWN = "how long workers have to end by themselves after SIGTERM (30)"
_SLOW = "whoever computes so many times as long as its peers is said to be slow (1.5; 0: nobody)"
_DEADLINES = {
    "heartbeat-interval": "how often an agent tells the controller that its node lives (0.4)",
    "heartbeat-timeout": "after how long a silent node is lost (2)",
    "drain-timeout": "how long survivors have to stop, those that are busy with what usually takes longer aside (30)",
    "join-timeout": "how long a replacement has to get ready, and a node to come (300)",
    "execute-timeout": "how long the ranks have to execute a plan (60)",
    "hang-timeout": "after how long something hangs that was never timed, a first step for instance (600; 0: never)",
}


def execute(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    # Here and not above, like every import of torch: the other commands do without, and bad input is refused at once.
    from megatron_flashrecovery.runtime import log_dir

    config = launch_config(arguments, environment)
    if config.topology is not None:
        from megatron_flashrecovery.diagnose.description import read_description

        # Hours later, when somebody is slow, nobody is there to correct it.
        read_description(config.topology)
    check_script(config.script, config.module)
    if config.node_rank == 0:
        log_dir.claim(config.log_dir, arguments.overwrite)
    print(f"flashrecovery: starting {config.script}; loading torch takes some seconds", file=sys.stderr, flush=True)
    _warn_of_untested_torch()
    from megatron_flashrecovery.runtime import launch

    return launch.run(config)


def launch_config(arguments: argparse.Namespace, environment: Mapping[str, str]) -> LaunchConfig:
    from megatron_flashrecovery.runtime.injection import Injection
    from megatron_flashrecovery.runtime.launch_config import Deadlines, LaunchConfig

    nnodes = _nnodes(arguments.nnodes)
    address, port = _endpoint(arguments)
    if arguments.node_rank is None and nnodes > 1:
        raise ConfigError(f"--node-rank is missing: --nnodes {nnodes} needs a number from 0 on for each node")
    deadlines = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in _DEADLINES}
    return LaunchConfig(
        script=arguments.script,
        script_args=tuple(arguments.script_args),
        module=arguments.module,
        nnodes=nnodes,
        spare_nodes=arguments.spare_nodes,
        nproc_per_node=_nproc(arguments.nproc_per_node),
        node_rank=arguments.node_rank or 0,
        master_addr=address,
        master_port=port,
        rdzv_id=arguments.rdzv_id,
        max_restarts=arguments.max_restarts,
        spares_per_node=arguments.spares_per_node,
        log_dir=arguments.log_dir or _default_log_dir(),
        injections=tuple(Injection.parse(spec) for spec in arguments.inject),
        allow_injection=arguments.allow_injection,
        shutdown_timeout=arguments.shutdown_timeout,
        preload=not arguments.no_preload,
        hooks=HOOKS if "--enable-flash-recovery" in arguments.script_args else (),
        deadlines=Deadlines(**{name: value for name, value in deadlines.items() if value is not None}),
        slow_factor=arguments.slow_factor,
        diagnosis=not arguments.no_diagnosis,
        topology=arguments.topology,
        token=environment.get(TOKEN, ""),
    )


def check_script(script: str, module: bool) -> None:
    if module:
        try:
            found = importlib.util.find_spec(script) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(f"there is no module {script}: install it, or leave out -m for a file")
    elif not os.path.isfile(script):
        raise ConfigError(f"there is no script {script}: give the path of a file, or -m and the name of a module")


def _nnodes(text: str) -> int:
    """A number, or torchrun's range of one number."""
    least, _, most = text.partition(":")
    if most and most != least:
        raise ConfigError(f"--nnodes {text}: the number of ranks is fixed, give one number (and --spare-nodes)")
    return _number("--nnodes", least)


def _nproc(text: str) -> int:
    if text not in ("gpu", "cpu", "auto"):
        return _number("--nproc-per-node", text)
    import torch

    devices = torch.cuda.device_count()
    if text == "gpu" and not devices:
        raise ConfigError("--nproc-per-node gpu: this node has no GPU, give a number")
    return devices if devices and text != "cpu" else os.cpu_count() or 1


def _number(flag: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{flag} {text}: give a whole number")
    return int(text)


def _endpoint(arguments: argparse.Namespace) -> tuple[str, int]:
    address, port = arguments.master_addr, arguments.master_port
    if arguments.rdzv_endpoint:
        if address or port is not None:
            raise ConfigError("--rdzv-endpoint and --master-addr say the same: give one of them")
        address, _, text = arguments.rdzv_endpoint.rpartition(":")
        if not address:
            address, text = arguments.rdzv_endpoint, ""
        port = _number("--rdzv-endpoint", text) if text else None
    return (address or "127.0.0.1").strip("[]"), port or 0


def _default_log_dir() -> Path:
    return Path("flashrecovery-logs") / datetime.now(UTC).strftime(f"%Y%m%dT%H%M%S-{os.getpid()}")


def _warn_of_untested_torch() -> None:
    """Without importing it: that takes a second or more, in which the fork server could have begun to."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return  # built by hand, without metadata: the workers will say if there is none
    if not any(installed.startswith(f"{each}.") for each in TESTED_TORCH):
        tested = ", ".join(TESTED_TORCH)
        print(f"flashrecovery: torch {installed} is not among the versions tested ({tested})", file=sys.stderr)
