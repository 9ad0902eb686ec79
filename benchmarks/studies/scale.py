"""``study-scale``: what large decoders would take, by counted work and measured rates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from benchmarks.command import keep, make_folder, print_table, use_threads
from benchmarks.option_types import Count, Folder, some_of

if TYPE_CHECKING:
    from rotate_ewc.linalg.outer_products import OuterProducts

NAME = "scale"
FORMAT = "rotate_ewc.benchmarks.scale/1"
GIB = 2**30
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Decoder:
    """A transformer as Llama 3, by its sizes."""

    width: int  # features of a token
    hidden: int  # features between the two halves of a feed-forward layer
    layers: int  # blocks
    heads: int  # of the queries
    shared_heads: int  # of keys and values
    vocabulary: int
    tied: bool  # whether the head's weight is the embedding

    def divided(self, factor: int) -> "Decoder":
        """Return the same depth with every width, and the vocabulary, divided."""
        sizes = ("width", "hidden", "heads", "shared_heads", "vocabulary")
        return replace(self, **{name: max(1, getattr(self, name) // factor) for name in sizes})

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """`(d_out, d_in)` of the linear layers of one block."""
        shared = self.width * self.shared_heads // self.heads
        own = [self.width, shared, shared, self.width, self.hidden, self.hidden]
        return [*((d_out, self.width) for d_out in own), (self.width, self.hidden)]


ONE_BILLION = Decoder(2048, 8192, 16, 32, 8, 128256, tied=True)
EIGHT_BILLION = Decoder(4096, 14336, 32, 32, 8, 128256, tied=False)
PLANS = {
    "1b": ONE_BILLION,
    "1b-eighth": ONE_BILLION.divided(8),
    "8b": EIGHT_BILLION,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count bytes and operations of large decoders with thin bases, and tell the seconds.

    A plan is made of the sizes alone. Seconds are operations over the rate that a product of two
    large matrices has on one processor of this machine, which is measured first; so they are a
    floor, for one processor, without what goes through memory. Writes scale.json.

    Attributes:
        plans: Any of 1b (as Llama 3.2 with one billion parameters), 1b-eighth (the same at an
            eighth of the width), 8b (as Llama 3 with eight).
        rank: Directions that are kept of each side.
        sequences: Sequences of the snapshot.
        length: Tokens of each.
        memory_budget: Bytes, as consolidate takes them.
        rate: Operations a second; 0 measures.
        output: Folder for the results.
    """

    plans: Annotated[tuple[str, ...], some_of(tuple(PLANS))] = tuple(PLANS)
    rank: Count = 64
    sequences: Count = 128
    length: Count = 512
    memory_budget: Count = 2**30
    rate: float = 0.0
    output: Folder = Path("results")


@dataclass(frozen=True)
class Plan:
    """What one decoder would take: numbers of operations, and of bytes."""

    name: str
    parameters: int  # their number
    plain: float  # a forward and backward pass over the data
    model: float  # the model's passes while a matrix is estimated
    factors: float  # sketches and Kronecker factors
    decompositions: float  # those of sketches and factors
    eigenvalues: float
    penalty: float  # the penalty's value and gradient
    step: float  # the rotations in an attached step
    weight_bytes: int  # parameters, or anchors
    snapshot_bytes: int  # anchors, bases, eigenvalues
    square_bytes: int  # what bases and eigenvalues would be without a rank
    factor_bytes: int  # all sketches and factors together
    rounds: int  # how often two passes go over the data so that the factors fit

    @property
    def consolidation(self) -> float:
        """All operations of a consolidation."""
        return self.model + self.factors + self.decompositions + self.eigenvalues


@dataclass(frozen=True)
class Matrix:
    """One weight: its sides, how many kept directions they have, and how it is used."""

    d_out: int
    d_in: int
    shares_input: bool = False  # whether the basis of its inputs is that of a layer before it
    words: bool = False  # whether the input side is words, which are looked up and have no basis
    tied: bool = False  # whether it is also the head's weight

    def ranks(self, rank: int) -> tuple[int, int]:
        """Kept directions of both sides; none where there is no basis."""
        return min(rank, self.d_out), 0 if self.words else min(rank, self.d_in)

    def sides(self) -> Iterator[int]:
        """Sizes of the sides that have a factor of their own."""
        yield self.d_out
        if not (self.words or self.shares_input):
            yield self.d_in


def matrices(decoder: Decoder) -> Iterator[Matrix]:
    """All weights of a decoder that have two sides."""
    yield Matrix(decoder.width, decoder.vocabulary, words=True, tied=decoder.tied)
    if not decoder.tied:
        yield Matrix(decoder.vocabulary, decoder.width)
    for _ in range(decoder.layers):
        for place, (d_out, d_in) in enumerate(decoder.matrices):
            # Keys and values have the input of queries, and one half of a gated layer the other's.
            yield Matrix(d_out, d_in, shares_input=place in (1, 2, 5))


def plan(name: str, decoder: Decoder, options: Options) -> Plan:
    """Count what a decoder takes."""
    every, k = list(matrices(decoder)), options.rank
    vectors = (2 * decoder.layers + 1) * decoder.width
    parameters = vectors + sum(m.d_out * m.d_in for m in every)
    tokens = options.sequences * options.length
    # Looking up takes nothing.
    multiplied = sum(m.d_out * m.d_in for m in every if m.tied or not m.words)
    factor_bytes = sum(_factor(d, k).most_bytes for m in every for d in m.sides())
    rounds = max(1, ceil(factor_bytes / options.memory_budget))
    stored = sum(_stored_numbers(m, k) for m in every)
    square = sum(_stored_numbers(m, max(m.d_out, m.d_in)) for m in every)
    thin = sum(sum(m.ranks(k)) * m.d_out * m.d_in for m in every)
    return Plan(
        name,
        parameters,
        plain=6.0 * tokens * multiplied,
        # Forward, and back to the layers' outputs; twice, if no batch is kept in between.
        model=2 * 4.0 * tokens * multiplied * rounds,
        factors=sum(_factor_work(m, options) for m in every),
        decompositions=sum(_factor(d, k).decomposition_cost for m in every for d in m.sides()),
        eigenvalues=sum(_eigenvalue_work(m, options) for m in every),
        penalty=4.0 * thin,
        step=8.0 * thin,
        weight_bytes=FLOAT * parameters,
        snapshot_bytes=FLOAT * (parameters + vectors + stored),
        square_bytes=FLOAT * (vectors + square),
        factor_bytes=factor_bytes,
        rounds=rounds,
    )


@lru_cache
def _factor(size: int, rank: int) -> "OuterProducts":
    """The factor of a side, or the sketch of it, as the package has it; without memory."""
    import torch

    from rotate_ewc.linalg.outer_products import OuterProducts
    from rotate_ewc.linalg.truncation import Truncation

    return OuterProducts(1, size, torch.empty(0, device="meta"), Truncation(rank))


def _stored_numbers(matrix: Matrix, rank: int) -> int:
    """Numbers of bases and eigenvalues."""
    k_out, k_in = matrix.ranks(rank)
    rows = k_out + (k_out < matrix.d_out)
    columns = matrix.d_in if matrix.words else k_in + (k_in < matrix.d_in)
    of_inputs = 0 if matrix.words or matrix.shares_input else matrix.d_in * k_in
    return matrix.d_out * k_out + of_inputs + rows * columns


def _factor_work(matrix: Matrix, options: Options) -> float:
    tokens = options.sequences * options.length
    found = 0.0
    for size in matrix.sides():
        form = _factor(size, options.rank).form_of_sum
        found += tokens * (4.0 * size * form.size if form.kind == "sketch" else size**2)
    if matrix.tied:
        # Inner products of output gradients, in place of products with all words.
        found += 2.0 * tokens * options.length * matrix.d_in
    return found


def _eigenvalue_work(matrix: Matrix, options: Options) -> float:
    """Of vectors in the bases, and of the inner products of what these leave."""
    tokens, length = options.sequences * options.length, options.length
    k_out, k_in = matrix.ranks(options.rank)
    if matrix.tied:
        return 2.0 * tokens * matrix.d_in * (k_out + min(2 * length, matrix.d_out))
    if matrix.words:
        return 2.0 * tokens * matrix.d_out * k_out
    whole = 2.0 * tokens * matrix.d_out * matrix.d_in
    whole += 2.0 * options.sequences * matrix.d_out * matrix.d_in * (k_out + k_in)
    rotated = 2.0 * tokens * (matrix.d_out * k_out + matrix.d_in * k_in)
    inner = 2.0 * tokens * length * (matrix.d_out + matrix.d_in + 2 * (k_out + k_in))
    return min(whole, rotated + inner + 2.0 * tokens * k_out * k_in)


def run(options: Options) -> int:
    """Measure the rate, and print a table of all plans."""
    from benchmarks.speed.measuring import product_rates

    make_folder(options.output)
    use_threads(1)
    rate = options.rate or 1e9 * max(product_rates(quick=False).values())
    results = options.output / f"{NAME}.json"
    plans = (plan(name, PLANS[name], options) for name in options.plans)
    found = keep(plans, results, {"format": FORMAT, "rate": rate})
    rows = [[label, *(form(one, rate) for one in found)] for label, form in _ROWS.items()]
    title = (
        f"rank {options.rank}, {options.sequences} sequences of {options.length} tokens, "
        f"{rate / 1e9:.0f} GFLOP/s"
    )
    print_table(title, [""], [one.name for one in found], rows)
    print(f"Wrote {results}.")
    return 0


Form = Callable[[Plan, float], str]  # of a plan, and of the rate


def _bytes(attribute: str) -> Form:
    return lambda plan, _: f"{getattr(plan, attribute) / GIB:.3g} GiB"


def _work(attribute: str) -> Form:
    def shown(plan: Plan, rate: float) -> str:
        work = getattr(plan, attribute)
        return f"{work / 1e12:.3g} TFLOP, {work / rate:.3g} s"

    return shown


_ROWS: dict[str, Form] = {
    "parameters": lambda plan, _: f"{plan.parameters / 1e6:.0f} million",
    "weights": _bytes("weight_bytes"),
    "bases and eigenvalues, full": _bytes("square_bytes"),
    "snapshot": _bytes("snapshot_bytes"),
    "factors": _bytes("factor_bytes"),
    "rounds": lambda plan, _: str(plan.rounds),
    "plain pass": _work("plain"),
    "consolidation": _work("consolidation"),
    "  the model": _work("model"),
    "  factors": _work("factors"),
    "  decompositions": _work("decompositions"),
    "  eigenvalues": _work("eigenvalues"),
    "  over the plain pass": lambda plan, _: f"{plan.consolidation / plan.plain:.2f}",
    "penalty": _work("penalty"),
    "attached step": _work("step"),
}
