"""The ``pretrain_gpt.py`` of the checkout that ``MEGATRON_LM`` names, unmodified, on a machine with or without GPUs."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import time
import typing
import warnings
from functools import partial
from multiprocessing import spawn
from pathlib import Path

import torch
import typing_extensions
from torch.utils import cpp_extension

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
if not torch.cuda.is_available():
    from megatron_flashrecovery.testing import cpu_device

    cpu_device.install()
    # Upstream trains only if it counts a device for each rank.
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

if not hasattr(typing, "override"):
    typing.override = typing_extensions.override  # upstream's newer versions are written for Python 3.12

if "TELL_MODULES" in os.environ:
    atexit.register(
        lambda: print("ours:", *sorted(name for name in sys.modules if name.startswith("megatron_flashrecovery")))
    )

if "LAZY_BOARD" in os.environ:
    # As in a bucket, or under TensorFlow: what is written is kept in memory until the writer is told to flush it.
    from tensorboard.compat.tensorflow_stub.io import gfile

    if hasattr(gfile.LocalFileSystem, "append"):
        del gfile.LocalFileSystem.append

if "HOLD_WRITERS" in os.environ:
    # Whoever writes a checkpoint in the background stands here until the file exists, and says when it is through.
    gate, fsync = Path(os.environ["HOLD_WRITERS"]), os.fsync

    def held(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".distcp"):
            with gate.with_name("writers").open("a") as told:
                print(f"begin {os.getpgid(0)} {path}", file=told, flush=True)
                while not gate.exists():
                    time.sleep(0.01)
                print(f"end {os.getpgid(0)} {path}", file=told, flush=True)
        fsync(descriptor)

    os.fsync = held

if "DIE_IN" in os.environ and __name__ == "__main__":
    # Once, on rank 5: where the function of that name calls the reduction.
    function, died = os.environ["DIE_IN"].split(",")
    all_reduce = torch.distributed.all_reduce

    def dying(collective: typing.Callable[..., object], *args: object, **named: object) -> object:
        if (
            sys._getframe(2).f_code.co_name == function
            and torch.distributed.get_rank() == 5
            and not Path(died).exists()
        ):
            Path(died).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return collective(*args, **named)

    torch.distributed.all_reduce = lambda *args, **named: dying(all_reduce, *args, **named)

prepare = spawn.get_preparation_data


def prepare_as_here(name: str) -> dict[str, object]:
    """A process that upstream spawns begins with this file, and not with the script that runs inside it: it needs what
    stands above, too."""
    return {**prepare(name), "init_main_from_path": __file__}


spawn.get_preparation_data = prepare_as_here

CHECKOUT = Path(os.environ["MEGATRON_LM"])
sys.path.insert(0, str(CHECKOUT))
SCRIPT = str(CHECKOUT / "pretrain_gpt.py")

if cpp_extension.CUDA_HOME is None and __name__ != "__mp_main__":
    from megatron.training import initialize

    if hasattr(initialize, "fused_kernels"):
        initialize.fused_kernels.load = lambda args: None  # it asks for a compiler for GPUs, and then compiles nothing

if not torch.cuda.is_available() and __name__ != "__mp_main__":
    import cpu_layers  # beside this file
    from megatron.core.transformer.moe import moe_utils
    from megatron.training import initialize, training

    # How much it draws depends on the layout; and here the model is initialised from the generator of the "device".
    initialize._warmup_jit_function = lambda **_options: None
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # upstream asks for the name, also where there is no Transformer Engine
    cpu_layers.install()
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)

if __name__ == "__main__":
    runpy.run_path(SCRIPT, run_name="__main__")
elif __name__ != "__mp_main__":
    # The fork server imports this file once for all workers.
    runpy.run_path(SCRIPT, run_name=__name__)
