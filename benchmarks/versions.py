"""What a result depends on besides its options: software, and the processor."""

import os
import platform
from importlib import metadata
from typing import Any

import torch


def versions() -> dict[str, Any]:
    """Versions of the software, and the processor, for a record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "avalanche": version_of("avalanche-lib") or "unknown",
        "rotate_ewc": version_of("rotate-ewc") or "unknown",
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def version_of(distribution: str) -> str | None:
    """Version of a distribution; None where it is not installed, or run from its sources."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
