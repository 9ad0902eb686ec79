"""Attached to a module with other names: it is refused, and the advice works."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotate_ewc import Attachment
from tests.helpers.dense_steps import draw
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE, consolidated, flat, make, task


class Wrapper(nn.Module):
    """Has a network as its part."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs


def advice(message: str) -> str:
    """The code at the end of a message."""
    found = re.search(r"penalty\.attach\(.*\)", message)
    assert found is not None, message
    return found[0]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "attribute": Wrapper,
    "index": nn.Sequential,
    "attribute of an item": lambda net: nn.Sequential(nn.Identity(), Wrapper(net)),
    "parallel": lambda net: nn.DataParallel(Wrapper(net)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_refused_at_once(name: str) -> None:
    net, penalty = consolidated("plain", 1)
    model = WRAPPERS[name](net)
    optimizer = Adam(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter of these names") as caught:
        penalty.attach(optimizer, model)
    message = str(caught.value)
    assert "protects '0.weight', '0.bias', '2.weight' and 1 more" in message
    assert re.search(r"its own are '[\w.]+\.0\.weight', '[\w.]+\.0\.bias', '[\w.]+\.2\.w", message)
    assert not optimizer._optimizer_step_pre_hooks
    handle = eval(advice(message), {"penalty": penalty, "optimizer": optimizer, "model": model})
    assert handle.model is net
    draw(net, 0)
    before = flat(net)
    optimizer.step()
    assert not torch.equal(flat(net), before)


def test_parts_of_what_was_consolidated_are_refused_at_once() -> None:
    model = Wrapper(make("plain"))
    penalty = exact_penalty(2.5)
    penalty.consolidate(model, CE, task("plain", 0))
    with pytest.raises(ValueError, match=r"its own are '0\.weight'.*the module that was consol"):
        penalty.attach(Adam(model.parameters()), model.net)
    penalty.attach(Adam(model.parameters()), model)


def test_closest_names_are_told() -> None:
    """Of a network with many others before them."""
    _, penalty = consolidated("plain", 1)
    layers = {f"layer{i}": nn.Linear(2, 2) for i in range(9)}
    model = nn.ModuleDict({**layers, "head": nn.Sequential(nn.Linear(4, 5))})
    with pytest.raises(ValueError, match=r"its own are 'head\.0\.weight', 'head\.0\.bias'"):
        penalty.attach(Adam(model.parameters()), model)


def test_attached_before_another_module_is_consolidated() -> None:
    """Then it is the step that is refused."""
    model, penalty = Wrapper(make("plain")), exact_penalty(2.5)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    optimizer.step()
    penalty.consolidate(model.net, CE, task("plain", 0))
    before = flat(model)
    with pytest.raises(ValueError, match="no parameter of these names") as caught:
        optimizer.step()
    assert torch.equal(flat(model), before)
    first, then = str(caught.value).split(" Then attach ")
    scope = {"penalty": penalty, "optimizer": optimizer, "model": model, "Attachment": Attachment}
    exec(first.rsplit("are ", 1)[1].split(". ", 1)[1].rstrip("."), scope)
    eval(advice(then), scope)
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_parameters_that_the_optimizer_lacks_can_be_added() -> None:
    model, penalty = consolidated("plain", 1)
    head = nn.Linear(3, 2).double()
    whole = nn.Sequential(*model, head)
    optimizer = Adam(head.parameters(), lr=0.1)
    penalty.attach(optimizer, whole)
    draw(whole, 0)
    with pytest.raises(ValueError, match=r"the optimizer has none .*optimizer\.add_param_group"):
        optimizer.step()
    optimizer.add_param_group({"params": model.parameters()})
    before = flat(model)
    optimizer.step()
    assert not torch.equal(flat(model), before)
