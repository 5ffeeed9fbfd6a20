"""megatron-core is imported here as well, and where there is no GPU these tests are still collected."""

from megatron_flashrecovery.testing import cpu_device
from tests.processes.conftest import assert_equal, undisturbed

cpu_device.install()

__all__ = ["assert_equal", "undisturbed"]
