"""Recover from lost ranks in the middle of a training step, and go on bit for bit."""

from __future__ import annotations

__version__ = "0.1.0"
