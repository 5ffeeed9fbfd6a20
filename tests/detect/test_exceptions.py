"""Which fault is behind an exception, by what torch raises for it."""

import pytest
import torch
import torch.distributed as dist

from megatron_flashrecovery.comm.communicator import Severed
from megatron_flashrecovery.core.errors import LinkLost
from megatron_flashrecovery.core.policy import Fault
from megatron_flashrecovery.detect.exceptions import fault_of, leaves_device_unusable
from megatron_flashrecovery.testing.cpu_device import device_error

ASSERT = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        pytest.param(ValueError("the batch is empty"), Fault.EXCEPTION, id="script"),
        pytest.param(RuntimeError("shapes do not match"), Fault.EXCEPTION, id="operator"),
        pytest.param(device_error(700), Fault.DEVICE_ERROR, id="illegal-access"),
        pytest.param(device_error(719, "unspecified launch failure"), Fault.DEVICE_ERROR, id="launch-failure"),
        pytest.param(device_error(220, "uncorrectable NVLink error"), Fault.DEVICE_ERROR, id="nvlink"),
        pytest.param(device_error(214, "uncorrectable ECC error encountered"), Fault.DEVICE_POISONED, id="ecc"),
        pytest.param(device_error(710, "device-side assert triggered"), Fault.EXCEPTION, id="assert"),
        pytest.param(device_error(2, "out of memory"), Fault.DEVICE_MEMORY, id="memory-of-a-runtime-call"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), Fault.DEVICE_MEMORY, id="memory"),
        pytest.param(torch.AcceleratorError("uncorrectable ECC error"), Fault.DEVICE_POISONED, id="ecc-without-a-code"),
        pytest.param(torch.AcceleratorError(ASSERT), Fault.EXCEPTION, id="assert-without-a-code"),
        # torch before 2.9
        pytest.param(RuntimeError("CUDA error: an illegal memory access was"), Fault.DEVICE_ERROR, id="old-torch"),
        pytest.param(RuntimeError("CUDA error: uncorrectable ECC error"), Fault.DEVICE_POISONED, id="old-torch-ecc"),
        pytest.param(RuntimeError(ASSERT), Fault.EXCEPTION, id="old-torch-assert"),
        pytest.param(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), Fault.DEVICE_MEMORY, id="cublas-memory"),
        pytest.param(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Fault.DEVICE_ERROR, id="cudnn"),
        pytest.param(MemoryError(), Fault.OUT_OF_MEMORY, id="host-memory"),
        pytest.param(dist.DistBackendError("NCCL error"), Fault.PROCESS_ENDED, id="nccl"),
        pytest.param(Severed("rank 3 was lost"), Fault.PROCESS_ENDED, id="severed"),
        pytest.param(LinkLost("the host is gone"), Fault.PROCESS_ENDED, id="mirror"),
        pytest.param(FileNotFoundError("data.bin"), Fault.PROCESS_ENDED, id="file-system"),
    ],
)
def test_the_fault_behind_an_exception(error, fault):
    assert fault_of(error) is fault


@pytest.mark.parametrize(
    ("error", "is_unusable"),
    [
        pytest.param(device_error(700), True, id="illegal-access"),
        pytest.param(device_error(214, "uncorrectable ECC error"), True, id="ecc"),
        pytest.param(device_error(710, "device-side assert triggered"), True, id="assert"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), False, id="memory"),
        pytest.param(ValueError("the batch is empty"), False, id="script"),
    ],
)
def test_after_which_nothing_may_be_torn_down(error, is_unusable):
    assert leaves_device_unusable(error) is is_unusable
