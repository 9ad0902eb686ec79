"""What an estimate that would not come out again is told, and modules that forward reaches."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.estimation.repeatability import check_equal
from rotate_ewc.linalg.block import Block
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()
Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator).double() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    return x, torch.randint(3, (16,), generator=generator)


def exact_trace(model: nn.Module, data: Batch) -> float:
    """The trace of the mean loss's matrix of real labels, by a loop over examples in eval mode."""
    model.eval()
    total = 0.0
    for x, y in zip(*data, strict=True):
        loss = CE(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        total += sum(g.square().sum().item() for g in gradients)
    model.train()
    return total / len(data[0])


# --------------------------------------------------------------------------- random data


class Permuting:
    """Permutes the features in every epoch, by which no trace of a linear model changes."""

    def __iter__(self) -> Iterator[Batch]:
        x, y = batch()
        yield x[:, torch.randperm(4)], y


def test_a_loader_that_permutes_features_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.fill_(0.1)
    message = r"block of 'weight' have products .* differ by \d+ %; the model or the data .* random"
    with pytest.raises(ValueError, match=message):
        EKFACLinearOperator(
            model, CE, list(model.parameters()), Permuting(), fisher_type="type2", memory_budget=1
        )
    options: dict[str, Any] = {"check_deterministic": False}
    EKFACLinearOperator(model, CE, list(model.parameters()), Permuting(), **options)


def turned(block: Block, angle: float) -> Block:
    """Turn the first two eigenvectors of the activation side."""
    rotation = torch.eye(block.eigenvalues.shape[2], dtype=torch.float64)
    c, s = np.cos(angle), np.sin(angle)
    rotation[:2, :2] = torch.tensor([[c, -s], [s, c]])
    assert block.activation_basis is not None
    return Block(
        block.parameters, block.gradient_basis, block.activation_basis @ rotation, block.eigenvalues
    )


def test_equal_eigenvalues_may_turn_and_others_may_not() -> None:
    basis = torch.eye(3, dtype=torch.float64)[None]
    values = torch.tensor([[[2.0, 2.0, 1.0], [3.0, 3.0, 0.5]]], dtype=torch.float64)
    block = Block(("w",), None, basis, values)
    check_equal([block], [turned(block, 0.7)])
    values = values.clone()
    values[0, 0, 0] = 1.5
    block = block.with_eigenvalues(values)
    with pytest.raises(ValueError, match=r"block of 'w' have products"):
        check_equal([block], [turned(block, 0.7)])
    with pytest.raises(ValueError, match=r"have traces 11 and 22"):
        check_equal([block], [block.with_eigenvalues(2 * values)])
    with pytest.raises(ValueError, match=r"have blocks \['w'\] and \['v'\]"):
        check_equal([block], [Block(("v",), None, basis, values)])


def test_degenerate_eigenvalues_pass() -> None:
    """Inputs and gradients that are the same in all directions."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    x = torch.eye(4).double().repeat_interleave(3, 0)
    data = [(x, torch.arange(3).repeat(4))]
    for fisher_type in ("type2", "empirical"):
        operator = EKFACLinearOperator(
            model, CE, list(model.parameters()), data, fisher_type=fisher_type
        )
        # Of equal probabilities: |(x, 1)|² times the trace of diag(p) - ppᵀ.
        assert operator.trace.item() == pytest.approx(2 * 2 / 3)


# --------------------------------------------------------------------------- modules in eval mode

MODEL = network()


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.parts = {"model": [model]}

    def outputs(self, x: Tensor) -> Any:
        return self.parts["model"][0](x)

    def __call__(self, x: Tensor) -> Any:
        return self.outputs(x)


class Hiding(nn.Module):
    """Not registered, as a model that is to stay out of `parameters()` is hidden."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hidden = (model,)

    def forward(self, x: Tensor) -> Any:
        return self.hidden[0](x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def of_globals(x: Tensor) -> Any:
    return next(MODEL(each) for each in (x,))


def through_another(x: Tensor) -> Any:
    return of_globals(x)


def with_default(x: Tensor, *, model: nn.Module = MODEL) -> Any:
    return model(x)


FORWARDS: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "module": lambda model: model,
    "bound method": lambda model: model.forward,
    "partial": lambda model: functools.partial(lambda m, x: m(x), model),
    "partial keyword": lambda model: functools.partial(lambda x, m: m(x), m=model),
    "closure": lambda model: lambda x: model(x),
    "closure over a method": lambda model: (lambda f: lambda x: f(x))(model.forward),
    "trainer": lambda model: Trainer(model),
    "trainer's method": lambda model: Trainer(model).outputs,
    "hiding module": lambda model: Hiding(model),
    "decorated": lambda model: decorated(lambda x: model(x)),
    "functional_call": lambda model: (
        lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    ),
    "global": lambda model: of_globals,
    "global through another": lambda model: through_another,
    "default": lambda model: with_default,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_modules_that_forward_reaches_are_in_eval_mode(name: str) -> None:
    data = batch()
    forward = FORWARDS[name](MODEL)
    expected = exact_trace(MODEL, data)
    MODEL[1].train()
    params = list(MODEL.parameters())
    hiding = isinstance(forward, Hiding)
    operator = EKFACLinearOperator(
        forward if not hiding else lambda x: forward(x), CE, params, [data], fisher_type="empirical"
    )
    assert operator.trace.item() == pytest.approx(expected, rel=1e-12)
    assert MODEL[1].training
    assert MODEL.training


def test_a_discriminator_is_in_eval_mode_and_restored_after_a_failure() -> None:
    model, discriminator = nn.Linear(4, 4).double(), network()
    discriminator[2].eval()
    data = batch()
    penalty = exact_penalty(fisher_type="empirical")
    penalty.consolidate(model, CE, [data], forward=lambda x: discriminator(model(x)))
    expected = exact_penalty(fisher_type="empirical")
    discriminator.eval()
    expected.consolidate(model, CE, [data], forward=lambda x: discriminator(model(x)))
    # The weight of the task, its number of examples, is in the operator.
    traces = [p.terms[0].operator.trace.item() / 16 for p in (penalty, expected)]
    whole = exact_trace_of(model, discriminator, data)
    assert traces == [pytest.approx(whole, rel=1e-12)] * 2
    discriminator.train()
    discriminator[2].eval()

    def failing(x: Tensor) -> Tensor:
        assert not discriminator[1].training
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        penalty.consolidate(model, CE, [data], forward=failing)
    assert [m.training for m in discriminator.modules()] == [True, True, True, False, True]


def exact_trace_of(model: nn.Module, discriminator: nn.Module, data: Batch) -> float:
    total = 0.0
    for x, y in zip(*data, strict=True):
        gradients = torch.autograd.grad(
            CE(discriminator(model(x[None])), y[None]), list(model.parameters())
        )
        total += sum(g.square().sum().item() for g in gradients)
    return total / len(data[0])


# --------------------------------------------------------------------------- random models


def noisy(kind: str, model: nn.Module, calls: list[int]) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        calls.append(1)
        if kind == "torch":
            x = F.dropout(x, 0.5, training=True)
        elif kind == "numpy":
            x = x + np.random.rand()
        elif kind == "python":
            x = x + random.random()
        elif kind == "no effect":
            x = x + 0 * torch.rand(())
        return model(x)

    return forward


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_random_outputs_are_warned_of(kind: str) -> None:
    model, calls = network(), []
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    penalty = exact_penalty()
    with pytest.warns(RuntimeWarning, match=r"random: two runs .* training=self.training"):
        penalty.consolidate(model, CE, [batch(), batch(2)], forward=noisy(kind, model, calls))
    assert len(calls) == 3
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert model.training


@pytest.mark.parametrize(("kind", "runs"), [("none", 2), ("no effect", 3)])
def test_models_without_noise_are_not_warned_of(kind: str, runs: int) -> None:
    """And run no more often than before, unless they draw random numbers."""
    model, calls = network(), []
    exact_penalty().consolidate(model, CE, [batch(), batch(2)], forward=noisy(kind, model, calls))
    assert len(calls) == runs


def test_the_remedy_of_the_warning_works() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return F.dropout(self.layer(x), 0.5, training=self.training)

    torch.manual_seed(0)
    model = Noisy().double()
    data = batch()
    operator = EKFACLinearOperator(
        model, CE, list(model.parameters()), [data], fisher_type="empirical"
    )
    assert operator.trace.item() == pytest.approx(exact_trace(model, data), rel=1e-12)


def test_data_in_the_same_tensors_are_no_noise() -> None:
    model, calls = network(), []

    class Refilled:
        def __iter__(self) -> Iterator[Batch]:
            x, y = batch()
            yield x, y
            x.copy_(batch(2)[0])
            yield x, y

    forward = noisy("no effect", model, calls)
    exact_penalty().consolidate(model, CE, Refilled(), forward=forward)
    assert len(calls) > 2
