"""How much memory a call needs at once, in bytes of PyTorch's CPU allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes that a call had allocated at one time.

    The profiler records every allocation and every release, also those inside of an operation, such
    as the copy that a matrix product makes of an operand with inconvenient strides. Releases of
    tensors from before the call are not seen, so these count as held throughout.

    What the call returns is released before this function returns; a reference cycle in the call
    counts for as long as it is not collected, as it would in a real run.

    Args:
        function: What to measure.

    Returns:
        The peak above what was allocated before the call.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    # A profiler is in a reference cycle; its records (some 2 kB each) are not to wait for that.
    recorded.profiler.kineto_results = None
    held = peak = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        held += change
        peak = max(peak, held)
    return peak
