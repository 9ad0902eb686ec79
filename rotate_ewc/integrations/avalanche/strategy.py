"""`RotatedEWC`: a ready strategy with the plugin in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from rotate_ewc._utils.keywords import forwards_keywords
from rotate_ewc.integrations.avalanche.plugin import RotatedEWCPlugin


class RotatedEWC(SupervisedTemplate):
    """A strategy with `RotatedEWCPlugin`, used like Avalanche's `EWC`.

    Examples:
        ```python
        strategy = RotatedEWC(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(),
                              train_mb_size=128, train_epochs=2)
        ```
    """

    @forwards_keywords(RotatedEWCPlugin, SupervisedTemplate)
    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[..., Any] | None = None,
        eval_mb_size: int | None = None,
        plugins: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        """Make the strategy.

        Args:
            model: The model.
            optimizer: Its optimizer.
            criterion: The loss, `CrossEntropyLoss()` if None.
            eval_mb_size: Evaluation mini-batch size; that of training if None.
            plugins: More plugins; the list is not changed.
            **options: Other arguments of `RotatedEWCPlugin` (such as `ewc_lambda`, and all that
                `EKFACPenalty` takes) and of Avalanche's `SupervisedTemplate` (such as
                `train_mb_size`, `train_epochs`, `device` and `evaluator`).

        Raises:
            ValueError: If a value is out of range, naming the argument.
            TypeError: If a value has the wrong type, or there is no such argument.
        """
        names = inspect.signature(RotatedEWCPlugin).parameters.keys() & options.keys()
        plugin = RotatedEWCPlugin(**{name: options.pop(name) for name in names})
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            eval_mb_size=eval_mb_size,
            plugins=[*(plugins or ()), plugin],
            **options,
        )
        self.rotated_ewc = plugin
