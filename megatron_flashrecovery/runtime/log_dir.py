"""The directory in which a run leaves its records; never one that already has those of another run."""

from __future__ import annotations

from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime import journal, summary

_RECORDS = (journal.FILE_NAME, summary.STEPS_NAME, summary.SUMMARY_NAME)


def claim(directory: Path, overwrite: bool) -> None:
    """Make the directory; with ``overwrite`` the records of an earlier run in it are deleted, and nothing else is."""
    found = [directory / name for name in _RECORDS if (directory / name).exists()]
    if found and not overwrite:
        raise ConfigError(f"{found[0]} exists: --log-dir has the records of a run, name another one or add --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--log-dir {directory} cannot be written: {error.strerror}") from error
