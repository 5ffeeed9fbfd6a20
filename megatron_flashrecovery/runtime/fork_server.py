"""A process that has done the imports of the training script and forks workers that need not do them again.

It runs the script once under a name that is not ``__main__``, as multiprocessing's fork server does, so whatever
stands outside ``if __name__ == "__main__"`` is done in advance. It must stay single-threaded, without an RPC library
and without having initialised CUDA, or a fork of it may hang or crash much later: it checks that, and refuses to serve
when it does not hold.

Started by the agent (``start.command``) with FD SCRIPT HOOK...; FD is its end of a socket pair, and each HOOK
(``module:function``) is called before the script is loaded.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import gc
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_flashrecovery.comm.channel import Channel, ChannelClosed
from megatron_flashrecovery.comm.codec import Codec
from megatron_flashrecovery.runtime.dialogue import dialogue_codec
from megatron_flashrecovery.runtime.seat import take_seat

PRELOAD_NAME = "__flashrecovery_preload__"
_PR_SET_PDEATHSIG = 1
_exit_code: int | None = None
"""Of a worker whose script has ended."""


@dataclass(frozen=True)
class Preloaded:
    """Sent once. ``problem`` is empty if it is safe to fork this process."""

    seconds: float
    problem: str


@dataclass(frozen=True)
class Fork:
    """Comes with two descriptors: the worker's end of its channel, and the file for its standard output and error."""

    ticket: int


@dataclass(frozen=True)
class Forked:
    ticket: int
    pid: int


@dataclass(frozen=True)
class Ended:
    """A child is gone; ``status`` is what ``waitpid`` said."""

    pid: int
    status: int


def fork_codec() -> Codec:
    return Codec((Preloaded, Fork, Forked, Ended))


def main() -> None:
    die_with_parent()
    leave_without_teardown()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), fork_codec())
    # Else torch.cuda.is_available initialises CUDA, and no fork of this process can use a device (its docstring).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    began = time.monotonic()
    script, hooks = sys.argv[2], sys.argv[3:]
    prepare = call_hooks(hooks)
    problem = preload(script)
    if not problem:
        prepare()
        problem = unsafe_to_fork()
    gc.collect()
    gc.freeze()  # the children share what exists now: a collection in them must not copy every page of it
    channel.send(Preloaded(time.monotonic() - began, problem))
    if not problem and (inherited := _serve(channel)):
        _become_worker(*inherited)


def call_hooks(hooks: Sequence[str]) -> Callable[[], None]:
    """Returns what a fork server calls behind the script's imports: what every worker would otherwise find out anew."""
    preparations = [pkgutil.resolve_name(hook)() for hook in hooks]

    def prepare() -> None:
        for each in preparations:
            try:
                if each is not None:
                    each()
            except Exception:
                traceback.print_exc()  # it would only have saved time: every worker does the same, in its own seat

    return prepare


def preload(script: str) -> str:
    """Import what the script imports. Returns why that cannot be done, or nothing."""
    path = Path(script)
    if not has_main_guard(path.read_text()):
        return f'{path.name} has no `if __name__ == "__main__"`: it cannot be imported without running it'
    sys.path.insert(0, str(path.resolve().parent))
    sys.argv = [script]
    runpy.run_path(script, run_name=PRELOAD_NAME)
    return ""


def has_main_guard(source: str) -> bool:
    """Whether a top-level ``if`` of the source tests ``__name__``."""
    return any(
        isinstance(node, ast.If)
        and any(isinstance(name, ast.Name) and name.id == "__name__" for name in ast.walk(node.test))
        for node in ast.parse(source).body
    )


def unsafe_to_fork() -> str:
    """Why this process must not be forked, or nothing."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"importing the script started {threads - 1} threads, and a fork would lose them"
    if "grpc" in sys.modules:
        return "importing the script loaded grpc, which does not survive a fork"
    if sys.modules.get("torch") is not None and not _a_fork_can_use_cuda():
        return "importing the script initialised CUDA, which does not survive a fork"
    return ""


def _a_fork_can_use_cuda() -> bool:
    """Asked of a fork: neither torch nor the driver tells the process itself."""
    pid = os.fork()
    if pid == 0:
        try:
            usable = not sys.modules["torch"].cuda._is_in_bad_fork()
            with contextlib.suppress(OSError):
                # The driver refuses a process whose parent has used it, through torch or not, with this number
                # (CUDA_ERROR_NOT_INITIALIZED). Where there is no driver nobody has.
                usable = usable and ctypes.CDLL("libcuda.so.1").cuInit(0) != 3
            os._exit(not usable)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_FOR_OTHERS = frozenset({signal.SIGTERM, signal.SIGINT})
"""A terminal and a scheduler send these to all processes of a job, and workers may make use of them (a checkpoint):
their server must not end before they do. It goes when its agent closes the channel."""


def _serve(channel: Channel) -> tuple[int, int] | None:
    """Fork on request until the agent is gone. In a forked child, returns what it inherits: socket and output file."""
    wake, notify = os.pipe()
    os.set_blocking(notify, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_OTHERS)
    workers: set[int] = set()
    while True:
        ready, _, _ = select.select([channel.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _reap(channel, workers)
        if channel.fileno() in ready:
            try:
                channel.fill()
            except ChannelClosed:
                return None  # the agent is gone; the kernel ends the workers together with this process
            while (request := channel.next_message()) is not None:
                message, (worker_socket, output) = request
                assert isinstance(message, Fork), message
                pid = _fork(channel, message.ticket)
                workers.add(pid)
                if pid == 0:
                    channel.close()
                    os.close(wake)
                    os.close(notify)
                    return worker_socket, output
                os.close(worker_socket)
                os.close(output)


def _fork(channel: Channel, ticket: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        channel.send(Forked(ticket, pid))
    return pid


def _become_worker(worker_socket: int, output: int) -> None:
    die_with_parent()
    os.setpgid(0, 0)  # so that its own children can be ended with it
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_OTHERS)  # what has come since the fork comes now
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    _reseed()
    run_worker(worker_socket)


def run_worker(worker_socket: int) -> None:
    """Be a worker from here on: everything below is the training script, and this process ends as the script ends."""
    global _exit_code
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        take_seat(Channel(socket.socket(fileno=worker_socket), dialogue_codec()))
    except SystemExit as end:
        _exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        _exit_code = 1
        raise
    _exit_code = 0


def leave_without_teardown() -> None:
    """A worker ends when its threads and the exit handlers of its script have: to free what it holds, object by object,
    would copy every page that it shares with the fork server, and takes eight workers on two cores some seconds.

    Call it before anybody registers an exit handler: the first one to be registered is the last one to run.
    """
    atexit.register(_leave)


def _leave() -> None:
    if _exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code & 0xFF)


def _reap(channel: Channel, workers: set[int]) -> None:
    """Children that the script's imports have started end too, and are nobody's loss."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in workers:
            workers.remove(pid)
            channel.send(Ended(pid, status))


def _reseed() -> None:
    """A forked worker must not share the arbitrary seed that a fresh process would have drawn for itself."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def die_with_parent() -> None:
    """The kernel ends this process when the thread that started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    # Under ``-m`` this module is ``__main__``; the one that others import must be the one that runs.
    from megatron_flashrecovery.runtime import fork_server

    fork_server.main()
