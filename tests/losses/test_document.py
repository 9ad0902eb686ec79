"""The page on losses: its code runs, and its recipes are what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from tests.helpers.any_loss import gauss_newton
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import assert_close, parameter_shapes

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_code_runs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        namespace: dict[str, Any] = {}
        for block in blocks():
            exec(compile(block, str(PAGE), "exec"), namespace)
    assert len(blocks()) == 8
    assert namespace["penalty"].num_tasks == 1


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link


class Scores(nn.Module):
    """A score of a sequence; the margin of a pair is linear in it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layers = nn.Sequential(
                nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)
            ).double()

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        """Margins of pairs `[N, 2, 4]`."""
        scores = self.layers(pair).squeeze(2)
        return scores[:, 0] - scores[:, 1]


def test_preferences_have_the_matrix_of_their_loss() -> None:
    """Against the Hessian of `-log σ(β (m - r))`."""
    model, pairs, reference, beta = Scores(), seeded(5, 2, 4), seeded(5, seed=1), 0.7
    data = [
        ({"pair": p, "reference": r}, torch.ones(len(p)).double())
        for p, r in zip(pairs.split(2), reference.split(2), strict=True)
    ]
    params = dict(model.named_parameters())
    operator = EKFACLinearOperator(
        lambda batch: beta * (model(batch["pair"]) - batch["reference"]),
        nn.BCEWithLogitsLoss(),
        params,
        data,
        fisher_type="type2",
    )
    matrix = gauss_newton(model, lambda m, n: -F.logsigmoid(beta * (m - reference[n])).sum(), pairs)
    assert_exact_diagonal(operator, matrix / 5, parameter_shapes(model, params))


def test_a_policy_has_the_matrix_of_its_actions() -> None:
    """The exact mean over actions of `∇ log π ∇ log πᵀ`, one action after another."""
    model = nn.Linear(4, 3).double()
    states = seeded(5, 4)
    operator = EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [states], fisher_type="type2"
    )
    total = torch.zeros(())
    for state in states:
        probabilities = model(state).softmax(0).detach()
        for action in range(3):
            log_pi = model(state).log_softmax(0)[action]
            found = torch.autograd.grad(log_pi, list(model.parameters()))
            total = total + probabilities[action] * found[1].square().sum()
    (bias,) = (block for block in operator.blocks if block.label == "bias")
    assert_close(bias.trace, total / 5)
