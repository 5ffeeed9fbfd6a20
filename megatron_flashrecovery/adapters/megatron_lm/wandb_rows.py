"""Rows of Weights & Biases: in one run, whoever logs them, and in its file before they count as reported.

Upstream calls ``wandb.init`` on the logging rank. What that is given goes to a service process, which keeps the row of
a step open until a later step begins, writes to its file every 15 seconds, and ends with the rank, writing no more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import struct
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_flashrecovery.core.ids import Step

if TYPE_CHECKING:  # it imports upstream's modules, which must not happen before the script does it
    from megatron_flashrecovery.adapters.megatron_lm.session_seam import LoopSession

NOTED = "wandb:"
"""Begins the name under which a report is noted as being in W&B: later than it is on the board."""
_FLUSH = ("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.01")
_PATIENCE = 1.0
_HEADER, _BLOCK, _FRAME = 7, 32768, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def use_one_run(token: str, environment: MutableMapping[str, str]) -> None:
    """Before ``wandb.init``: every process of this job that logs goes on with the same run.

    What the user has set stays. The job's token is the same for all its processes, also after a restart of all workers,
    and for no other job.
    """
    environment.setdefault("WANDB_RUN_ID", hashlib.sha256(b"run of " + token.encode()).hexdigest()[:16])
    environment.setdefault("WANDB_RESUME", "allow")
    environment.setdefault(*_FLUSH)


class WandbRows:
    """``writer`` gives upstream's writer, which is the module ``wandb`` on the rank that logs, or nothing."""

    def __init__(self, session: LoopSession, writer: Callable[[], Any]) -> None:
        self._session = session
        self._writer = writer
        self._open: set[int] = set()
        self._reports: list[tuple[str, Step]] = []
        self._file: RunFile | None = None
        self._is_blind = False

    def watch(self) -> None:
        """Before a report: from now on we know of which steps there are rows."""
        writer = self._writer()
        if writer is None or getattr(writer.log, "is_watched", False):
            return
        log = writer.log

        @functools.wraps(log)
        def watched(data: Any, step: int | None = None, *rest: Any, **named: Any) -> Any:
            if step is not None:
                self._open.add(int(step))
            return log(data, step, *rest, **named)

        watched.is_watched = True  # type: ignore[attr-defined]
        writer.log = watched

    def reported(self, key: str, step: Step) -> None:
        """It is noted when its row is in the file."""
        if self._writer() is not None:
            self._reports.append((key, step))

    def settle(self) -> None:
        """Nothing is logged any more for the steps that are complete."""
        if not self._reports:
            return
        writer, newest = self._writer(), max(self._open, default=None)
        if newest is not None and writer.run is not None:  # else it is finished, which writes everything
            self._commit(writer, newest)
        self._open.clear()
        for key, step in self._reports:
            self._session.note_reported(NOTED + key, step)
        self._reports.clear()

    def _commit(self, writer: Any, step: int) -> None:
        path = Path(writer.run.settings.sync_file)
        writer.log({}, step=step, commit=True)
        if self._is_blind or not path.exists():
            return
        if self._file is None or self._file.path != path:
            self._file = RunFile(path)
        deadline = time.monotonic() + _PATIENCE
        while self._file.newest_row() < step:
            if time.monotonic() > deadline:
                self._is_blind = True
                lost = "if this rank is lost, its newest lines may be, too"
                print(f"flashrecovery: W&B has not written step {step} within {_PATIENCE} s: {lost}", flush=True)
                return
            time.sleep(0.001)


class RunFile:
    """A ``.wandb`` file that is still being written: records in frames of a LevelDB log, after a header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = _HEADER
        self._newest = -1
        self._messages = importlib.import_module("wandb.proto.wandb_internal_pb2")

    def newest_row(self) -> int:
        """The step of the newest row so far, -1 if there is none."""
        for row in self.rows():
            self._newest = max(self._newest, row.step.num)
        return self._newest

    def rows(self) -> Iterator[Any]:
        """Those that have been written since the last time, as W&B's ``HistoryRecord``."""
        for raw in self._records():
            record = self._messages.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "history":
                yield record.history

    def _records(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            begin = self._at - self._at % _BLOCK
            file.seek(begin)
            data = file.read()
        at, parts = self._at - begin, b""
        while True:
            if _BLOCK - at % _BLOCK < _FRAME.size:
                at += _BLOCK - at % _BLOCK  # no frame begins in the rest of a block
            if at + _FRAME.size > len(data):
                return
            _checksum, nbytes, kind = _FRAME.unpack_from(data, at)
            at += _FRAME.size + nbytes
            if at > len(data):
                return
            parts += data[at - nbytes : at]
            if kind in (_FULL, _LAST):
                self._at = begin + at
                yield parts
                parts = b""
