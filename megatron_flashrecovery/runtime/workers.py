"""The processes of one node: started from a fork server where that is safe, else from nothing, and watched until they
end.

A worker is born without a seat. It gets one as its first message, at once or, for a spare, when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_flashrecovery import start
from megatron_flashrecovery.comm.channel import Channel, ChannelClosed, channel_pair
from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, WorkerId
from megatron_flashrecovery.runtime.dialogue import Seat, dialogue_codec
from megatron_flashrecovery.runtime.fork_server import Ended, Fork, Forked, Preloaded, fork_codec
from megatron_flashrecovery.runtime.saying import say

_TAIL_NBYTES = 8192
CONFIG_EXIT = 2
"""Of a worker whose last line says what of the script or its flags cannot be."""
_SILENT_FOR = 2.0
_OURS = "flashrecovery: "
_SILENCE = "(nothing)"
_SERVER_LOG = "fork_server.log"
_SERVERS = 3
"""One whose death was nobody's bug is followed by another; what kills several in a row would kill the next one, too."""
# A process that was killed ends within moments, unless it is stuck in the kernel.
_REAPED_WITHIN = 5.0


@dataclass(eq=False)
class Worker:
    """A process of this node. ``pid`` is unknown until the fork server has said it."""

    number: int
    channel: Channel
    log: Path
    log_begins: int = 0
    """Bytes of it that others had written before: what a predecessor said is not the last word of this one."""
    pid: int | None = None
    seat: Seat | None = None
    process: subprocess.Popen[bytes] | None = None
    pending: list[object] = field(default_factory=list)
    is_known: bool = False
    """It has been said which process sits here."""
    doomed: bool = False
    """It was told to end: its end is no loss."""
    told: signal.Signals | None = None
    """What was passed on to it."""

    @property
    def rank(self) -> Rank | None:
        return None if self.seat is None else self.seat.rank

    @property
    def id(self) -> WorkerId:
        assert self.seat is not None
        return self.seat.worker


@dataclass(frozen=True)
class WorkerEnded:
    worker: Worker
    status: int
    """As from ``waitpid``."""
    server_ended: str = ""
    """How the fork server ended that it went with."""

    @property
    def cause(self) -> str:
        if self.server_ended:
            return f"ended together with the fork server of its node ({self.server_ended})"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            return f"killed by {signal.Signals(number).name}"
        code, words = os.WEXITSTATUS(self.status), self.last_words()
        if words.startswith(_OURS) and code != CONFIG_EXIT:
            words = _SILENCE  # what we have told in passing is not why it ended
        full = "" if has_room(self.worker.log) else f" (no space is left in {self.worker.log.parent}: make room there)"
        return f"exit code {code}{full}, its last words: {words}"

    def last_words(self) -> str:
        """The last line that the worker wrote, for a person; all of it is in its log."""
        try:
            with self.worker.log.open("rb") as log:
                log.seek(max(self.worker.log_begins, log.seek(0, os.SEEK_END) - _TAIL_NBYTES))
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            return "(its log cannot be read)"
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), _SILENCE)

    @property
    def exit_code(self) -> int:
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code


class Workers:
    """Starts and ends processes; ``poll`` says which have ended. One thread at a time."""

    def __init__(
        self, script: str, log_dir: Path, environment: Mapping[str, str], preload: bool, hooks: Sequence[str] = ()
    ) -> None:
        self._script = script
        self._hooks = tuple(hooks)
        self._log_dir = log_dir
        self._environment = dict(environment)
        self._count = 0
        self._living: dict[int, Worker] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._server_channel: Channel | None = None
        self._is_serving = False
        self._servers = 0
        self._is_closing = False
        self.cold_because = "preloading is off" if not preload else ""
        log_dir.mkdir(parents=True, exist_ok=True)
        if preload:
            self._start_server()

    @property
    def living(self) -> list[Worker]:
        return list(self._living.values())

    def seated(self) -> Iterator[tuple[Rank, Worker]]:
        for worker in self._living.values():
            if worker.rank is not None and not worker.doomed:
                yield worker.rank, worker

    def server_fileno(self) -> int | None:
        return None if self._server_channel is None else self._server_channel.fileno()

    def wait_for_server(self, timeout: float) -> float:
        """Seconds that preloading took. After this, ``cold_because`` says why workers start cold, if they do.

        Raises ``ConfigError`` if the script cannot even be imported.
        """
        if self._server_channel is None:
            return 0.0
        try:
            message, _ = self._server_channel.receive(timeout)
        except (ChannelClosed, TimeoutError) as error:
            self._stop_server()
            log = self._log_dir / _SERVER_LOG
            tail = log.read_text(errors="replace").strip().splitlines()[-1:] or [str(error)]
            raise ConfigError(f"the script {self._script} cannot be imported: {tail[0]} (all of it: {log})") from None
        assert isinstance(message, Preloaded), message
        if message.problem:
            self.cold_because = message.problem
            self._stop_server()
        self._is_serving = not message.problem
        return message.seconds

    def start(self, log_name: str) -> Worker:
        """A new process without a seat. Its output goes to ``log_name`` in the log folder, appended."""
        self._count += 1
        channel, theirs = channel_pair(dialogue_codec())
        log = self._log_dir / log_name
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        worker = Worker(self._count, channel, log, os.fstat(output).st_size)
        self._living[worker.number] = worker
        try:
            if not self._ask_server(worker, theirs, output):
                self._start_cold(worker, theirs, output)
        finally:
            os.close(output)
            theirs.close()
        return worker

    def kill(self, worker: Worker, number: int = signal.SIGKILL) -> None:
        """End it, and expect its end. A worker whose pid is not known yet is ended as soon as it is."""
        worker.doomed = True
        if worker.pid is not None and worker.number in self._living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)
            _end_group(worker.pid, number)

    def tell(self, worker: Worker, number: signal.Signals) -> None:
        """Signal it, and nothing that it has started. A worker that the fork server is about to make hears it, too."""
        worker.told = number
        if worker.pid is not None and worker.number in self._living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def poll(self) -> list[WorkerEnded]:
        """What has ended since the last call. Never waits."""
        ended = [] if self._server_channel is None else self._hear_server(self._server_channel)
        for worker in self.living:
            if worker.process is None:
                continue
            pid, status = os.waitpid(worker.process.pid, os.WNOHANG)
            if pid:
                worker.process.returncode = os.waitstatus_to_exitcode(status)
                ended.append(self._end(worker, status))
        return ended

    def close(self, grace: float) -> None:
        """End every process: politely, and after ``grace`` seconds for good."""
        self._is_closing = True
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, _REAPED_WITHIN)):
            for worker in self.living:
                self.kill(worker, number)
            began, is_said = time.monotonic(), False
            while self._living and (waited := time.monotonic() - began) < patience:
                if waited > _SILENT_FOR and not is_said:
                    is_said = True
                    say(f"waiting for {len(self._living)} workers to end by {number.name}, for {patience:g} s at most")
                for end in self.poll():
                    end.worker.channel.close()
                time.sleep(0.01)
        self._stop_server()
        for worker in self.living:  # the fork server took them along
            worker.channel.close()

    def _ask_server(self, worker: Worker, theirs: socket.socket, output: int) -> bool:
        if self._server_channel is None or not self._is_serving:
            return False
        try:
            self._server_channel.send(Fork(worker.number), (theirs.fileno(), output))
        except ChannelClosed:
            return False  # it has just ended, which ``poll`` is about to hear
        return True

    def _start_server(self) -> None:
        self._servers += 1
        ours, theirs = socket.socketpair()
        command = [
            *start.command("megatron_flashrecovery.runtime.fork_server"),
            str(theirs.fileno()),
            self._script,
            *self._hooks,
        ]
        with self._log(_SERVER_LOG) as log:
            self._server = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self._server_channel = Channel(ours, fork_codec())

    def _stop_server(self) -> None:
        if self._server is None or self._server_channel is None:
            return
        self._server_channel.close()
        self._server_channel, self._is_serving = None, False
        try:
            self._server.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _start_cold(self, worker: Worker, theirs: socket.socket, output: int) -> None:
        command = [*start.command("megatron_flashrecovery.runtime.cold_worker"), str(theirs.fileno())]
        command += [str(os.getpid()), *self._hooks]
        worker.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        worker.pid = worker.process.pid

    def _hear_server(self, channel: Channel) -> list[WorkerEnded]:
        ended: list[WorkerEnded] = []
        while True:
            try:
                message, _ = channel.receive(timeout=0.0)
            except TimeoutError:
                return ended
            except ChannelClosed:
                return ended + self._lose_server()
            match message:
                case Preloaded(problem=problem):
                    self._take_up_server(problem)
                    if problem:
                        return ended
                case Forked(ticket=ticket, pid=pid):
                    worker = self._living[ticket]
                    worker.pid = pid
                    if worker.doomed:
                        self.kill(worker)
                    elif worker.told is not None:
                        self.tell(worker, worker.told)
                case Ended(pid=pid, status=status):
                    ended += [self._end(worker, status) for worker in self.living if worker.pid == pid]
                case _:
                    raise AssertionError(f"the fork server said {message}")

    def _lose_server(self) -> list[WorkerEnded]:
        """Its children go with it, by the kernel's hand; nobody is left to reap them and say how."""
        was_serving = self._is_serving
        self._stop_server()
        assert self._server is not None
        how = _in_words(self._server.returncode)
        lost = [worker for worker in self.living if not worker.process]
        self.cold_because = f"the fork server is gone: {how}"
        again = was_serving and self._servers < _SERVERS and not self._is_closing
        until = "until another one has done the imports" if again else "from now on"
        say(
            f"the fork server (process {self._server.pid}) is gone: {how}; workers that ended with it: {len(lost)}; "
            f"replacements start cold {until} (its log: {self._log_dir / _SERVER_LOG})"
        )
        if again:
            self._start_server()
        return [self._end(worker, signal.SIGKILL, how) for worker in lost]

    def _take_up_server(self, problem: str) -> None:
        """Another one has done the imports."""
        self._is_serving, self.cold_because = not problem, problem
        if problem:
            self._stop_server()
        say(f"replacements start cold: {problem}" if problem else "another fork server is there for replacements")

    def _end(self, worker: Worker, status: int, server_ended: str = "") -> WorkerEnded:
        del self._living[worker.number]
        if worker.pid is not None:
            _end_group(worker.pid, signal.SIGKILL)  # data loaders and the like hold memory and devices
        return WorkerEnded(worker, status, server_ended)

    def _log(self, name: str) -> IO[bytes]:
        return (self._log_dir / name).open("ab")


def has_room(log: Path) -> bool:
    """Whether a print of a rank can still reach its log; where none is left it raises, and ends most scripts."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(log.parent)
        return disk.f_bavail > 0
    return True


def _end_group(pid: int, number: int) -> None:
    """What a worker has started ends with it; there may be nothing, or no group yet."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _in_words(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
