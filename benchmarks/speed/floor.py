"""The products that the estimation of an EKFAC snapshot cannot do without, and what they take.

Floating-point operations of one example, two for a multiplication with an addition. A layer maps
``d_in`` numbers to ``d_out`` at ``S`` shared positions; ``C`` label vectors are sent backwards,
1 with sampled labels and one less than there are classes for the exact Fisher matrix, because
``diag(p) - p pᵀ`` has that rank (for every token where each has a label of its own)::

    forward    2 S d_in d_out
    backward   C · 2 S d_in d_out                 unless no layer before it needs a gradient
    attention  forward 2 T² d, backward C · 4 T² d          2 and 4 products, half of each causal
    factors    S d_in²  +  C S d_out²             symmetric: half of the product
               + C d_out²                         for a bias, whose covariance is exact, if S > 1

Eigenvalues, S = 1: the squares of all label vectors are summed before the last product::

    rotations  2 d_in²  +  C · 2 d_out²
    Λ          2 d_in d_out

Eigenvalues, S > 1: the cheapest of the gradient of every example, rotated before it is made or
afterwards, on either side::

    inputs     2 S d_in²       or   C · 2 d_out d_in²
    outputs    C · 2 S d_out²  or   C · 2 d_in d_out²
    Λ          C · 2 S d_in d_out

and of a sum over pairs of positions of rotated vectors, whose label vectors are summed before the
last product, as for S = 1::

    rotations  2 S d_in²  +  C · 2 S d_out²
    Λ          S (S + 1) d_in d_out

Then ``eigh`` once for every factor: ``d_in`` and ``d_out`` of each layer, and ``d_out`` once more
for a bias with S > 1, whose own covariance is not its weight's factor; with S = 1 it is. Who takes
the weight's basis for the bias as well saves that ``eigh`` and gets a worse basis, so it is told
apart. A factor of at most half as many vectors n as they have entries d needs no more than ``eigh``
of n rows, and a product for the basis that these are rows in::

    complete basis  4 n d²

Only products are counted, at the rate that the machine reaches in large ones: elementwise work,
patches of convolutions, softmax and norms take time as well, so nothing reaches the floor.
Convolutions count as they are written down, though transforms could save multiplications.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Any

from torch import Tensor, nn

from benchmarks.speed import names
from benchmarks.speed.cases import Attention, Workload

GIGA = 1e9


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution, as products of matrices."""

    positions: int  # shared positions ``S`` of one example: tokens, or pixels of the output
    d_in: int  # inputs at one position, the kernel's pixels included
    d_out: int  # outputs at one position
    bias: bool  # whether there is a bias
    backward: bool  # whether the gradient at its input is needed, for layers before it
    estimated: bool = True  # whether its weight has factors, and eigenvalues


# Floating-point operations by purpose: the forward pass, the backward pass to the outputs of all
# layers, the covariances, turning vectors or gradients into the bases, and Λ after that.
PURPOSES = ("forward", "backward", "factors", "rotations", "eigenvalues")
Counts = dict[str, float]


@dataclass(frozen=True)
class Factor:
    """A sum of outer products that is to be decomposed."""

    size: int  # entries of a vector
    vectors: int  # number of vectors

    @property
    def rows(self) -> int:
        """Rows of the smallest matrix whose ``eigh`` is enough."""
        return self.vectors if 2 * self.vectors <= self.size else self.size

    @property
    def gigaflop(self) -> float:
        """Operations, in billions, for a basis of everything in which it is so small."""
        return 4 * self.vectors * self.size**2 / GIGA if self.rows < self.size else 0.0


def describe_layers(workload: Workload) -> list[Layer]:
    """Run a model on an example, and look at its linear layers and convolutions."""
    known = workload.known_layers
    found: list[Layer] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        d_out, d_in = weight.flatten(1).shape
        positions = output.numel() // d_out
        backward = inputs[0].requires_grad
        found.append(Layer(positions, d_in, d_out, bias is not None, backward, module in known))

    handles = [layer.register_forward_hook(look) for layer in workload.layers]
    try:
        workload.model(workload.beginning(1).batches[0][0])
    finally:
        for handle in handles:
            handle.remove()
    return found


def count_layer(layer: Layer, vectors: int) -> Counts:
    """Count one layer's operations for one example with so many label vectors."""
    product = 2.0 * layer.positions * layer.d_in * layer.d_out
    backward = vectors * product if layer.backward else 0.0
    if not layer.estimated:
        return Counts(forward=product, backward=backward)
    factors = layer.positions * (layer.d_in**2 + vectors * layer.d_out**2)
    if layer.bias and layer.positions > 1:
        factors += vectors * layer.d_out**2
    rotations, eigenvalues = _cheapest_eigenvalues(layer, vectors)
    values = (product, backward, float(factors), rotations, eigenvalues)
    return dict(zip(PURPOSES, values, strict=True))


def _cheapest_eigenvalues(layer: Layer, vectors: int) -> tuple[float, float]:
    """Operations of the rotations, and of what comes after them."""
    positions, d_in, d_out = layer.positions, layer.d_in, layer.d_out
    rotate_inputs = 2.0 * positions * d_in**2
    rotate_outputs = vectors * 2.0 * positions * d_out**2
    pairs = (rotate_inputs + rotate_outputs, float(positions * (positions + 1) * d_in * d_out))
    if positions == 1:
        return pairs  # the one pair is the product of squares
    gradients = (
        min(rotate_inputs, vectors * 2.0 * d_out * d_in**2)
        + min(rotate_outputs, vectors * 2.0 * d_in * d_out**2),
        vectors * 2.0 * positions * d_in * d_out,
    )
    return min(pairs, gradients, key=sum)


def count_attention(attention: Attention, vectors: int) -> Counts:
    """Count the products inside causal attention for one example."""
    one_product = attention.blocks * float(attention.length**2 * attention.width)
    return Counts(forward=2 * one_product, backward=vectors * 4 * one_product)


def factors(
    layers: Iterable[Layer], vectors: int, examples: int
) -> tuple[list[Factor], list[Factor]]:
    """The factors of all weights, and of the biases that have their own, with repetitions."""
    of_weights, of_biases = [], []
    for layer in filter(attrgetter("estimated"), layers):
        seen = examples * layer.positions
        of_weights += [Factor(layer.d_in, seen), Factor(layer.d_out, seen * vectors)]
        if layer.bias and layer.positions > 1:
            of_biases.append(Factor(layer.d_out, examples * vectors))
    return of_weights, of_biases


def count(
    layers: Sequence[Layer], attention: Attention | None, vectors: int, examples: int
) -> Counts:
    """Count the operations of an estimation, ``eigh`` aside."""
    parts = [count_layer(layer, vectors) for layer in layers]
    if attention is not None:
        parts.append(count_attention(attention, vectors))
    return {name: examples * sum(part.get(name, 0.0) for part in parts) for name in PURPOSES}


@dataclass(frozen=True)
class Necessary:
    """All that an estimation cannot do without."""

    gigaflop: Counts  # operations of products by purpose, in billions
    of_weights: Sequence[Factor]  # the factors of all weights
    of_biases: Sequence[Factor]  # those that biases have of their own

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows of the matrices whose ``eigh`` is needed."""
        return [factor.rows for factor in (*self.of_weights, *self.of_biases)]

    def seconds(
        self, rates: Mapping[str, Sequence[float]], eigh: Mapping[str, Sequence[float]]
    ) -> dict[str, float]:
        """The least time that it takes on a machine, by purpose."""
        rate = max(map(median, rates.values()))

        def decomposed(factor: Factor) -> float:
            return median(eigh[str(factor.rows)]) + factor.gigaflop / rate

        return {
            **{name: number / rate for name, number in self.gigaflop.items()},
            "eigh": sum(map(decomposed, self.of_weights)),
            "eigh for biases": sum(map(decomposed, self.of_biases)),
        }


def necessary(workload: Workload, fisher: str) -> Necessary:
    """Count what an estimation cannot do without; what needs no gradient must be frozen."""
    layers = describe_layers(workload)
    exact = (workload.case.classes - 1) * workload.labels_per_example
    vectors, examples = 1 if fisher == names.MC else exact, workload.examples
    counts = count(layers, workload.case.attention, vectors, examples)
    gigaflop = {purpose: number / GIGA for purpose, number in counts.items()}
    return Necessary(gigaflop, *factors(layers, vectors, examples))
