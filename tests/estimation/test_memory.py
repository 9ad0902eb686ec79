"""The peak memory of estimation is bounded by `memory_budget`, whatever the batch size.

What estimation needs beyond its budget is what nobody can do without: the model's own forward and
backward pass over one batch with the gradients at the outputs of all layers, and the operator
itself with the sums that it is made of. Everything else (kernel windows, rotated copies,
per-example gradients, batches kept for the second pass, gradients of further label vectors)
must fit in the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrizations import weight_norm

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.linalg import eigenvalues
from tests.helpers.memory import peak_bytes

MIB = 2**20
UNLIMITED = 2**40
NUM_BATCHES = 2
Batch = tuple[Tensor, Tensor]


class TokenModel(nn.Module):
    """Two linear layers over tokens, and a mean: many positions share a weight."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, features)
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)).mean(dim=1))


class TiedLanguageModel(nn.Module):
    """Tokens in, a prediction for every token out, with one matrix for both."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.hidden = nn.Linear(features, features)
        self.output = nn.Linear(features, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(x)))).transpose(1, 2)


class LanguageModel(nn.Module):
    """Tokens in, one prediction out, through an embedding and a normalisation."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)).tanh().mean(dim=1))


def mlp(classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, classes)
    )


def computed_weights() -> nn.Module:
    """Weights made of a length and a direction for every row."""
    return nn.Sequential(
        weight_norm(nn.Linear(48, 64)), nn.Tanh(), weight_norm(nn.Linear(64, 32)), nn.Linear(32, 4)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@dataclass(frozen=True)
class Case:
    """A model, what it eats, and how its operator is estimated.

    Attributes:
        build: Makes the model.
        shape: Shape of one input.
        batch_size: The smaller of the two batch sizes.
        memory_budget: The budget that is to be kept, in bytes.
        classes: Number of classes.
        vocabulary: If inputs are integers, their number; 0 for numbers in general.
        target_shape: Shape of one target.
        options: Arguments of the operator.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    memory_budget: int
    classes: int = 4
    vocabulary: int = 0
    target_shape: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def data(self, batch_size: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(NUM_BATCHES):
            inputs = torch.randn(batch_size, *self.shape, generator=generator)
            if self.vocabulary:
                inputs = torch.randint(self.vocabulary, inputs.shape, generator=generator)
            shape = (batch_size, *self.target_shape)
            batches.append((inputs, torch.randint(self.classes, shape, generator=generator)))
        return batches


EMPIRICAL = {"fisher_type": "empirical"}
JOINT = {**EMPIRICAL, "separate_weight_and_bias": False}
REDUCED = {**EMPIRICAL, "kfac_approx": "reduce"}
CASES = {
    "mlp": Case(mlp, (48,), 512, 2 * MIB, options=EMPIRICAL),
    "mlp joint": Case(mlp, (48,), 512, 2 * MIB, options=JOINT),
    "many classes": Case(
        partial(mlp, classes=40), (48,), 32, 4 * MIB, classes=40, options={"fisher_type": "type2"}
    ),
    "many samples": Case(mlp, (48,), 32, 4 * MIB, options={"fisher_type": "mc", "mc_samples": 40}),
    "windows": Case(convolutions, (8, 8, 8), 16, 3 * MIB // 2, options=EMPIRICAL),
    "windows joint": Case(convolutions, (8, 8, 8), 16, 2 * MIB, options=JOINT),
    "windows reduced": Case(convolutions, (8, 8, 8), 16, 3 * MIB // 2, options=REDUCED),
    "few positions": Case(partial(TokenModel, 64), (4, 64), 128, 2 * MIB, options=EMPIRICAL),
    "some positions": Case(partial(TokenModel, 256), (5, 256), 32, 12 * MIB, options=EMPIRICAL),
    "many positions": Case(partial(TokenModel, 32), (64, 32), 64, 2 * MIB, options=EMPIRICAL),
    "embedding": Case(
        partial(LanguageModel, 200, 32), (32,), 128, 3 * MIB, vocabulary=200, options=EMPIRICAL
    ),
    "tied embedding": Case(
        partial(TiedLanguageModel, 256, 8),
        (8,),
        64,
        2 * MIB,
        classes=256,
        vocabulary=256,
        target_shape=(8,),
        options=EMPIRICAL,
    ),
    "computed weights": Case(computed_weights, (48,), 32, 2 * MIB, options=EMPIRICAL),
}
CASES["tied embedding sampled"] = replace(CASES["tied embedding"], options={"fisher_type": "mc"})


@pytest.fixture(autouse=True)
def only_the_budget_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is cut into small pieces for the sake of speed, too, which would hide what is tested."""
    monkeypatch.setattr(eigenvalues, "_CHUNK_BYTES_CPU", UNLIMITED)


def own_passes(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The model's forward and backward pass, keeping the gradient at every layer's output."""
    # Edges, because a list of the outputs would keep them all, and make the bound a loose one.
    edges: list[GradientEdge] = []
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    hooks = [
        layer.register_forward_hook(lambda _, args, output: edges.append(get_gradient_edge(output)))
        for layer in layers
    ]
    try:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        # Further label vectors go through the same graph, so it is not freed along the way.
        return torch.autograd.grad(loss, edges, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()


def static_bytes(operator: EKFACLinearOperator) -> int:
    """The operator and the sums it is made of, twice: decomposing a matrix takes some more."""
    total = 0
    for block in operator.blocks:
        bases = [block.gradient_basis, block.activation_basis]
        total += block.eigenvalues.nbytes
        total += 2 * sum(basis.nbytes for basis in bases if basis is not None)
    return 2 * total


def excess_bytes(case: Case, batch_size: int, memory_budget: int, **options: Any) -> int:
    """Return how much more estimation needs than what nobody can do without."""
    torch.manual_seed(0)
    model, data = case.build(), case.data(batch_size)
    operators: list[EKFACLinearOperator] = []

    def estimate() -> None:
        settings = {"check_deterministic": False, **case.options, **options}
        operators.append(
            EKFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                list(model.parameters()),
                data,
                memory_budget=memory_budget,
                **settings,
            )
        )

    own = peak_bytes(lambda: own_passes(model, *data[0]))
    return peak_bytes(estimate) - own - static_bytes(operators[0])


@pytest.mark.parametrize("name", CASES)
def test_peak_is_bounded_by_the_budget(name: str) -> None:
    case = CASES[name]
    excess = excess_bytes(case, 8 * case.batch_size, case.memory_budget)
    assert excess <= case.memory_budget


@pytest.mark.parametrize("name", CASES)
def test_unlimited_memory_would_exceed_the_budget_several_times(name: str) -> None:
    case = CASES[name]
    assert excess_bytes(case, 8 * case.batch_size, UNLIMITED) > 2 * case.memory_budget


def test_speed_asks_for_small_pieces_whatever_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["windows"]
    whole = excess_bytes(case, 8 * case.batch_size, UNLIMITED)
    monkeypatch.setattr(eigenvalues, "_CHUNK_BYTES_CPU", case.memory_budget // 8)
    assert excess_bytes(case, 8 * case.batch_size, UNLIMITED) < 0.5 * whole


@pytest.mark.parametrize("budget", [3 * MIB, 5 * MIB, 8 * MIB])
def test_other_budgets(budget: int) -> None:
    """Among them are such that what some batches show fits and that of all does not."""
    case = CASES["windows"]
    assert excess_bytes(case, 8 * case.batch_size, budget) <= budget


def test_checking_for_randomness_needs_no_more() -> None:
    case = CASES["mlp"]
    excess = excess_bytes(case, 8 * case.batch_size, case.memory_budget, check_deterministic=True)
    assert excess <= case.memory_budget


def test_inputs_that_are_slices_are_counted_whole() -> None:
    """Keeping the first token of a sequence keeps the sequence."""

    class FirstToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x)[:, 0])

    case = Case(FirstToken, (64, 16), 512, MIB, options=EMPIRICAL)
    assert excess_bytes(case, case.batch_size, case.memory_budget) <= case.memory_budget


def test_peak_of_a_call() -> None:
    """The measure itself: what lives at the same time is added, what came before is not."""
    before = torch.ones(MIB)

    def three_at_once() -> Tensor:
        first = torch.ones(MIB)
        second = first + before
        del first
        # The rows of a transposed matrix are copied inside of the operation.
        return second.view(2, -1).mT.reshape(-1) + second

    assert abs(peak_bytes(three_at_once) - 3 * before.nbytes) < 1000
    assert peak_bytes(lambda: before.view(2, -1).mT) < 1000
