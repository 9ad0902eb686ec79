"""What losses have in common of which only the gradients are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Generator, Tensor

from rotate_ewc.losses.base import Likelihood


class UserLoss:
    """A function of a user's, with what cannot be seen in it.

    Attributes:
        function: From whatever it takes to the loss.
        terms: From the same to what the mean divides by; None if that is not said.
        reduction: `"mean"` or `"sum"`; None if that is not said.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        terms: Callable[..., Tensor] | None = None,
        reduction: str | None = None,
    ) -> None:
        """Take a function, which subclasses say more about.

        Raises:
            TypeError: If `function` or `terms` cannot be called.
            ValueError: If the reduction is another.
        """
        for name, value in (("function", function), ("terms", terms)):
            if not callable(value) and (value is not None or name == "function"):
                raise TypeError(f"{name} is {value!r}; expected a function")
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or None")
        self.function, self.terms, self.reduction = function, terms, reduction


class GradientsOnly(Likelihood):
    """A loss without a distribution; subclasses have it as `loss`."""

    loss: UserLoss

    @property
    def user_functions(self) -> tuple[Callable[..., Any], ...]:
        """The loss itself."""
        return (self.loss.function,)

    @property
    def has_distribution(self) -> bool:
        """Only gradients are known."""
        return False

    def exact_vectors(self, outputs: Tensor, targets: Any, num_examples: int) -> Iterator[Tensor]:
        """Refuse: there is no distribution."""
        self.refuse()

    def sampled_vector(self, outputs: Tensor, targets: Any, generator: Generator) -> Tensor:
        """Refuse: there is no distribution."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise a `TypeError` that says so."""
        raise TypeError(f"{self.name} has no distribution; expected fisher_type='empirical'")
