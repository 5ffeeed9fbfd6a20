"""The directory in which a run leaves its records; never one that already has those of another run."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.runtime import journal, summary

LOGS = "logs"
_RECORDS = (journal.FILE_NAME, summary.STEPS_NAME, summary.SUMMARY_NAME)


def claim(directory: Path, overwrite: bool) -> None:
    """Make the directory; with ``overwrite`` records and logs of an earlier run are deleted, and nothing else is."""
    found = [directory / name for name in _RECORDS if os.path.exists(directory / name)]
    if found and not overwrite:
        raise ConfigError(f"{found[0]} exists: --log-dir has the records of a run, name another one or add --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Logs are appended to, so those of another run would look like this one's.
        for path in [*found, *(directory / LOGS).glob("*.log")] if overwrite else ():
            path.unlink()
        # Created here and now: of two runs that come at the same time, one is refused.
        (directory / journal.FILE_NAME).touch(exist_ok=False)
    except FileExistsError:
        raise ConfigError(f"--log-dir {directory} was taken by another run just now: name another one") from None
    except OSError as error:
        raise ConfigError(f"--log-dir {directory} cannot be written: {error.strerror}") from error
