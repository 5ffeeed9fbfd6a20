"""What an exception that ends a script says of the fault behind it: the script, a device, memory, or something else.

Classes are told by their names, along the whole line of bases: older releases of torch lack some of them, and raise a
plain ``RuntimeError`` with CUDA's own words in its place.
"""

from __future__ import annotations

import re
import traceback

from megatron_flashrecovery.core.policy import Fault

_FAULT_OF_CLASS = (
    ("OutOfMemoryError", Fault.DEVICE_MEMORY),
    ("MemoryError", Fault.OUT_OF_MEMORY),
    ("FlashRecoveryError", Fault.PROCESS_ENDED),
    ("Severed", Fault.PROCESS_ENDED),
    ("DistError", Fault.PROCESS_ENDED),
    ("OSError", Fault.PROCESS_ENDED),
)
"""The last of them say something of this package, the network or a file system, and nothing of the script."""

# Numbers of cudaError_t (driver_types.h); they have never changed.
_FAULT_OF_CODE = {
    2: Fault.DEVICE_MEMORY,  # cudaErrorMemoryAllocation
    214: Fault.DEVICE_POISONED,  # cudaErrorECCUncorrectable
    710: Fault.EXCEPTION,  # cudaErrorAssert: an assertion of the script's own kernel has failed
}
_FAULT_OF_WORDS = (
    (re.compile(r"uncorrectable ECC error", re.IGNORECASE), Fault.DEVICE_POISONED),
    (re.compile(r"device-side assert triggered"), Fault.EXCEPTION),
    (re.compile(r"CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"), Fault.DEVICE_MEMORY),
    (re.compile(r"CUDA (driver )?error: |CU(BLAS|DNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"), Fault.DEVICE_ERROR),
)
_PLACES_OF_COMMUNICATION = ("/torch/distributed/", "/megatron_flashrecovery/comm/", "/runtime/parking_lot.py")
_LEAVES_A_DEVICE_UNUSABLE = frozenset({Fault.DEVICE_ERROR, Fault.DEVICE_POISONED})


def fault_of(error: BaseException) -> Fault:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "AcceleratorError" in names:
        return _of_device(error)
    for name, fault in _FAULT_OF_CLASS:
        if name in names:
            return fault
    if isinstance(error, RuntimeError):
        for words, fault in _FAULT_OF_WORDS:
            if words.search(str(error)):
                return fault
    frames = traceback.extract_tb(error.__traceback__)
    if frames and any(place in frames[-1].filename for place in _PLACES_OF_COMMUNICATION):
        return Fault.PROCESS_ENDED
    return Fault.EXCEPTION


def leaves_device_unusable(error: BaseException) -> bool:
    """From here on every call to the device in this process fails, or never returns: nothing may be torn down."""
    words = str(error)
    return fault_of(error) in _LEAVES_A_DEVICE_UNUSABLE or "device-side assert triggered" in words


def _of_device(error: BaseException) -> Fault:
    """``error_code`` is torch's, from 2.9 on."""
    code = getattr(error, "error_code", None)
    if code in _FAULT_OF_CODE:
        return _FAULT_OF_CODE[code]
    for words, fault in _FAULT_OF_WORDS:
        if words.search(str(error)):
            return fault
    return Fault.DEVICE_ERROR
