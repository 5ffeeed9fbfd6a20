"""The agent's memory for snapshots: one memfd of two slots for what a worker keeps of its own rank, and one for what it
keeps of each guest. Workers come and go; what they have committed stays."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.core.ids import Rank, Step
from megatron_flashrecovery.state.headroom import available_bytes
from megatron_flashrecovery.state.memory import SLOTS, Memory, aligned
from megatron_flashrecovery.state.slot_pair import SlotPair

# What the vault leaves to everybody else on the node.
_RESERVE_NBYTES = 256 << 20
_PAGE = 4096


@dataclass(frozen=True)
class Holding:
    """Whose state (``rank``) is kept for which worker: its own (``host`` is ``None``), or the rank that hosts it."""

    rank: Rank
    host: Rank | None = None


class Vault:
    """One per agent, with one writer. ``available`` tells the bytes of host memory that can still be had."""

    def __init__(self, available: Callable[[], int] = available_bytes) -> None:
        self._available = available
        self._fd_of: dict[Holding, int] = {}

    def reserve(self, slot_nbytes_of: Mapping[Holding, int]) -> dict[Holding, int]:
        """Descriptors of memory for each holding, as it is kept already where it is large enough. All or none.

        The pages are allocated now, so that a full memory is an error here and no SIGBUS in a worker later. Raises
        ``ConfigError``: there is not enough, or a holding with committed snapshots would have to grow.
        """
        fd_nbytes_of = {holding: SLOTS * aligned(nbytes, _PAGE) for holding, nbytes in slot_nbytes_of.items()}
        missing = {h: n for h, n in fd_nbytes_of.items() if h not in self._fd_of or self._nbytes(h) < n}
        for holding in missing:
            if (steps := self._committed(holding)) != ():
                raise ConfigError(
                    f"the state of rank {holding.rank} has outgrown its memory, which holds steps {list(steps)}: "
                    f"restart the job with room for more values"
                )
            self.release(holding)
        self._check_room(sum(missing.values()))
        made: dict[Holding, int] = {}
        try:
            for holding, nbytes in missing.items():
                made[holding] = _memfd(holding, nbytes)
        except OSError as error:
            for fd in made.values():
                os.close(fd)
            raise ConfigError(f"no memory for snapshots ({sum(missing.values())} bytes): {error.strerror}") from None
        self._fd_of.update(made)
        return {holding: self._fd_of[holding] for holding in slot_nbytes_of}

    def fd(self, holding: Holding) -> int | None:
        """To hand to a worker; the vault goes on owning it."""
        return self._fd_of.get(holding)

    def committed(self, rank: Rank) -> tuple[Step, ...]:
        """Steps of the rank's own committed snapshots, ascending; not verified."""
        return self._committed(Holding(rank))

    def guests_of(self, host: Rank) -> dict[Rank, tuple[Step, ...]]:
        """The committed mirrors that this host keeps, per guest."""
        return {held.rank: self._committed(held) for held in self._fd_of if held.host == host}

    def nbytes(self) -> int:
        """Of everything that is held."""
        return sum(self._nbytes(holding) for holding in self._fd_of)

    def release(self, holding: Holding) -> None:
        """Give the memory back once the worker that maps it is gone, too."""
        with suppress(KeyError):
            os.close(self._fd_of.pop(holding))

    def forget(self, rank: Rank) -> None:
        """Whatever this rank kept, of its own and of its guests: it may be wrong."""
        for holding in [held for held in self._fd_of if held == Holding(rank) or held.host == rank]:
            self.release(holding)

    def close(self) -> None:
        for holding in list(self._fd_of):
            self.release(holding)

    def _check_room(self, wanted: int) -> None:
        available = self._available()
        if wanted and wanted + _RESERVE_NBYTES > available:
            raise ConfigError(
                f"snapshots need {_mib(wanted)} MiB of host memory on this node, and {_mib(_RESERVE_NBYTES)} MiB left "
                f"over, but {_mib(available)} MiB are available: use fewer ranks per node, or more memory"
            )

    def _nbytes(self, holding: Holding) -> int:
        return os.fstat(self._fd_of[holding]).st_size

    def _committed(self, holding: Holding) -> tuple[Step, ...]:
        if (fd := self._fd_of.get(holding)) is None:
            return ()
        memory = Memory(fd, populate=False)
        try:
            return SlotPair(holding.rank, memory.slots).steps()
        finally:
            memory.close()


def _memfd(holding: Holding, nbytes: int) -> int:
    owner = f"own-{holding.rank}" if holding.host is None else f"guest-{holding.rank}-of-{holding.host}"
    fd = os.memfd_create(f"flashrecovery-{owner}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        # No worker can shorten it under another one's feet.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
