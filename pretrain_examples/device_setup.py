"""Decide what to train on. To be imported before megatron-core, which binds parts of ``torch.cuda`` by name."""

from __future__ import annotations

import logging
import os
import warnings

import torch

# Both ask NVML in the process that forks workers, for what has initialised CUDA must not be forked.
HAS_GPU = torch.cuda.is_available()
DEVICES = torch.cuda.device_count() if HAS_GPU else 0
BACKEND = "nccl" if HAS_GPU else "gloo"

os.environ.setdefault(
    "CUDA_DEVICE_MAX_CONNECTIONS", "1"
)  # tensor parallel ranks overlap only if kernels keep their order

# megatron-core hints at libraries that this example does without, once per rank.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)

if not HAS_GPU:
    from megatron_flashrecovery.testing import cpu_device

    cpu_device.install()
