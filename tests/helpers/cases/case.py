"""What a case is: a model, its data, and the blocks that must come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from tests.helpers.cases.losses import LOSSES, make_targets
from tests.helpers.oracles import (
    BlockLayout,
    Fisher,
    Kind,
    LayerDerivatives,
    LayerTerms,
    expected_layouts,
    layer_derivatives,
    layer_terms,
)


def layouts_of(kind: Kind, *names: str) -> tuple[BlockLayout, ...]:
    """Return a layout of one group for each parameter."""
    transposed = kind in ("lookup", "tied")
    return tuple(BlockLayout((name,), transposed=transposed, kind=kind) for name in names)


def diagonal(*names: str) -> tuple[BlockLayout, ...]:
    """Say that parameters are multiplied with or added to data, or have no rule at all."""
    return layouts_of("diagonal", *names)


def derived(*names: str) -> tuple[BlockLayout, ...]:
    """Say that parameters reach layers through a computation, or layers of several kinds."""
    return layouts_of("derived", *names)


@dataclass(frozen=True)
class Case:
    """A model, the shape of its data, and what is to be estimated.

    Attributes:
        name: Readable identifier.
        build: Makes the model; called under a fixed seed.
        input_shape: Shape of one input.
        output_shape: Shape of one output, classes first.
        rows: Consecutive rows of outputs and targets that belong to one example.
        vocabulary: Number of tokens that the inputs are drawn from; 0 for real numbers.
        shared: Whether a weight is used at more than one position per example.
        frozen: Parameters that neither require gradients nor are estimated.
        left_out: Parameters that require gradients but are not estimated.
        batch_sizes: How the examples are cut into batches.
        layouts: Blocks of parameters of which the modules alone do not tell how they are used.
        unsupported: What is asked for where there is no rule.
        reference: Turns the model into one that computes the same with Linear modules, so that
            their inputs and outputs can be seen.
        renamed: Pairs of a parameter's name and its name in the reference.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = (3,)
    rows: int = 1
    vocabulary: int = 0
    shared: bool = False
    frozen: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (3, 1, 2)
    layouts: tuple[BlockLayout, ...] = ()
    unsupported: Literal["error", "diagonal"] = "error"
    reference: Callable[[nn.Module], nn.Module] | None = None
    renamed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Return the name, which makes a readable test identifier."""
        return self.name

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.batch_sizes)

    def model(self) -> nn.Module:
        """Make the model, always with the same weights and without touching the global RNG."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = self.build().double()
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that are estimated."""
        out = {*self.frozen, *self.left_out}
        return [name for name, _ in model.named_parameters() if name not in out]

    def inputs(self) -> Tensor:
        """Return all inputs, ``[N, *input_shape]``."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.examples, *self.input_shape)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def loss_func(self, loss: str, reduction: str = "mean") -> nn.Module:
        """Return a loss with its options, for this case's outputs."""
        return LOSSES[loss].make(reduction, self.output_shape)

    def targets(self, loss: str) -> Tensor:
        """Return all targets in the form that a loss wants, ``[N * rows, *]``."""
        return make_targets(LOSSES[loss], self.examples, self.rows, self.output_shape)

    def data(
        self,
        loss: str,
        batch_sizes: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the examples in batches, optionally in another order or cut in another way."""
        x, y = self.inputs(), self.targets(loss)
        y = y.reshape(self.examples, self.rows, *y.shape[1:])
        if order is not None:
            x, y = x[list(order)], y[list(order)]
        sizes = list(self.batch_sizes if batch_sizes is None else batch_sizes)
        pairs = zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)
        return [(inputs, targets.flatten(0, 1)) for inputs, targets in pairs]


def terms_of(
    case: Case, loss: str, reduction: str, fisher: Fisher, parameters: Sequence[str]
) -> LayerTerms | None:
    """Return the layer inputs and output gradients of a block.

    Args:
        case: The case.
        loss: Name of the loss.
        reduction: The loss's reduction.
        fisher: Which Fisher matrix.
        parameters: A weight, or a weight and its bias.

    Returns:
        The terms; ``None`` where no module uses the weight, so that they cannot be seen.
    """
    weight = dict(case.renamed).get(parameters[0], parameters[0])
    if weight.rpartition(".")[2] != "weight":
        return None
    weights = {*_layer_weights(case), weight}
    terms = _terms(case, loss, reduction, fisher, tuple(sorted(weights))).get(weight)
    return terms.with_bias() if terms is not None and len(parameters) == 2 else terms


@cache
def _layer_weights(case: Case) -> list[str]:
    """Return the names of all weights of layers, of which the terms are recorded together."""
    model, renamed = case.model(), dict(case.renamed)
    layouts = expected_layouts(model, case.names(model), joint=False, given=case.layouts)
    names = [layout.parameters[0] for layout in layouts if layout.kind in ("layer", "lookup")]
    found = [renamed.get(name, name) for name in names]
    return [name for name in found if name.rpartition(".")[2] == "weight"]


@lru_cache(maxsize=16)
def _terms(
    case: Case, loss: str, reduction: str, fisher: Fisher, weights: tuple[str, ...]
) -> dict[str, LayerTerms]:
    """Work the terms out once."""
    derivatives = _derivatives(case, weights)
    loss_func, x, y = case.loss_func(loss, reduction), case.inputs(), case.targets(loss)
    return layer_terms(_reference(case), loss_func, derivatives, x, y, fisher)


@lru_cache(maxsize=8)
def _derivatives(case: Case, weights: tuple[str, ...]) -> list[dict[str, LayerDerivatives]]:
    """Differentiate a case once, for all losses."""
    return layer_derivatives(_reference(case), weights, case.inputs())


def _reference(case: Case) -> nn.Module:
    """Return the case's model, or one that does the same with modules."""
    return case.model() if case.reference is None else case.reference(case.model())
