"""SI: importances from the path that training took.

Zenke, Poole and Ganguli, "Continual learning through synaptic intelligence", ICML 2017.

Avalanche 0.6 has a plugin of that name, but on a CPU its records of old weights share the memory of
the weights in training, so that every difference is zero and nothing is protected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.plugin import Examples, QuadraticPlugin

DAMPING = 0.1


@dataclass
class Path:
    """What is known of one parameter."""

    before_step: Tensor  # the parameter before the optimizer's step
    start: Tensor  # the parameter when the task began: the anchor
    gain: Tensor  # ``ω``, by how much its changes have lowered the loss of the task
    importance: Tensor  # ``Ω``, summed over the tasks that are finished


class SynapticIntelligence(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Adds ``λ Σ_i Ω_i (θ_i - θ*_i)²`` to the loss (the paper's equation 4, where λ is ``c``).

    ``Ω_i`` sums ``ω_i / (Δ_i² + ξ)`` over the tasks (equation 5), where ``ω_i`` is the integral of
    minus the gradient of the task's own loss along the path of the parameter, and ``Δ_i`` how far
    the task moved it. ``ξ`` is 0.1, as for permuted MNIST in the paper; negative importances count
    as zero.
    """

    def __init__(self, strength: float, *, samples: int | None = None, seed: int = 0) -> None:
        """Protect nothing yet; nothing is drawn at random, neither examples nor labels."""
        super().__init__(strength, samples=samples, seed=seed)
        self._paths: dict[str, Path] = {}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begin a path for every parameter, or go on where it has ended."""
        known = self._paths
        self._paths = {
            name: Path(p.detach().clone(), p.detach().clone(), torch.zeros_like(p), importance)
            for name, p in _trained(strategy.model).items()
            for importance in [known[name].importance if name in known else torch.zeros_like(p)]
        }

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""
        trained = _trained(model)
        terms = [
            (path.importance * (trained[name] - path.start) ** 2).sum()
            for name, path in self._paths.items()
        ]
        return self.strength * torch.stack(terms).sum()

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Remember where the step begins."""
        for name, parameter in _trained(strategy.model).items():
            self._paths[name].before_step.copy_(parameter.detach())

    @torch.no_grad()
    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the step to the path."""
        for name, parameter in _trained(strategy.model).items():
            if parameter.grad is None:  # another task's head
                continue
            path = self._paths[name]
            from_start = path.before_step - path.start
            of_the_penalty = 2 * self.strength * path.importance * from_start
            path.gain -= (parameter.grad - of_the_penalty) * (parameter - path.before_step)

    @torch.no_grad()
    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Turn the path into importances."""
        for name, parameter in _trained(strategy.model).items():
            path = self._paths[name]
            moved = parameter - path.start
            path.importance += (path.gain / (moved**2 + DAMPING)).clamp(min=0)


def _trained(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
