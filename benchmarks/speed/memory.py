"""By how much a piece of work raises the peak of this process's memory."""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
KIBIBYTE = 2**10


def peak_growth(work: Callable[[], Value]) -> tuple[Value, int]:
    """Do some work, and compare the peak of the resident memory in it with what there was before.

    Where the system does not tell, the highest peak since the start of the process is taken
    instead, whose growth is less where there was a higher peak before the work.

    Args:
        work: What is done once.

    Returns:
        What the work returns, and bytes.
    """
    gc.collect()
    _give_back_free_memory()
    try:
        CLEAR.write_text(RESET_PEAK)
        before = _status("VmRSS")
        value = work()
        after = _status("VmHWM")
    except (OSError, KeyError):
        before = _peak_since_start()
        value = work()
        after = _peak_since_start()
    return value, max(after - before, 0)


def _status(field: str) -> int:
    """Bytes that the system gives for this process."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIBIBYTE
    raise KeyError(field)


def _peak_since_start() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def _give_back_free_memory() -> None:
    """Return to the system what was freed; otherwise it would be used again, and not be seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not the C library of GNU
        return
