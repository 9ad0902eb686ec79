"""How many loss terms the task at hand has, counted in the minibatches of its first epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from rotate_ewc.losses import Likelihood


class LossTerms:
    """The mean number of loss terms of an example, over the minibatches seen so far.

    The sum stays on the device. Reading it means to wait for the device, so that it is read after
    1, 2, 4, 8, … minibatches only, and in the end.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        """Begin without a minibatch.

        Args:
            likelihood: The distribution behind the loss.
        """
        self._likelihood = likelihood
        self._minibatches, self._examples = 0, 0
        self._terms = torch.zeros(())

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, num_examples: int) -> bool:
        """Count the terms of a minibatch; say whether it is time to read the mean.

        Args:
            outputs: The model's outputs.
            targets: Their targets.
            num_examples: Number of examples.
        """
        terms = self._likelihood.num_terms(outputs, targets)
        self._terms = terms if not self._minibatches else self._terms + terms
        self._examples += num_examples
        self._minibatches += 1
        return self._minibatches & (self._minibatches - 1) == 0

    def per_example(self) -> float:
        """Return the mean; 0 before the first term."""
        return float(self._terms) / max(1, self._examples)
