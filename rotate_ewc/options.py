"""The choices that a user has, and the settings of an estimate, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, TypedDict

import torch

from rotate_ewc._utils.parameters import matches
from rotate_ewc._utils.storage_dtype import OF_BASES, as_storage_dtype, dtype_name
from rotate_ewc._utils.validation import (
    AUTO,
    Rank,
    as_choice,
    as_patterns,
    as_rank,
    check_boolean,
    check_positive_integer,
)

# What other packages (such as kfac-jax and asdl) and papers call the same, without separators.
_ELSEWHERE: Final[dict[str, dict[str, str]]] = {
    "FisherType": {
        "exact": "type2",
        "fisherexact": "type2",
        "ggn": "type2",
        "ggnexact": "type2",
        "fishermc": "mc",
        "fishergradients": "mc",
        "montecarlo": "mc",
        "fisheremp": "empirical",
        "fisherempirical": "empirical",
    },
    "KFACType": {"kfacexpand": "expand", "kfacreduce": "reduce"},
}


class Choice(str, Enum):
    """One of several strings; a member equals its string, and is shown as it.

    Strings are understood in any case, with or without hyphens and underscores (`"Type-2"`), and so
    are the strings and enumerations of other packages that mean the same.
    """

    @classmethod
    def _missing_(cls, value: object) -> Choice | None:
        """Look for a member by another spelling of its string."""
        if not isinstance(value, str):
            return None
        plain = value.lower().replace("-", "").replace("_", "")
        known = {member.value: member for member in cls}
        return known.get(_ELSEWHERE.get(cls.__name__, {}).get(plain, plain))

    def __repr__(self) -> str:
        """Show the string, as messages do."""
        return repr(self.value)

    def __str__(self) -> str:
        """Return the string."""
        return str(self.value)


class FisherType(Choice):
    """Which expectation over labels makes the Fisher matrix.

    `TYPE2` is the exact expectation over the model's own labels (for the losses supported here it
    equals the generalised Gauss-Newton matrix), `MC` estimates it from sampled labels, and
    `EMPIRICAL` takes the labels of the data.
    """

    TYPE2 = "type2"
    MC = "mc"
    EMPIRICAL = "empirical"


class KFACType(Choice):
    """How shared positions (pixels, tokens, repeated use) enter the Kronecker factors.

    The factors only choose the basis; the eigenvalues are exact for either choice. `EXPAND` counts
    every position as an example, `REDUCE` first averages inputs and sums gradients over positions
    (Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
    Architectures").
    """

    EXPAND = "expand"
    REDUCE = "reduce"


class Unsupported(Choice):
    """What to do with parameters that are used in a way without a rule.

    `ERROR` refuses them by name, `DIAGONAL` takes the exact diagonal of their Fisher matrix (one
    backward pass per example), `SKIP` leaves them out. The last two warn.
    """

    ERROR = "error"
    DIAGONAL = "diagonal"
    SKIP = "skip"


class Reduction(Choice):
    """How a loss reduces the terms of a batch: `MEAN` averages them, `SUM` adds them."""

    MEAN = "mean"
    SUM = "sum"


class Mode(Choice):
    """What a penalty keeps of its tasks.

    `MERGED` merges their operators into one, at constant time and memory; `SEPARATE` keeps one
    operator and one anchor for each.
    """

    MERGED = "merged"
    SEPARATE = "separate"


class Weighting(Choice):
    """How tasks are weighted: `EXAMPLES`, by numbers of loss terms, or `UNIFORM`."""

    EXAMPLES = "examples"
    UNIFORM = "uniform"


class EstimationOptions(TypedDict, total=False):
    """The fields of `EstimationSettings` as keyword arguments, all of them optional."""

    fisher_type: FisherType | str
    mc_samples: int
    kfac_approx: KFACType | str
    rank: Rank | Mapping[str, Rank]
    diagonal: Sequence[str]
    storage_dtype: torch.dtype | str | None
    separate_weight_and_bias: bool
    seed: int
    memory_budget: int
    num_per_example_loss_terms: int | None
    batch_size_fn: Callable[[Any], int] | None
    unsupported: Unsupported | str
    progressbar: bool | None


class PenaltyOptions(EstimationOptions, total=False):
    """Keyword arguments of `EKFACPenalty`, all of them optional."""

    plasticity: float
    weighting: Weighting | str
    decay: float
    temperature: float | str
    damping: float
    include: Sequence[str]
    exclude: Sequence[str]
    strict: bool
    sharded: bool
    settings: EstimationSettings | None


@dataclass(frozen=True)
class EstimationSettings:
    """How a Fisher matrix is estimated.

    `EKFACLinearOperator`, `EKFACPenalty` and Avalanche's `RotatedEWCPlugin` and `RotatedEWC` take
    such an object as `settings=`, or its fields as keyword arguments. If both are given, the
    keyword arguments win.

    Attributes:
        fisher_type: `MC` (sampled labels), `TYPE2` (exact expectation over labels) or `EMPIRICAL`
            (the labels of the data).
        mc_samples: Sampled labels per example, for `MC`; with other Fisher types 1.
        kfac_approx: `EXPAND` or `REDUCE`: how shared positions enter the basis.
        rank: How many directions of each side of a parameter's matrix (its outputs, its inputs)
            have eigenvalues of their own; the others share their exact mean, so that the trace is
            exact for every rank. A positive integer; a share, such as 0.99, of the trace of the
            side's Kronecker factor, which the kept directions must reach; `"full"`; or `"auto"`.
            `"auto"` keeps all directions of short sides (up to 128, up to 512 of a vector, up to
            1,024 if that is at most eight times the other side), and on other sides as many as make
            the basis no larger than the parameter, at least 16. Directions that are numerically
            zero are kept only where all are kept. A mapping from name patterns to these values is
            possible too: the first pattern that matches counts, and `"auto"` applies where none
            does; a joint block uses the name of its weight.
        diagonal: Name patterns of parameters that are not rotated: their block is the exact
            diagonal over their entries.
        storage_dtype: Dtype in which bases are kept, if smaller than the dtype of the computation:
            `torch.bfloat16`, `torch.float16` or `torch.float32`, or their names. Eigenvalues and
            anchors keep their dtype, so traces are exact. Each product makes the bases of one block
            orthonormal again in its own dtype: the matrix stays positive semi-definite, and differs
            by the rotation that rounding causes (about 0.2 % for bfloat16). This costs little for
            thin bases; for whole bases it costs more than the product. None keeps bases in the
            dtype of the eigenvalues.
        separate_weight_and_bias: Whether a weight and its bias have a block each, or one joint
            block.
        seed: Seed of the sampled labels; the t-th task of a penalty (from 0) uses `seed + t`. The
            global random state is neither used nor changed.
        memory_budget: Bytes that estimation may use beyond the model's own passes. Batches that fit
            are kept, so that the model runs over them once instead of twice. At least one example
            is processed at a time. Kronecker factors may take as much again; if they do not all
            fit, they are estimated in several rounds, with two passes over the data each.
        num_per_example_loss_terms: Expected number of predictions (such as tokens) per example,
            which the outputs are checked against; the elements of a prediction are not counted.
            None checks nothing.
        batch_size_fn: Function from a batch's inputs to its number of examples; needed if that is
            not the length of the first axis of the (first) tensor.
        unsupported: What to do with parameters that are used in a way without a rule (such as those
            of recurrent layers): `ERROR` refuses them by name, `DIAGONAL` takes the exact diagonal
            of their Fisher matrix, with one backward pass per example, `SKIP` leaves them out. The
            last two warn.
        progressbar: Whether to show progress over batches. None shows none, except in Avalanche,
            where it follows the strategy's loggers.

    Raises:
        ValueError: If a value is out of range, naming the field.
        TypeError: If a value has the wrong type.

    Examples:
        >>> from rotate_ewc import EKFACPenalty, EstimationSettings
        >>> settings = EstimationSettings(fisher_type="type2", memory_budget=2**28)
        >>> penalty = EKFACPenalty(3.0, settings=settings, separate_weight_and_bias=False)
        >>> penalty.settings.fisher_type, penalty.settings.separate_weight_and_bias
        ('type2', False)
    """

    fisher_type: FisherType = FisherType.MC
    mc_samples: int = 1
    kfac_approx: KFACType = KFACType.EXPAND
    rank: Rank | Mapping[str, Rank] = AUTO
    diagonal: Sequence[str] = ()
    storage_dtype: torch.dtype | None = None
    separate_weight_and_bias: bool = True
    seed: int = 2147483647
    memory_budget: int = 2**30
    num_per_example_loss_terms: int | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    unsupported: Unsupported = Unsupported.ERROR
    progressbar: bool | None = None

    def __post_init__(self) -> None:
        """Check every value, and turn strings into choices."""
        choices: dict[str, type[Choice]] = {
            "fisher_type": FisherType,
            "kfac_approx": KFACType,
            "unsupported": Unsupported,
        }
        for name, kind in choices.items():
            object.__setattr__(self, name, as_choice(name, getattr(self, name), kind))
        object.__setattr__(self, "rank", as_rank("rank", self.rank))
        object.__setattr__(self, "diagonal", as_patterns("diagonal", self.diagonal))
        storage_dtype = as_storage_dtype(self.storage_dtype, OF_BASES)
        object.__setattr__(self, "storage_dtype", storage_dtype)
        check_boolean("separate_weight_and_bias", self.separate_weight_and_bias)
        if self.progressbar is not None:
            check_boolean("progressbar", self.progressbar)
        check_positive_integer("mc_samples", self.mc_samples)
        if self.mc_samples != 1 and self.fisher_type is not FisherType.MC:
            raise ValueError(
                f"mc_samples is {self.mc_samples}, but fisher_type {self.fisher_type!r} samples no "
                f"labels; expected fisher_type 'mc', or mc_samples=1"
            )
        check_positive_integer("memory_budget", self.memory_budget)
        check_positive_integer(
            "num_per_example_loss_terms", self.num_per_example_loss_terms, optional=True
        )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is {self.seed!r}; expected an integer")
        if self.batch_size_fn is not None and not callable(self.batch_size_fn):
            raise TypeError(f"batch_size_fn is {self.batch_size_fn!r}; expected a function or None")

    @classmethod
    def gather(
        cls, settings: EstimationSettings | None, options: Mapping[str, Any]
    ) -> EstimationSettings:
        """Return settings with some of their fields replaced.

        Args:
            settings: The settings; None is all defaults.
            options: Other values, by the names of the fields.

        Raises:
            ValueError: If a value is out of range, naming the field.
            TypeError: If a value has the wrong type.
        """
        if settings is None:
            return cls(**options)
        if not isinstance(settings, EstimationSettings):
            raise TypeError(
                f"settings is {type(settings).__name__}; expected an EstimationSettings"
            )
        return replace(settings, **options)

    def rank_of(self, name: str) -> Rank:
        """Return the rank of a parameter."""
        if not isinstance(self.rank, Mapping):
            return self.rank
        return next((rank for p, rank in self.rank.items() if matches(name, p)), AUTO)

    def to_json(self) -> dict[str, Any]:
        """Return the settings in a form that JSON can hold: all except the function."""
        return {
            "fisher_type": self.fisher_type.value,
            "mc_samples": self.mc_samples,
            "kfac_approx": self.kfac_approx.value,
            "rank": dict(self.rank) if isinstance(self.rank, Mapping) else self.rank,
            "diagonal": list(self.diagonal),
            "storage_dtype": None if self.storage_dtype is None else dtype_name(self.storage_dtype),
            "separate_weight_and_bias": self.separate_weight_and_bias,
            "seed": self.seed,
            "memory_budget": self.memory_budget,
            "num_per_example_loss_terms": self.num_per_example_loss_terms,
            "unsupported": self.unsupported.value,
            "progressbar": self.progressbar,
        }
