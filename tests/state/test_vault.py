from __future__ import annotations

import os
import signal

import pytest
import torch

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.state.headroom import available_bytes
from megatron_flashrecovery.state.memory import Memory
from megatron_flashrecovery.state.pieces import TensorPiece
from megatron_flashrecovery.state.snapshot import Snapshots
from megatron_flashrecovery.state.vault import Holding, Vault

GIB = 1 << 30
OWN, GUEST = Holding(0), Holding(1, host=0)


@pytest.fixture
def vault():
    vault = Vault(lambda: 4 * GIB)
    yield vault
    vault.close()


def commit(fd: int, rank: int, step: int) -> None:
    memory = Memory(fd)
    own = Snapshots(rank, memory.slots)
    own.capture(step, 0, [TensorPiece("a", torch.ones(10), True)], {})
    own.seal(step)
    own.close()
    memory.close()


def test_a_holding_is_two_whole_slots_of_allocated_memory(vault):
    fd = vault.reserve({OWN: 10_000})[OWN]
    stat = os.fstat(fd)
    assert (stat.st_size, stat.st_blocks * 512) == (2 * 12_288, 2 * 12_288)
    assert vault.nbytes() == 2 * 12_288


def test_what_a_killed_worker_committed_stays(vault):
    fd = vault.reserve({OWN: 1 << 16})[OWN]
    pid = os.fork()
    if pid == 0:
        commit(fd, 0, 7)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert vault.committed(0) == (7,)
    assert vault.reserve({OWN: 1 << 16}) == {OWN: fd}


def test_own_and_guest_memory_of_one_rank_are_apart(vault):
    fds = vault.reserve({OWN: 1 << 16, GUEST: 1 << 16, Holding(1): 1 << 16})
    commit(fds[GUEST], 1, 3)
    assert (vault.committed(1), vault.guests_of(0), vault.guests_of(1)) == ((), {1: (3,)}, {})


def test_a_rank_without_memory_has_committed_nothing(vault):
    assert (vault.committed(9), vault.fd(Holding(9))) == ((), None)


def test_too_little_memory_is_an_error_at_the_start_that_says_how_much():
    vault = Vault(lambda: 300 << 20)
    with pytest.raises(ConfigError, match=r"need 128 MiB .* 300 MiB are available"):
        vault.reserve({OWN: 64 << 20})
    assert vault.nbytes() == 0


def test_a_kernel_that_refuses_the_pages_leaves_nothing_reserved(vault, monkeypatch):
    def refuse(fd, offset, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        vault.reserve({OWN: 4096, GUEST: 4096})
    assert vault.nbytes() == 0


def test_memory_may_grow_while_nothing_is_committed_in_it(vault):
    vault.reserve({OWN: 1 << 16})
    fd = vault.reserve({OWN: 1 << 17})[OWN]
    assert os.fstat(fd).st_size == 2 << 17
    commit(fd, 0, 1)
    with pytest.raises(ConfigError, match=r"rank 0 has outgrown its memory, which holds steps \[1\]"):
        vault.reserve({OWN: 1 << 18})
    assert vault.committed(0) == (1,)


def test_nobody_can_shorten_the_memory(vault):
    fd = vault.reserve({OWN: 1 << 16})[OWN]
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)


def test_released_memory_is_given_back(vault):
    vault.reserve({OWN: 1 << 16})
    for _ in range(2):
        vault.release(OWN)
    assert vault.fd(OWN) is None


def test_memory_with_views_is_not_unmapped(vault):
    memory = Memory(vault.reserve({OWN: 1 << 16})[OWN])
    own = Snapshots(0, memory.slots)
    with pytest.raises(BufferError):
        memory.close()
    own.close()
    del own


MEMINFO = "MemTotal: 999 kB\nMemAvailable: 4096 kB\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "kib"),
    [
        pytest.param("", {}, 4096, id="no-group"),
        pytest.param("0::/\n", {"memory.max": "max", "memory.current": "0"}, 4096, id="v2-unlimited"),
        pytest.param("0::/\n", {"memory.max": "2097152", "memory.current": "1048576"}, 1024, id="v2-limited"),
        pytest.param(
            "0::/a/b\n",
            {
                "a/memory.max": "1048576",
                "a/memory.current": "0",
                "a/b/memory.max": "9999999",
                "a/b/memory.current": "0",
            },
            1024,
            id="v2-limited-above",
        ),
        pytest.param(
            "0::/\n",
            {"memory.max": "2097152", "memory.current": "2097152", "memory.stat": "anon 1\ninactive_file 524288\n"},
            512,
            id="v2-page-cache-makes-room",
        ),
        pytest.param("0::/\n", {"memory.max": "1000", "memory.current": "5000"}, 0, id="v2-over-its-limit"),
        pytest.param(
            "4:memory:/job\n1:cpu:/\n0::/\n",
            {"memory/job/memory.limit_in_bytes": "2097152", "memory/job/memory.usage_in_bytes": "0"},
            2048,
            id="v1",
        ),
        pytest.param(
            "4:memory:/of/the/host\n",
            {"memory/memory.limit_in_bytes": "1048576", "memory/memory.usage_in_bytes": "0"},
            1024,
            id="v1-in-a-container",
        ),
    ],
)
def test_available_memory_is_the_least_of_all_limits(tmp_path, cgroup, files, kib):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert available_bytes(proc, root) == kib * 1024


def test_this_machine_has_memory():
    assert available_bytes() > 0


def test_nothing_is_kept_of_what_a_rank_kept_whose_memory_may_have_been_wrong(vault):
    """Its mirror at its own host is not its own to keep."""
    theirs = Holding(0, host=1)
    for holding, fd in vault.reserve({OWN: 10_000, GUEST: 10_000, theirs: 10_000}).items():
        commit(fd, holding.rank, 5)
    vault.forget(0)
    assert (vault.committed(0), vault.guests_of(0), vault.guests_of(1)) == ((), {}, {0: (5,)})
