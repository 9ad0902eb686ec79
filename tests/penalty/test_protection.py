"""What is protected of a model: which slices, by which names, and what is told of the rest."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.protection import Protection
from rotate_ewc.penalty.terms import Stack


def stack(number: int, **anchors: Sequence[Tensor]) -> Stack:
    """A stack of parameters by name (`_` is a dot), and their anchors of all terms."""
    names = tuple(name.replace("_", ".") for name in anchors)
    keys = tuple(f"{number}/{name}" for name in names)
    block = Block(keys, None, None, torch.ones(1, 1, 1))
    return Stack(names, block, tuple(torch.stack([*each]) for each in anchors.values()))


def rows(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def messages(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught]


# --- what is found ---


def test_slices_by_the_names_of_the_stacks() -> None:
    """A name may be in several stacks; whole parameters are not cut at all."""
    weight, bias = rows(1.0, 2.0, 3.0), rows(4.0)
    stacks = [
        stack(0, a_weight=[rows(1.0, 2.0)], a_bias=[rows(4.0)]),
        stack(1, a_weight=[rows(1.0, 2.0, 3.0)]),
    ]
    parameters = {"a.weight": weight, "a.bias": bias, "other": rows(0.0)}
    found = Protection().find(stacks, parameters, strict=True)
    assert list(found) == ["0/a.weight", "0/a.bias", "1/a.weight"]
    assert torch.equal(found["0/a.weight"], weight[:2])
    assert found["0/a.bias"] is bias
    assert found["1/a.weight"] is weight


def test_all_that_must_be_there_and_is_not_is_told() -> None:
    """Also what comes after the first that is missing; what fits is not named."""
    stacks = [
        stack(0, a=[rows(0.0, 0.0)], b=[rows(0.0)]),
        stack(1, c=[rows(0.0, 0.0)], d=[rows(0.0)]),
    ]
    with pytest.raises(ValueError, match="protected") as raised:
        Protection().find(stacks, {"b": rows(0.0), "c": rows(0.0)}, strict=True)
    assert str(raised.value) == (
        "parameters 'a', 'd' are protected by the penalty, but the model has no such parameter; "
        "expected the model that was consolidated, or one grown from it (strict=False leaves such "
        "parameters out); parameter 'c' has shape [1, 1], but the penalty protects [2, 1]; "
        "expected at least that size along every axis (strict=False leaves such parameters out)"
    )
    assert raised.value.__suppress_context__


def test_what_need_not_be_there_is_not_named_beside_an_error() -> None:
    stacks = [stack(0, a=[rows(0.0)], b=[rows(0.0)], c=[rows(0.0).to("meta")])]
    with pytest.raises(ValueError, match="meta") as raised:
        Protection().find(stacks, {"b": rows(0.0), "c": rows(0.0)}, strict=False)
    assert str(raised.value) == (
        "parameter 'c' is on cpu, but the penalty on meta; call penalty.to('cpu')"
    )


def test_what_is_left_out_is_told_once_in_order_and_the_rest_is_found() -> None:
    protection = Protection()
    stacks = [
        stack(0, c=[rows(0.0)], b=[rows(0.0, 0.0)], a=[rows(1.0)]),
        stack(1, d=[rows(0.0)]),
    ]
    parameters = {"b": rows(0.0), "a": rows(1.0), "d": rows(0.0)}
    with pytest.warns(UserWarning, match="missing") as caught:
        found = protection.find(stacks, parameters, strict=False)
    assert list(found) == ["0/a", "1/d"]
    assert messages(caught) == [
        "parameters 'b', 'c' are missing in the model, or smaller than when consolidated, and not "
        "protected any more (strict=False)"
    ]
    protection.find(stacks, parameters, strict=False)
    del parameters["d"]
    with pytest.warns(UserWarning, match="missing") as caught:
        protection.find(stacks, parameters, strict=False)
    assert [message.split("'")[1] for message in messages(caught)] == ["d"]


# --- layers that have grown ---


def told(stacks: Sequence[Stack], protection: Protection | None = None, **now: Tensor) -> list[str]:
    """Which layers are told to have been replaced."""
    parameters = {name.replace("_", "."): tensor for name, tensor in now.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (protection or Protection()).find(stacks, parameters, strict=True)
    found = [re.split(r" ha(?:s|ve) grown, ", message) for message in messages(caught)]
    assert all(
        rest == "but not from the values that were consolidated, as if a new layer had taken the "
        "name; the penalty pulls that part to the old values. Copy these into it, as Avalanche's "
        "IncrementalClassifier does, or give the new layer another name (and strict=False, which "
        "leaves out the old one)"
        for _, rest in found
    )
    return [re.sub(r"^parameters? ", "", names) for names, _ in found]


def test_distance_at_which_a_layer_is_another_one() -> None:
    """More than half the sum of both squared norms."""
    anchor = [stack(0, a=[rows(3.0)])]
    # (x - 3)² > ½ (x² + 9) outside of 6 ± √27.
    for number, expected in (
        (3.0, []),
        (0.81, []),
        (0.80, ["'a'"]),
        (-3.0, ["'a'"]),
        (11.19, []),
        (11.20, ["'a'"]),
    ):
        assert told(anchor, a=rows(number, 0.0)) == expected
    exactly_half = [stack(0, a=[rows(1.0, 1.0, 1.0, 1.0)])]
    assert told(exactly_half, a=rows(1.0, 1.0, 1.0, -1.0, 0.0)) == []


def test_parameters_of_a_layer_are_looked_at_together() -> None:
    """By the last dot of their names; numbers are compared with those of the latest term."""
    stacks = [
        stack(0, x_a_weight=[rows(9.0), rows(3.0)], x_a_bias=[rows(9.0), rows(1.0)]),
        stack(1, x_b_weight=[rows(2.0)]),
        stack(2, y_weight=[rows(2.0)], y_bias=[rows(5.0)]),
    ]
    grown = {
        "x_a_weight": rows(3.0, 0.0),
        "x_a_bias": rows(-1.0, 0.0),
        "x_b_weight": rows(-2.0, 0.0),
        "y_weight": rows(-2.0, 0.0),
        "y_bias": rows(5.1, 0.0),
    }
    # One alone would be told in `x.a` and in `y`, but not both together.
    assert told(stacks, **grown) == ["'x.b.weight'"]
    grown["y_bias"] = rows(1.0, 0.0)
    assert told(stacks, **grown) == ["'x.b.weight'", "'y.weight', 'y.bias'"]
    # Only what has grown counts, not the rest of its layer.
    grown["y_bias"] = rows(5.0)
    assert told(stacks, **grown) == ["'x.b.weight'", "'y.weight'"]


def test_each_size_of_each_parameter_is_looked_at_once() -> None:
    protection, stacks = Protection(), [stack(0, a=[rows(1.0)], b=[rows(1.0)])]
    new, longer, same = rows(-1.0, 0.0), rows(-1.0, 0.0, 0.0), rows(1.0)
    assert told(stacks, protection, a=new, b=same) == ["'a'"]
    assert told(stacks, protection, a=new, b=same) == []
    assert told(stacks, protection, a=longer, b=new) == ["'a', 'b'"]
    assert told(stacks, protection, a=longer, b=new) == []


def test_precision_in_which_layers_are_compared() -> None:
    """Squares of numbers in half precision, which it cannot hold."""
    large = torch.full((1, 1), 300.0, dtype=torch.float16)
    anchor = [stack(0, a=[large])]
    assert told(anchor, a=torch.cat([large, large])) == []
    assert told(anchor, a=torch.cat([-large, large]).requires_grad_()) == ["'a'"]


# --- parameters that are spread over processes ---


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("_one_process")
def test_spread_parameters_are_gathered_where_they_are_protected() -> None:
    mesh = init_device_mesh("cpu", (1,))
    numbers = rows(1.0, 2.0, 3.0)
    spread = {
        name: distribute_tensor(numbers, mesh, [Shard(0)]).requires_grad_()
        for name in ("a", "b", "other")
    }
    stacks = [stack(0, a=[rows(1.0, 2.0)]), stack(1, b=[rows(1.0, 2.0, 3.0)], plain=[rows(5.0)])]
    parameters = {**spread, "plain": rows(5.0)}
    given = dict(parameters)
    found = Protection().find(stacks, parameters, strict=True)
    assert {type(tensor) for tensor in found.values()} == {Tensor}
    assert torch.equal(found["0/a"], numbers[:2])
    assert torch.equal(found["1/b"], numbers)
    assert found["1/plain"] is parameters["plain"]
    assert all(parameters[name] is tensor for name, tensor in given.items())
    found["0/a"].square().sum().backward()
    gradient = spread["a"].grad
    assert gradient is not None
    assert torch.equal(gradient.full_tensor(), rows(2.0, 4.0, 0.0))
    del parameters["a"]
    with pytest.raises(ValueError, match="parameter 'a' is protected by the penalty, but the"):
        Protection().find(stacks, parameters, strict=True)
