"""A file that describes a cluster, in either of the two formats. The launcher reads it, too, and has no numpy."""

from __future__ import annotations

from pathlib import Path

from megatron_flashrecovery.core.errors import ConfigError
from megatron_flashrecovery.diagnose.cluster import Cluster
from megatron_flashrecovery.diagnose.slurm import parse_topology
from megatron_flashrecovery.diagnose.topology_file import parse_topology_file


def read_description(file: Path) -> Cluster:
    """What ``--topology`` names. Raises ``ConfigError`` if it cannot be read, or is none."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--topology {file} cannot be read: {error}") from None
    # What SLURM itself reads is called so.
    is_slurm = file.suffix == ".conf"
    return parse_topology(text, str(file)) if is_slurm else parse_topology_file(text, str(file))
