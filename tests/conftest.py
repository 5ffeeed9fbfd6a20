"""What tests need, by where they are: a GPU, or a machine that has nothing else to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
START_JOBS = (
    "processes",
    "frameworks/test_extra_state.py",
    "frameworks/test_megatron_adapter.py",
    "frameworks/test_megatron_lm.py",
    "frameworks/test_pretrain_gpt.py",
    "project/test_launch.py",
)
"""They run one after the other: the ranks of one job keep all cores busy. All other tests may run at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(_HERE / where) for where in START_JOBS):
            item.add_marker(pytest.mark.jobs)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
