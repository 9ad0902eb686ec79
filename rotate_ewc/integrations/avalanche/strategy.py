"""`RotatedEWC`: a ready strategy with the plugin in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from rotate_ewc.integrations.avalanche.plugin import RotatedEWCPlugin
from rotate_ewc.options import FisherType, KFACType, Unsupported


class RotatedEWC(SupervisedTemplate):
    """A strategy with `RotatedEWCPlugin`, to be used as Avalanche's `EWC` is.

    Example:
        strategy = RotatedEWC(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(),
                              ewc_lambda=3.0, train_mb_size=128, train_epochs=2)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[..., Any] | None = None,
        ewc_lambda: float = 1.0,
        mode: str = "merged",
        update: str = "penalty",
        every: int = 1,
        step_size: float | None = None,
        weighting: str = "examples",
        decay: float = 1.0,
        temperature: float = 1.0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        num_samples: int | None = None,
        estimation_mb_size: int | None = None,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        separate_weight_and_bias: bool = True,
        seed: int = 2147483647,
        memory_budget: int = 2**30,
        unsupported: Unsupported | str = Unsupported.ERROR,
        progressbar: bool | None = None,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        """Make the strategy.

        Args:
            model: The model.
            optimizer: Its optimizer.
            criterion: The loss, `CrossEntropyLoss()` if None.
            ewc_lambda: See `RotatedEWCPlugin`, also for the arguments down to `memory_budget`.
            mode: `"merged"` or `"separate"`.
            update: `"penalty"`, `"tangent"`, `"proximal"` or `"optimizer"`.
            every: Optimizer steps for each implicit or proximal step.
            step_size: That of these steps; None takes the optimizer's.
            weighting: `"examples"` or `"uniform"`.
            decay: What earlier experiences are multiplied with at the end of each.
            temperature: What the outputs are divided by in a snapshot.
            include: Name patterns of the parameters to protect.
            exclude: Name patterns of parameters to leave out.
            num_samples: Examples for each snapshot; None is all.
            estimation_mb_size: Mini-batch size of the snapshot.
            fisher_type: `MC`, `TYPE2` or `EMPIRICAL`.
            mc_samples: Sampled labels per example.
            kfac_approx: `EXPAND` or `REDUCE`.
            separate_weight_and_bias: Separate blocks, or a joint one.
            seed: Seed of the drawn examples and labels.
            memory_budget: Bytes that a snapshot may use.
            unsupported: `"error"`, `"diagonal"` or `"skip"`.
            progressbar: Whether to show progress of a snapshot; None follows the loggers.
            train_mb_size: Training mini-batch size.
            train_epochs: Epochs for each experience.
            eval_mb_size: Evaluation mini-batch size.
            device: Where to train.
            plugins: More plugins; the list is not changed.
            evaluator: Metrics and loggers.
            eval_every: When to evaluate during training, as in every Avalanche strategy.
            **base_kwargs: Handed on to Avalanche's `SupervisedTemplate`.
        """
        plugin = RotatedEWCPlugin(
            ewc_lambda,
            mode,
            update=update,
            every=every,
            step_size=step_size,
            weighting=weighting,
            decay=decay,
            temperature=temperature,
            include=include,
            exclude=exclude,
            num_samples=num_samples,
            estimation_mb_size=estimation_mb_size,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            kfac_approx=kfac_approx,
            separate_weight_and_bias=separate_weight_and_bias,
            seed=seed,
            memory_budget=memory_budget,
            unsupported=unsupported,
            progressbar=progressbar,
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or ()), plugin],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
        self.rotated_ewc = plugin
