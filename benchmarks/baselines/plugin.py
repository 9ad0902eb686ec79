"""What the baselines have in common: a quadratic penalty that is estimated after every task."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from benchmarks.avalanche_names import SupervisedPlugin
from benchmarks.baselines.examples import Examples

Value = TypeVar("Value")


class QuadraticPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Adds a penalty to the loss from the second task on.

    Attributes:
        strength: λ, which multiplies the penalty.
        tasks: Number of tasks that are protected.
    """

    def __init__(self, strength: float, *, samples: int | None, seed: int) -> None:
        """Protect nothing yet.

        Args:
            strength: λ, at least 0.
            samples: Examples of each task to estimate on, drawn at random; None for all.
            seed: Seed of the examples and, where they are drawn, of the labels.

        Raises:
            ValueError: If the strength is negative or there are no examples.
        """
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength is {strength}; expected at least 0")
        if samples is not None and samples < 1:
            raise ValueError(f"samples is {samples}; expected at least 1, or None for all")
        self.strength = strength
        self.tasks = 0
        self._samples = samples
        self._seed = seed

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss."""
        if self.tasks > 0:
            strategy.loss = strategy.loss + self.penalty(strategy.model)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Protect the task that has been learned."""
        examples = Examples(strategy, samples=self._samples, seed=self._seed, task=self.tasks)
        self.consolidate(strategy, examples)
        self.tasks += 1

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""
        raise NotImplementedError

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Estimate on the examples of a task, and anchor the weights of ``strategy.model``."""
        raise NotImplementedError


def present(found: Mapping[str, Value], name: str) -> Value:
    """Look up something that is protected.

    Raises:
        ValueError: If the model has it no longer.
    """
    if name not in found:
        raise ValueError(f"{name!r} is protected, but the model does not have it any more")
    return found[name]
