"""Settings that several visitors change at once, coming and going in every order."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rotate_ewc._utils import preserve_state
from rotate_ewc._utils.preserve_state import Setting, kept, undisturbed


def orders(visitors: int) -> Iterator[tuple[int, ...]]:
    """Every order of coming and going: each number comes first when it arrives, then leaves."""
    for order in set(permutations([*range(visitors)] * 2)):
        arrivals = list(dict.fromkeys(order))
        if arrivals == sorted(arrivals):
            yield order


ORDERS = sorted(orders(3))


def network() -> nn.Module:
    """Some modules in training mode, some parameters frozen."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def requires_grad(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def draw() -> None:
    random.random()
    torch.rand(3)
    np.random.rand(2)


def random_states() -> tuple[list[int], object, list[int]]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_orders() -> None:
    """One after another, inside each other, and crossing."""
    assert {(0, 0, 1, 1, 2, 2), (0, 1, 2, 2, 1, 0), (0, 1, 2, 0, 1, 2)} < set(ORDERS)
    assert len(ORDERS) == 15


@pytest.mark.parametrize("order", ORDERS)
def test_everything_is_as_it_was_when_all_have_left(order: Sequence[int]) -> None:
    """And while somebody is inside, as it needs it."""
    model = network()
    found = modes(model), requires_grad(model)
    drawn: object = None
    inside: dict[int, AbstractContextManager[None]] = {}
    for visitor in order:
        draw()
        if not inside:
            drawn = random_states()
        if visitor in inside:
            inside.pop(visitor).__exit__(None, None, None)
        else:
            inside[visitor] = undisturbed(model.modules(), model.parameters())
            inside[visitor].__enter__()
        if inside:
            assert not any(modes(model))
            assert all(requires_grad(model))
        else:
            assert (modes(model), requires_grad(model)) == found
            assert random_states() == drawn
    assert not preserve_state._VISITS


@pytest.mark.parametrize("order", ORDERS)
def test_visitors_with_only_some_in_common(order: Sequence[int]) -> None:
    """Each has two of three modules."""
    layers = [nn.Dropout(0.5) for _ in range(3)]
    models = [nn.Sequential(layers[i], layers[(i + 1) % 3]) for i in range(3)]
    inside: dict[int, AbstractContextManager[None]] = {}
    for visitor in order:
        if visitor in inside:
            inside.pop(visitor).__exit__(None, None, None)
        else:
            inside[visitor] = undisturbed(models[visitor].modules(), [])
            inside[visitor].__enter__()
        for index, layer in enumerate(layers):
            needed = any(who in inside for who in (index, (index - 1) % 3))
            assert layer.training is not needed
    assert not preserve_state._VISITS


def test_what_is_changed_inside_is_restored() -> None:
    """Also where a visit inside another one found something else than this one had made."""
    model = network()
    before = modes(model)
    with undisturbed(model.modules(), []):
        model.train()
        with undisturbed(model.modules(), []):
            assert not any(modes(model))
        assert all(modes(model))
    assert modes(model) == before


def test_a_setting_that_cannot_be_written() -> None:
    """Those that were changed before it are restored, and the visit has not begun."""
    values = SimpleNamespace(a=1, b=2)

    def refuse(value: int) -> None:
        raise RuntimeError("no")

    def setting(name: str) -> Setting:
        return Setting(
            name, lambda: getattr(values, name), lambda value: setattr(values, name, value), 7
        )

    fixed = Setting("b", lambda: values.b, refuse, 7)
    with pytest.raises(RuntimeError, match="no"), kept([setting("a"), fixed]):
        pytest.fail("must not come here")
    assert (values.a, values.b) == (1, 2)
    with kept([setting("a"), setting("b")]):
        assert (values.a, values.b) == (7, 7)
    assert (values.a, values.b) == (1, 2)
    assert not preserve_state._VISITS


def test_one_that_cannot_be_put_back_does_not_keep_the_others() -> None:
    values = SimpleNamespace(a=1)

    def refuse(value: int) -> None:
        if value == 2:
            raise RuntimeError("no way back")

    first = Setting("a", lambda: values.a, lambda value: setattr(values, "a", value), 7)
    stuck = Setting("b", lambda: 2, refuse, 7)
    with pytest.raises(RuntimeError, match="no way back"), kept([first, stuck]):
        assert values.a == 7
    assert values.a == 1
    assert not preserve_state._VISITS


def test_random_states_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not a dependency."""
    monkeypatch.delitem(sys.modules, "numpy")
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with undisturbed([], []):
        torch.rand(1), random.random()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_random_states_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that parameters are on, each once; an accelerator is only played here."""
    states = {0: torch.tensor([5]), 1: torch.tensor([6])}
    device = torch.device("cuda", 1)
    parameters = [SimpleNamespace(device=device, requires_grad=True)] * 2

    def write(state: Tensor, device: torch.device) -> None:
        states[device.index] = state

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", write)
    with undisturbed([], parameters):
        states[0], states[1] = torch.tensor([7]), torch.tensor([8])
    assert [int(states[index]) for index in (0, 1)] == [7, 6]
