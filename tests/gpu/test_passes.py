"""What draws random numbers on a device draws the same in every pass over the data."""

from __future__ import annotations

import torch

from rotate_ewc._utils.preserve_state import kept, random_states
from rotate_ewc.integrations.loaders import begin_pass


def test_passes_begin_with_the_same_numbers(device: torch.device) -> None:
    # As a model's parameters, and a trainer's root device, name it.
    device = torch.zeros((), device=device).device
    with kept(random_states([device])):
        undisturbed = torch.rand(4, device=device)
    passes = []
    with kept(random_states([device])):
        for _ in range(2):
            begin_pass([], device)
            passes.append(torch.rand(4, device=device))
    assert torch.equal(*passes)
    assert not torch.equal(passes[0], undisturbed)
    assert torch.equal(torch.rand(4, device=device), undisturbed)
