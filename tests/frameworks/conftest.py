"""megatron-core is imported by the modules of this tier, and knows no other device than CUDA."""

from megatron_flashrecovery.testing import cpu_device
from tests.processes.conftest import assert_equal, undisturbed

cpu_device.install()

__all__ = ["assert_equal", "undisturbed"]
