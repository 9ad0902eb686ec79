"""The devices that the tests here run on."""

import pytest
import torch

from tests.helpers.devices import GPU


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, so that a test's own logic is seen to hold, and a GPU."""
    return torch.device(request.param)
