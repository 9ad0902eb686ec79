"""The choices that define an estimate, checked once and then passed around whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rotate_ewc._utils.validation import check_boolean, check_positive_integer


class FisherType(str, Enum):
    """Which expectation over labels makes the Fisher matrix.

    `TYPE2` is the exact expectation over the model's own labels (for the losses supported here it
    equals the generalised Gauss-Newton matrix), `MC` estimates it from sampled labels, and
    `EMPIRICAL` takes the labels of the data.
    """

    TYPE2 = "type2"
    MC = "mc"
    EMPIRICAL = "empirical"


class KFACType(str, Enum):
    """How shared positions (pixels, tokens, repeated use) enter the Kronecker factors.

    The factors only choose the basis; the eigenvalues are exact for either choice. `EXPAND` counts
    every position as an example, `REDUCE` first averages inputs and sums gradients over positions
    (Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures").
    """

    EXPAND = "expand"
    REDUCE = "reduce"


class Unsupported(str, Enum):
    """What to do about parameters that are used in a way for which there is no rule.

    `ERROR` refuses them by name, `DIAGONAL` takes the exact diagonal of their Fisher matrix (one
    backward pass for every example), `SKIP` leaves them out. The last two warn.
    """

    ERROR = "error"
    DIAGONAL = "diagonal"
    SKIP = "skip"


@dataclass(frozen=True)
class EstimationSettings:
    """How a snapshot is estimated; one object instead of ten arguments in every function.

    Attributes:
        fisher_type: Which expectation over labels is taken.
        mc_samples: Sampled labels per example, for `FisherType.MC`.
        kfac_approx: How shared positions enter the basis.
        separate_weight_and_bias: One block for each, or one joint block for both.
        seed: Seed of the label samples; the global random state is neither used nor moved.
        memory_budget: Bytes that estimation may keep and work in beyond the model's own passes.
        num_per_example_loss_terms: Expected number of loss terms (such as tokens) per example;
            None takes it from the outputs.
        num_data: Examples that the data stand for, when they are a sample of a larger set.
        batch_size_fn: Number of examples in a batch's inputs, where that is not their first axis.
        progressbar: Whether to show progress over batches.
        unsupported: What to do about parameters for whose uses there is no rule.
    """

    fisher_type: FisherType = FisherType.MC
    mc_samples: int = 1
    kfac_approx: KFACType = KFACType.EXPAND
    separate_weight_and_bias: bool = True
    seed: int = 2147483647
    memory_budget: int = 2**30
    num_per_example_loss_terms: int | None = None
    num_data: int | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    progressbar: bool = False
    unsupported: Unsupported = Unsupported.ERROR

    def __post_init__(self) -> None:
        """Check every value."""
        check_boolean("separate_weight_and_bias", self.separate_weight_and_bias)
        check_boolean("progressbar", self.progressbar)
        check_positive_integer("mc_samples", self.mc_samples)
        check_positive_integer("memory_budget", self.memory_budget)
        check_positive_integer(
            "num_per_example_loss_terms", self.num_per_example_loss_terms, optional=True
        )
        check_positive_integer("num_data", self.num_data, optional=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is {self.seed!r}; expected an integer")
        if self.batch_size_fn is not None and not callable(self.batch_size_fn):
            raise TypeError(f"batch_size_fn is {self.batch_size_fn!r}; expected a function or None")

    def to_json(self) -> dict[str, bool | int | str]:
        """Return the settings that a snapshot tells, by the names of the arguments."""
        return {
            "fisher_type": self.fisher_type.value,
            "mc_samples": self.mc_samples,
            "kfac_approx": self.kfac_approx.value,
            "separate_weight_and_bias": self.separate_weight_and_bias,
            "seed": self.seed,
            "memory_budget": self.memory_budget,
            "progressbar": self.progressbar,
            "unsupported": self.unsupported.value,
        }
