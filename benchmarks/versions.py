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
        "avalanche": _version("avalanche-lib"),
        "rotate_ewc": _version("rotate-ewc"),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def _version(distribution: str) -> str:
    """Version of an installed distribution; of one that is run from its sources, no version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
