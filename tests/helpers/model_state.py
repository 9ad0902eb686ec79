"""All of a model, and of the random generators, that a call could have changed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class ModelState:
    """What must be the same afterwards."""

    tensors: dict[str, Tensor]
    objects: dict[str, int]
    gradients: dict[str, Tensor | None]
    modes: dict[str, bool]
    requires_grad: dict[str, bool]
    hooks: int
    torch_state: Tensor
    python_state: Any
    numpy_state: Any

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Note how things are."""
        parameters = dict(model.named_parameters())
        tensors = parameters | dict(model.named_buffers())
        return cls(
            tensors={name: t.detach().clone() for name, t in tensors.items()},
            objects={name: id(t) for name, t in tensors.items()},
            gradients={
                n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()
            },
            modes={name: module.training for name, module in model.named_modules()},
            requires_grad={name: p.requires_grad for name, p in parameters.items()},
            hooks=sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                for m in model.modules()
            ),
            torch_state=torch.get_rng_state(),
            python_state=random.getstate(),
            numpy_state=np.random.get_state(),
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        """Compare with a model as it is now."""
        now = ModelState.of(model)
        assert now.modes == self.modes
        assert now.requires_grad == self.requires_grad
        assert now.objects == self.objects
        assert now.hooks == self.hooks
        assert all(torch.equal(now.tensors[name], t) for name, t in self.tensors.items())
        for name, gradient in self.gradients.items():
            after = now.gradients[name]
            assert (after is None) == (gradient is None)
            assert gradient is None or (after is not None and torch.equal(after, gradient))
        assert torch.equal(now.torch_state, self.torch_state)
        assert now.python_state == self.python_state
        assert repr(now.numpy_state) == repr(self.numpy_state)
        assert np.array_equal(now.numpy_state[1], self.numpy_state[1])
