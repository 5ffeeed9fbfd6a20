"""Requests of users to a run that goes on: only the owner can make one, and each is answered once."""

import os
import threading

import pytest

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime.spool import NAME, Spool, submit


@pytest.fixture
def spool(tmp_path):
    spool = Spool(tmp_path)
    yield spool
    spool.close()


def answered(spool, refusal):
    """A controller that looks until there is a request, and answers it."""
    seen = []

    def look():
        while not seen:
            seen.extend(spool.requests())
        spool.answer(seen[0].name, refusal, "done")

    thread = threading.Thread(target=look)
    thread.start()
    return seen, thread


def test_a_request_is_answered(spool, tmp_path):
    seen, thread = answered(spool, "")
    assert submit(tmp_path, "kill:rank=3", 10.0) == "done"
    thread.join()
    assert seen[0].spec == "kill:rank=3"
    assert list((tmp_path / NAME).iterdir()) == [], "nothing is left of it"


def test_a_refusal_is_an_error_of_the_user(spool, tmp_path):
    _, thread = answered(spool, "there is no rank 9")
    with pytest.raises(ConfigError, match="there is no rank 9"):
        submit(tmp_path, "kill:rank=9", 10.0)
    thread.join()


def test_a_run_that_takes_no_faults_says_what_to_type(tmp_path):
    with pytest.raises(ConfigError, match="flashrecovery run --allow-injection"):
        submit(tmp_path, "kill:rank=3", 1.0)


def test_a_request_that_nobody_answers_is_taken_back(spool, tmp_path):
    with pytest.raises(ConfigError, match="nobody has answered within 0 s"):
        submit(tmp_path, "kill:rank=3", 0.0)
    assert list(spool.requests()) == []


def test_nobody_else_can_write_there(tmp_path):
    before = os.umask(0)
    try:
        spool = Spool(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o700
    spool.close()
    assert not (tmp_path / NAME).exists()


def test_a_directory_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / NAME).symlink_to("elsewhere", target_is_directory=True)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        Spool(tmp_path)


def test_what_is_no_small_file_of_the_owners_is_left_alone(spool, tmp_path):
    (tmp_path / "secret").write_text("kill:rank=0")
    (tmp_path / NAME / "a.request").symlink_to(tmp_path / "secret")
    (tmp_path / NAME / "b.request").write_text("x" * 5000)
    os.mkfifo(tmp_path / NAME / "c.request")
    if os.geteuid() == 0:
        foreign = tmp_path / NAME / "d.request"
        foreign.write_text("kill:rank=0")
        os.chown(foreign, 12345, 12345)
    assert list(spool.requests()) == []


def test_requests_of_a_run_that_was_killed_are_forgotten(tmp_path):
    (tmp_path / NAME).mkdir(mode=0o700)
    (tmp_path / NAME / "old.request").write_text("kill:rank=0")
    spool = Spool(tmp_path)
    assert list(spool.requests()) == []
    spool.close()
