"""What a run leaves for other programs: ``steps.jsonl`` while it goes on, ``summary.json`` when it is over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec

from megatron_flashrecovery.core.errors import RecordDamaged
from megatron_flashrecovery.core.ids import Epoch, NodeId, Rank, Step
from megatron_flashrecovery.core.messages import Blamed
from megatron_flashrecovery.core.numbers import BadStep
from megatron_flashrecovery.runtime.journal import append_whole

SUMMARY_NAME = "summary.json"
STEPS_NAME = "steps.jsonl"


@dataclass(frozen=True)
class StepLine:
    """One completed step. The hex forms are exact; the loss is there for people."""

    step: Step
    loss: float | None
    loss_hex: str | None
    grad_norm_hex: str | None
    epoch: Epoch
    seconds: float

    @classmethod
    def of(cls, step: Step, loss: float | None, grad_norm: float | None, epoch: Epoch, seconds: float) -> StepLine:
        return cls(step, _finite(loss), _hex(loss), _hex(grad_norm), epoch, seconds)

    def same_result(self, other: StepLine) -> bool:
        return (self.loss_hex, self.grad_norm_hex) == (other.loss_hex, other.grad_norm_hex)


@dataclass(frozen=True)
class PhaseSeconds:
    """Each phase from the end of the one before; ``total`` from the loss to the end of the first step after it."""

    detect: float
    park: float
    replace: float
    rebuild: float
    restore: float
    first_step: float
    total: float


@dataclass(frozen=True)
class GroupTally:
    """How many groups of the job got a new communicator, and how many kept theirs."""

    rebuilt: int
    kept: int


@dataclass(frozen=True)
class RecoveryRecord:
    """``source`` says in words from where each rank that needed it got its state."""

    epoch: Epoch
    cause: str
    lost_ranks: tuple[Rank, ...]
    resume_step: Step
    steps_recomputed: int
    seconds: PhaseSeconds
    groups: GroupTally
    source: Mapping[Rank, str]


@dataclass(frozen=True)
class EpochRecord:
    """Why an epoch began, in the words of the console, also of one that the job never went on from. ``began``: Unix
    time. ``is_restart``: all workers were started again."""

    epoch: Epoch
    began: float
    cause: str
    is_restart: bool


@dataclass(frozen=True)
class MoveRecord:
    """Seats that went to a spare node in this epoch; from then on ``origin`` has no part in the job."""

    epoch: Epoch
    ranks: tuple[Rank, ...]
    origin: NodeId
    target: NodeId


@dataclass(frozen=True)
class Summary:
    """``state_sha256`` is empty for a run that did not reach its last step. ``blamed``: whoever diagnoses named.

    ``reason`` says why the job stopped, in the words of the console. ``unknown``: an older version wrote it, or a
    script without recovery.
    """

    world_size: int
    steps: int
    state_sha256: Mapping[Rank, str]
    recoveries: tuple[RecoveryRecord, ...] = ()
    bad_numbers: tuple[BadStep, ...] = ()
    blamed: tuple[Blamed, ...] = ()
    outcome: Literal["finished", "stopped", "unknown"] = "unknown"
    reason: str = ""
    epochs: tuple[EpochRecord, ...] = ()
    moves: tuple[MoveRecord, ...] = ()


class StepLog:
    """Writes ``steps.jsonl``: a step once, however often it was computed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line_of: dict[Step, StepLine] = {}
        self._file = path.open("ab", buffering=0)

    def compare(self, line: StepLine) -> str | None:
        """What is wrong, in words, if a step that is computed again comes out differently."""
        before = self._line_of.get(line.step)
        if before is None or before.same_result(line):
            return None
        return f"step {line.step} came out differently: {_result(line)}, and before {_result(before)}"

    def record(self, line: StepLine) -> None:
        """The newer result takes the place of an older one that differs: it is what the run goes on from."""
        before = self._line_of.get(line.step)
        if before is not None and before.same_result(line):
            return
        self._line_of[line.step] = line
        if before is None:
            append_whole(self._file.fileno(), _encode(line) + b"\n")
        else:
            self._rewrite()

    @property
    def steps(self) -> int:
        return len(self._line_of)

    def close(self) -> None:
        self._file.close()

    def _rewrite(self) -> None:
        replace_file(self._path, b"".join(_encode(line) + b"\n" for _, line in sorted(self._line_of.items())))
        self._file.close()
        self._file = self._path.open("ab", buffering=0)


def write_summary(directory: Path, summary: Summary) -> None:
    replace_file(directory / SUMMARY_NAME, msgspec.json.format(_encode(summary), indent=2) + b"\n")


def read_summary(directory: Path) -> Summary:
    """Raises ``RecordDamaged``."""
    path = directory / SUMMARY_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except FileNotFoundError:
        raise RecordDamaged(f"{path} does not exist: no finished run left its records there") from None
    except msgspec.DecodeError as error:
        raise RecordDamaged(f"{path} is not a summary: {error}") from error


def read_steps(directory: Path) -> tuple[StepLine, ...]:
    """In order. A torn last line is left out. Raises ``RecordDamaged``."""
    path = directory / STEPS_NAME
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        return tuple(msgspec.json.decode(line, type=StepLine) for line in lines)
    except FileNotFoundError:
        raise RecordDamaged(f"{path} does not exist: no run left its records there") from None
    except msgspec.DecodeError as error:
        raise RecordDamaged(f"{path} is not a list of steps: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """All of it or nothing: whoever reads ``path`` sees the old content or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _encode(value: StepLine | Summary) -> bytes:
    return msgspec.json.encode(asdict(value))


def _result(line: StepLine) -> str:
    return f"loss {line.loss_hex} grad norm {line.grad_norm_hex} in epoch {line.epoch}"


def _hex(value: float | None) -> str | None:
    return None if value is None else float(value).hex()


def _finite(value: float | None) -> float | None:
    # JSON has no NaN; ``loss_hex`` says which of None, nan and inf it was.
    return None if value is None or value != value or abs(value) == float("inf") else float(value)
