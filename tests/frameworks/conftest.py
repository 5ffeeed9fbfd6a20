"""megatron-core is imported by the modules of this tier, and knows no other device than CUDA."""

from megatron_flashrecovery.testing import cpu_device

cpu_device.install()
