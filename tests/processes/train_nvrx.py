"""The toy job, of which rank 2 is afflicted in its 20th step by the injector of nvidia-resiliency-ext, in its own way.

``NVRX_FAULT`` names the fault, ``NVRX_STRUCK`` a file that gets the Unix time at which it was inflicted; whoever finds
it there is spared.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch.distributed as dist
import train_toy  # beside this script

from megatron_flashrecovery.runtime.framework import StepRecord
from megatron_flashrecovery.testing.toy import Marks, Toy

RANK, STEP = 2, 20


def _injector() -> ModuleType:
    """Of the file alone: the package around it wants much that it does not need."""
    package = find_spec("nvidia_resiliency_ext")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "inprocess" / "tools" / "inject_fault.py"
    spec = spec_from_file_location("inject_fault", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Afflicted(Toy):
    def step(self, marks: Marks) -> StepRecord:
        record = super().step(marks)
        struck = Path(os.environ["NVRX_STRUCK"])
        if self.position == STEP and dist.get_rank() == RANK and not struck.exists():
            fault = INJECTOR.Fault[os.environ["NVRX_FAULT"]]
            INJECTOR.dispatch_fault_injection(fault, 0.0, lambda: struck.write_text(str(time.time())))
        INJECTOR.maybe_raise_workload_exception()
        return record


INJECTOR = _injector()
train_toy.Toy = Afflicted

if __name__ == "__main__":
    train_toy.main()
