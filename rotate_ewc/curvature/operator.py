"""`EKFACLinearOperator`: named blocks and their algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rotate_ewc._utils.keywords import forwards_keywords
from rotate_ewc._utils.parameters import Parameters, name_parameters
from rotate_ewc._utils.validation import AUTO, as_non_negative_number, check_positive_integer
from rotate_ewc.curvature import vectors
from rotate_ewc.curvature.named_blocks import NamedBlocks
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.distributed.sharding import whole
from rotate_ewc.estimation.estimate import fit_blocks
from rotate_ewc.linalg import algebra, quadratic
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import EstimationOptions, EstimationSettings

_MAX_DENSE_BYTES: Final = 4 * 2**30


class EKFACLinearOperator(NamedBlocks):
    """The Fisher matrix of a model's loss, in rotated (EKFAC) form.

    Each parameter gets a basis in which its Fisher matrix is nearly diagonal, and the exact
    diagonal in that basis (George et al. 2018, "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis"). The matrix is that of the loss *under its own reduction*, over
    the whole data set: `mean` averages over all examples however they were batched, `sum` adds.

    A constructed operator is complete: it holds bases, eigenvalues, names and shapes, and no
    reference to the model or the data. Estimation runs in eval mode and leaves parameters, their
    gradients, modes, buffers and random states as they were.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACLinearOperator
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> params = list(model.parameters())
        >>> fisher = EKFACLinearOperator(model, nn.CrossEntropyLoss(), params, data)
        >>> fisher.shape
        (67, 67)
        >>> product = fisher @ [torch.ones_like(p) for p in params]
        >>> [list(p.shape) for p in product]
        [[8, 4], [8], [3, 8], [3]]
        >>> bool(fisher.quadratic_form(product) >= 0)
        True
    """

    @forwards_keywords(EstimationSettings)
    def __init__(
        self,
        model_func: Callable[[Any], Tensor],
        loss_func: Callable[..., Any],
        params: Parameters,
        data: Iterable[Any],
        *,
        num_data: int | None = None,
        check_deterministic: bool = True,
        group: Group = AUTO,
        settings: EstimationSettings | None = None,
        **options: Unpack[EstimationOptions],
    ) -> None:
        """Estimate the operator.

        Args:
            model_func: The model, or a function from a batch's inputs to outputs. Modules that it
                reaches (through closures, `partial`, methods, globals) are put into eval mode.
            loss_func: A loss that is built in or registered, with reduction `mean` or `sum`; with
                `fisher_type="empirical"` any differentiable function of outputs and targets.
            params: Parameters the matrix is over: a list, or a dictionary by name. A list's names
                are those in the model.
            data: Re-iterable batches (inputs, targets), such as a `DataLoader`; or inputs alone, if
                the loss, or the Fisher type, needs no targets.
            num_data: Number of examples in the whole set, if the data are a sample of it.
            check_deterministic: Estimate twice, and raise an error if traces, or products with a
                vector, differ because the model or the data are random. Doubles the time. Without
                it, a model that draws random numbers runs once more on the first batch, with a
                warning if its outputs differ.
            group: The processes that estimate together, each with data of its own: `"auto"` (the
                default group, where `torch.distributed` is initialised), a `ProcessGroup`, a
                `DeviceMesh` of one dimension, or None (this process alone). All of them must
                construct the operator; all get the result of one process with all the data. See
                `docs/distributed.md`.
            settings: How to estimate; None is all defaults.
            **options: Single fields of `EstimationSettings`, such as `fisher_type="type2"`, which
                replace those of `settings`.

        Raises:
            ValueError: If a parameter, layer, loss or batch cannot be handled, naming it.
            TypeError: If an argument has the wrong type, or there is no such option.
        """
        ranks = Ranks.of(group)
        with ranks.together():
            settings = EstimationSettings.gather(settings, options)
            self._estimate(
                model_func, loss_func, params, data, num_data, check_deterministic, settings, ranks
            )

    def _estimate(
        self,
        model_func: Callable[[Any], Tensor],
        loss_func: Callable[..., Any],
        params: Parameters,
        data: Iterable[Any],
        num_data: int | None,
        check_deterministic: bool,
        settings: EstimationSettings,
        ranks: Ranks,
    ) -> None:
        check_positive_integer("num_data", num_data, optional=True)
        if not callable(model_func):
            raise TypeError(f"model_func is {model_func!r}; expected a module or a function")
        model = model_func if isinstance(model_func, nn.Module) else None
        likelihood = likelihood_of(loss_func, settings.fisher_type)
        with whole(model, params) as given:
            finished = fit_blocks(
                likelihood.packing_forward(model_func),
                likelihood,
                name_parameters(given, model),
                data,
                settings,
                model=model,
                ranks=ranks,
                num_data=num_data,
                check_deterministic=check_deterministic,
            )
        self._hold(*finished)

    @property
    def trace(self) -> Tensor:
        """Trace, a scalar tensor; exact for the loss and Fisher type, whatever the basis."""
        return torch.stack([block.trace for block in self._blocks]).sum()

    @property
    def det(self) -> Tensor:
        """Determinant, a scalar tensor."""
        return self.logdet.exp()

    @property
    def logdet(self) -> Tensor:
        """Logarithm of the determinant, a scalar tensor.

        Minus infinity if an eigenvalue is 0 (an unused input, a class without data); a large
        negative number where rounding leaves a tiny one in the place of a zero, as with the outputs
        of a softmax. `damped(damping).logdet` is not affected by either.
        """
        return torch.stack([block.total(block.eigenvalues.log()) for block in self._blocks]).sum()

    @property
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor."""
        squares = [block.total(block.eigenvalues.square()) for block in self._blocks]
        return torch.stack(squares).sum().sqrt()

    def diagonal(self) -> list[Tensor]:
        """Return the diagonal over the parameters themselves, one tensor for each, of its shape."""
        found = algebra.diagonal(self._blocks, self._shapes)
        return [found[name] for name in self._shapes]

    def to_dense(self) -> Tensor:
        """Return the matrix, `[D, D]`, of a model small enough for it.

        Rows and columns are in the order of flat vectors: parameter after parameter, row-major.

        Raises:
            ValueError: If the matrix would take more than 4 GiB.
        """
        size = self.shape[0]
        num_bytes = size * size * self.dtype.itemsize
        if num_bytes > _MAX_DENSE_BYTES:
            raise ValueError(
                f"the dense matrix of {size} × {size} would take {num_bytes / 2**30:.0f} GiB; "
                f"expected at most {_MAX_DENSE_BYTES // 2**30} GiB: use products, or block(name)"
            )
        identity = torch.eye(size, device=self.device, dtype=self.dtype)
        dense: Tensor = self @ identity
        return dense

    def apply(self, function: Callable[[Tensor], Tensor]) -> EKFACLinearOperator:
        """Return the operator with a function applied to every eigenvalue, in the same bases.

        `apply(torch.sqrt)` is `F^½`, `damped(1e-3).apply(torch.rsqrt)` is `(F + 0.001 I)^-½`.

        Args:
            function: From a tensor of eigenvalues to one of the same shape, finite and at least 0.

        Raises:
            ValueError: If the function returns anything else, naming the block.
            TypeError: If it is not a function, or does not return a tensor.
        """
        return self._with(algebra.apply(function, self._blocks))

    def damped(self, damping: float) -> EKFACLinearOperator:
        """Return `F + damping · I`; its `logdet` is finite even if F is singular."""
        added = as_non_negative_number("damping", damping)
        return self.apply(lambda eigenvalues: eigenvalues + added)

    def inverse(self, *, damping: float) -> EKFACLinearOperator:
        """Return `(F + damping · I)⁻¹`, exact in the eigenbasis.

        Without damping, eigenvalues that are 0 but for rounding, as with the outputs of a softmax,
        become huge.

        Raises:
            ValueError: If `damping` is zero, and so is an eigenvalue.
        """
        return self._nonsingular(damping).apply(torch.reciprocal)

    def sample(
        self,
        num_samples: int | None = None,
        *,
        damping: float,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Draw from the normal distribution `N(0, (F + damping · I)⁻¹)`, as Laplace's method does.

        Args:
            num_samples: K, or None for one draw without an axis for it.
            damping: The added precision, such as that of a prior.
            generator: Source of random numbers on the operator's device; None is torch's own.

        Returns:
            One tensor for each parameter, of its shape, with a trailing axis of K draws if
            `num_samples` is given: what the operator can be multiplied with.

        Raises:
            ValueError: If `damping` is zero, and so is an eigenvalue; or K is not positive.
        """
        check_positive_integer("num_samples", num_samples, optional=True)
        root = self._nonsingular(damping).apply(torch.rsqrt)
        draws = algebra.sample(root.blocks, self._shapes, num_samples or 1, generator)
        if num_samples is None:
            return [draws[name][0] for name in self._shapes]
        return [draws[name].movedim(0, -1) for name in self._shapes]

    def __mul__(self, factor: float) -> EKFACLinearOperator:
        """Return the operator multiplied by a number of at least 0."""
        if not isinstance(factor, (int, float)):
            return NotImplemented
        checked = as_non_negative_number("factor", factor)
        return self.apply(lambda eigenvalues: eigenvalues * checked)

    __rmul__ = __mul__

    def __matmul__(self, other: Any) -> Any:
        """Multiply with parameter-shaped tensors or flat vectors.

        Args:
            other: A list with one tensor for each parameter, of its shape or with a trailing axis
                of K columns; or a vector `[D]`; or a matrix `[D, K]`.

        Returns:
            The product, in the form and dtype of `other`; each block computes in its own dtype.

        Raises:
            ValueError: If a shape does not fit, naming the parameter.
            TypeError: If `other` is neither a tensor nor a sequence of tensors, or holds no
                floating-point numbers.
        """
        columns = vectors.to_columns(other, self._shapes)
        product = algebra.multiply(self._blocks, dict(zip(self._shapes, columns, strict=True)))
        return vectors.from_columns([product[name] for name in self._shapes], like=other)

    def quadratic_form(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return `dᵀ F d` in one pass, at half the work of a product; differentiable in d.

        Args:
            tensors: One tensor for each parameter, of its shape.

        Returns:
            A scalar tensor.

        Raises:
            ValueError: If a shape does not fit, naming the parameter.
        """
        vectors.check_list(tensors, self._shapes, columns_allowed=False)
        return quadratic.quadratic_form(self._blocks, dict(zip(self._shapes, tensors, strict=True)))

    def _nonsingular(self, damping: float) -> EKFACLinearOperator:
        damped = self.damped(damping)
        algebra.check_positive(damped.blocks, damping)
        return damped
