"""A GPU as a parameter of tests, and what is read from devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.penalties import Batches

GPU = pytest.param(
    "cuda:0",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    ],
)


def random_state(device: torch.device) -> Tensor:
    """The state of torch's own generator on a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def on(device: torch.device, data: Batches) -> Batches:
    return [(inputs.to(device), targets.to(device)) for inputs, targets in data]
