"""Names of parameters: without the wrappers around a model's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc._utils.messages import left_out, listed, parameters_are
from rotate_ewc._utils.parameters import named_parameters
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import flat

CE = nn.CrossEntropyLoss()

# Torch's compiler warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """One of its parts has a name that wrappers use too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.submodule = nn.Linear(4, 5)
        self.module = nn.Sequential(nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.module(self.submodule(x)))
        return hidden


NAMES = [name for name, _ in Net().named_parameters()]


def data(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator)
    return [(x, torch.randint(3, (6,), generator=generator))]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def regionally(model: Net) -> nn.Module:
    model.head = compiled(model.head)
    model.module[1] = compiled(model.module[1])
    return model


def replicated_in_part(model: Net) -> nn.Module:
    model.module = nn.DataParallel(compiled(model.module))  # type: ignore[assignment]
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "compiled": compiled,
    "regionally": regionally,
    "compiled twice": lambda model: compiled(regionally(model)),
    "replicated": nn.DataParallel,
    "replicated and compiled": lambda model: nn.DataParallel(compiled(regionally(model))),
    "replicated in part": replicated_in_part,
    "averaged": AveragedModel,
    "averaged in part": lambda model: AveragedModel(regionally(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Any], nn.Module]:
    torch._dynamo.reset()
    return WRAPPERS[request.param]


def test_names(wrap: Callable[[Any], nn.Module]) -> None:
    model = wrap(Net())
    assert list(named_parameters(model)) == NAMES
    given = [p for _, p in model.named_parameters()]
    assert all(a is b for a, b in zip(named_parameters(model).values(), given, strict=True))


def test_operators(wrap: Callable[[Any], nn.Module]) -> None:
    """A list and a dictionary, and a function of the same parameters, have the same names."""
    model = wrap(Net())
    expected = EKFACLinearOperator(plain := Net(), CE, list(plain.parameters()), data())
    for params in (list(model.parameters()), dict(model.named_parameters())):
        found = EKFACLinearOperator(model, CE, params, data())
        assert list(found.parameter_shapes) == NAMES
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(merge([found, expected]).trace, merge([expected, expected]).trace)


def test_snapshots_fit_with_and_without_wrappers(wrap: Callable[[Any], nn.Module]) -> None:
    for first, second in ((Net(), wrap(Net())), (wrap(Net()), Net())):
        penalty = exact_penalty()
        penalty.consolidate(first, CE, data())
        loaded = exact_penalty()
        loaded.load_state_dict(penalty.state_dict())
        loaded.consolidate(second, CE, data(1))
        assert list(loaded.terms[0].anchor) == NAMES
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(0.1)
        value = loaded(second)
        assert value > 0
        assert torch.equal(value, loaded(named_parameters(second)))
        value.backward()
        before = flat(second)
        for update in ("rotated", "tangent", "gradient"):
            optimizer = torch.optim.Adam(second.parameters(), lr=0.1)
            with loaded.attach(optimizer, second, update):
                optimizer.step()
            assert not torch.equal(flat(second), before)
            before = flat(second)


def test_patterns_see_plain_names(wrap: Callable[[Any], nn.Module]) -> None:
    model = wrap(Net())
    penalty = exact_penalty(include=["head.*", "submodule.*"], exclude=["*.bias"])
    penalty.consolidate(model, CE, data())
    assert list(penalty.terms[0].anchor) == ["submodule.weight", "head.weight"]


def test_names_and_patterns_that_were_read_off_a_compiled_model() -> None:
    model = regionally(Net())
    penalty = exact_penalty(include=["head._orig_mod.*"])
    penalty.consolidate(model, CE, data())
    assert list(penalty.terms[0].anchor) == ["head.weight", "head.bias"]
    assert penalty(dict(model.named_parameters())) == penalty(model)
    params = {f"head._orig_mod.{n}": p for n, p in Net().head.named_parameters()}
    with pytest.raises(ValueError, match=r"differ only in '_orig_mod'"):
        EKFACLinearOperator(model, CE, {**params, "head.weight": model.head.weight}, data())


def test_messages_have_plain_names() -> None:
    model = regionally(Net())
    penalty = exact_penalty()
    penalty.consolidate(model, CE, data())
    del model.head._orig_mod.bias
    with pytest.raises(ValueError, match=r"parameter 'head\.bias' is protected by the penalty"):
        penalty(model)


def test_many_names_are_shortened() -> None:
    names = [f"layer{i}" for i in range(13)]
    assert listed(["a", "b"]) == "a, b"
    assert parameters_are(["a"]) == "parameter 'a' is"
    assert parameters_are(names[:2]) == "parameters 'layer0', 'layer1' are"
    assert parameters_are(names).endswith("'layer9' and 3 more are")
    assert left_out(["a"]) == "leave it out (params, or exclude=['a'])"
    assert left_out(names[:2]) == "leave them out (params, or exclude=['layer0', 'layer1'])"
    assert left_out(names) == "leave them out (params, or exclude)"
