"""Attached penalties with random operators: of any layout, with or without bases."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rotate_ewc import EKFACPenalty
from rotate_ewc.penalty.state import PenaltyState
from rotate_ewc.penalty.strength import FoundStrength
from rotate_ewc.penalty.terms import Term
from tests.helpers.dense_steps import CASES, advance, dense
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import flat, move
from tests.helpers.random_operators import RandomOperator, random_operators


class Bare(nn.Module):
    """Nothing but parameters."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))


def penalty_on(random: RandomOperator, model: nn.Module, strength: float) -> EKFACPenalty:
    """A penalty with a given operator, anchored where the model is."""
    penalty = exact_penalty(strength)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    term = Term(random.operator(), anchor, 1.0)
    state = PenaltyState({}, penalty.mode, penalty.weighting, (term,), 1, 1, 1.0, FoundStrength())
    penalty.load_state_dict(state.to_dict())
    return penalty


@settings(deadline=None, max_examples=60)
@given(random_operators(), st.floats(0, 1e6), st.sampled_from(sorted(CASES)), st.integers(0, 1000))
def test_any_operator(random: RandomOperator, strength: float, case: str, seed: int) -> None:
    model = Bare(random.shapes(), seed)
    penalty = penalty_on(random, model, strength)
    move(model, seed, scale=1.0)
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        expected = advance(oracle, [p.grad for p in model.parameters()], strength)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)
