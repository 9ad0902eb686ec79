"""Rows of words that no snapshot had are not rotated: every update against dense coordinates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from rotate_ewc import EKFACPenalty
from rotate_ewc.linalg.block import Block
from tests.helpers.dense_steps import CASES, advance, dense, draw, follow
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    Batches,
    consolidated,
    flat,
    flat_gradient,
    make,
    move,
    quadratic,
    task,
    thinned,
)


def block_of_words(penalty: EKFACPenalty) -> Block:
    (found,) = (s.block for s in penalty.stacks if s.names == ("0.weight",))
    return found


def words_in(*tasks: Batches) -> list[int]:
    return sorted(
        {int(word) for batches in tasks for inputs, _ in batches for word in inputs.flatten()}
    )


def grown(model: nn.Module, words: int) -> nn.Module:
    """The same model, with more words."""
    larger = copy.deepcopy(model)
    larger[0] = nn.Embedding(words, 3).double()
    with torch.no_grad():
        larger[0].weight[: len(model[0].weight)] = model[0].weight
    return larger


def test_only_words_of_the_snapshots_are_rotated() -> None:
    _, penalty = consolidated("words", 2, damping=0.03)
    found = block_of_words(penalty).rotated_inputs
    assert found is not None
    assert found.tolist() == words_in(task("words", 0, 9), task("words", 1, 10))


@pytest.mark.parametrize("case", ["adam", "adamw", "adam-decay", "sgd-nesterov", "nadam"])
@pytest.mark.parametrize("rank", [None, 2])
def test_steps_of_damped_penalties(rank: int | None, case: str) -> None:
    """The words that no snapshot had are pulled back too, all directions alike."""
    model, penalty = consolidated("words", 2, damping=0.03)
    if rank is not None:
        thinned(penalty, rank)
    follow(model, penalty, case, 2.5 / 10, steps=6)


@pytest.mark.parametrize("case", CASES)
def test_steps_of_tasks_with_few_words(case: str) -> None:
    """Words that neither a snapshot nor the new task has are at rest; others come in one by one."""
    model, penalty = consolidated("words", 1, damping=0.03)
    with torch.no_grad():
        model[0].weight.copy_(penalty.terms[0].anchor["0.weight"])
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model):
        for step in range(6):
            gradients = draw(model, step)
            absent = [word for word in range(20) if word not in (2, 4, 12, 13 + step % 2)]
            model[0].weight.grad[absent] = 0.0
            expected = advance(oracle, gradients, 2.5 / 9)
            optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)
    at_rest = (model[0].weight - penalty.terms[0].anchor["0.weight"]).abs().amax(1) == 0
    decays = bool(options.get("weight_decay"))
    assert int(at_rest.sum()) == (0 if decays else 15)


@pytest.mark.parametrize("rank", ["full", 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_eigenvalues_stay_equal_to_the_bit(dtype: torch.dtype, rank: Any) -> None:
    """However many tasks are merged; those that come in are rotated from then on."""
    model = make("words").to(dtype)
    penalty = EKFACPenalty(1.0, damping=0.03, rank=rank)
    for t in range(4):
        penalty.consolidate(model, CE, task("words", t, 9 + t))
        move(model, t)
        seen = words_in(*(task("words", s, 9 + s) for s in range(t + 1)))
        values = block_of_words(penalty).eigenvalues[0].mT
        others = [word for word in range(20) if word not in seen]
        assert all(len(set(values[word].tolist())) == 1 for word in others)
        assert all(len(set(values[word].tolist())) > 1 for word in seen)
        assert float(values[others].min()) > 0


@pytest.mark.parametrize("case", ["adam", "adamw"])
@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_vocabularies_that_grow(damping: float, case: str) -> None:
    """New words have the damping of one task, old ones that of two."""
    model, penalty = consolidated("words", 1, damping=damping)
    larger = grown(model, 26)
    penalty.consolidate(larger, CE, [(x + 15, y) for x, y in task("words", 1, 10)])
    move(larger, 1)
    assert block_of_words(penalty).shape == (1, 3, 26)
    assert block_of_words(penalty).rotated_inputs is not None
    follow(larger, penalty, case, 2.5 / 10, steps=5)


def test_words_that_come_in_with_a_later_task() -> None:
    """A consolidation changes the basis of all, and the optimizer's averages start again."""
    model, penalty = consolidated("words", 1)
    kind, options = CASES["adam"]
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model):
        for seeds in ((1,), (2, 3, 4, 5, 6)):
            oracle, start = dense(penalty, model, kind, options), flat(model)
            scale = 2.5 / (9 if penalty.num_tasks == 1 else 10)
            for step in range(4):
                expected = advance(oracle, draw(model, step), scale)
                optimizer.step()
            assert_close(flat(model) - start, expected - start, 1e-9)
            for seed in seeds:
                data = [(x + 3 * seed % 16, y) for x, y in task("words", 0, 10)]
                penalty.consolidate(model, CE, data)
    assert block_of_words(penalty).rotated_inputs is None  # nearly all words have come in


def test_without_damping_their_steps_are_the_optimizers_own() -> None:
    """At any strength, to the bit, and however small a gradient is in comparison with others."""
    model, penalty = consolidated("words", 1, strength=1e9)
    model, penalty = model.float(), penalty.float()
    twin = copy.deepcopy(model)
    optimizer, reference = (Adam(net.parameters(), lr=0.01) for net in (model, twin))
    with penalty.attach(optimizer, model):
        for step in range(5):
            for net, stepped in ((model, optimizer), (twin, reference)):
                draw(net, step)
                net[0].weight.grad[11] *= 1e-12
                stepped.step()
    others = [word for word in range(20) if word not in words_in(task("words", 0, 9))]
    # The optimizer steps the distance from the anchor there, not the weights themselves.
    torch.testing.assert_close(model[0].weight[others], twin[0].weight[others], rtol=0, atol=1e-6)
    assert (model[0].weight - twin[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("damping", [0.0, 0.03])
@pytest.mark.parametrize("update", ["gradient", "tangent"])
def test_updates_that_add_gradients(update: str, damping: float) -> None:
    model, penalty = consolidated("words", 1, damping=damping)
    scale, rate = 2.5 / 9, 0.05
    term = quadratic(penalty, model, 1.0)
    theta = flat(model)
    plane = term.matrix @ (theta - term.anchor)
    eye = torch.eye(len(theta), dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=rate)
    with penalty.attach(optimizer, model, update):
        for step in range(3):
            gradient = torch.cat([g.flatten() for g in draw(model, step)])
            moved = -rate * (gradient + scale * plane)
            if update == "tangent":
                change = torch.linalg.solve(eye + rate * scale * term.matrix, term.matrix @ moved)
                theta, plane = theta + moved - rate * scale * change, plane + change
            else:
                theta = theta + moved
                plane = term.matrix @ (theta - term.anchor)
            optimizer.step()
    assert_close(flat(model), theta)


def test_resumed_runs_end_in_the_same_bits(tmp_path: Any) -> None:
    def train(model: nn.Module, optimizer: Adam, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x, y = task("words", step)[0]
            CE(model(x), y).backward()
            optimizer.step()

    model, penalty = consolidated("words", 2, "auto", damping=0.03)
    optimizer = Adam(model.parameters(), lr=0.01)
    handle = penalty.attach(optimizer, model)
    train(model, optimizer, range(8))
    penalty.save(tmp_path / "penalty.safetensors")
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, handle)]
    train(model, optimizer, range(8, 16))
    other = make("words", 1)
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors")
    optimizer = Adam(other.parameters(), lr=0.01)
    resumed = loaded.attach(optimizer, other)
    for part, state in zip((other, optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, optimizer, range(8, 16))
    assert torch.equal(flat(other), flat(model))


def test_first_used_in_inference_mode() -> None:
    """What is found there serves outside of it too."""
    model, penalty = consolidated("words", 1)
    form = quadratic(penalty, model, 2.5 / 9)
    vars(block_of_words(penalty)).pop("rotated_inputs")
    with torch.inference_mode():
        assert_close(penalty(model), form.value(flat(model)))
    penalty(model).backward()
    assert_close(flat_gradient(model), form.gradient(flat(model)))


class Tied(nn.Module):
    """A head whose weight is that of the word embeddings: no word is without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.words(tokens).mean(1).tanh(), self.words.weight)


def test_tied_heads_see_every_word() -> None:
    torch.manual_seed(0)
    model, penalty = Tied().double(), exact_penalty()
    penalty.consolidate(model, CE, task("words", 0, 9))
    (stack,) = penalty.stacks
    assert stack.block.rotated_inputs is None
