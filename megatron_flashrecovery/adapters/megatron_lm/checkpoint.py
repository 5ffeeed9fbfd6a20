"""Megatron-LM's own checkpoints, which a job falls back to when no copy is left. Upstream: ``checkpointing.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_flashrecovery.core.ids import Step

_MARKER = "latest_checkpointed_iteration.txt"


def newest_saved(directory: str) -> Step:
    """The iteration of the newest complete checkpoint, 0 if there is none. Its marker is written last."""
    try:
        text = (Path(directory) / _MARKER).read_text().strip()
    except OSError:
        return Step(0)
    return Step(int(text)) if text.isdigit() else Step(0)


def directory_of(save: str, step: Step) -> Path:
    """Where the checkpoint of that step is written."""
    return Path(save) / f"iter_{step:07d}"


def use_newest(args: Any) -> None:
    """After a fall-back: what this run has saved, with everything in it, whatever it was told to start from."""
    if args.save and newest_saved(args.save):
        args.load, args.ckpt_step = args.save, None
        args.finetune = args.no_load_optim = args.no_load_rng = False
