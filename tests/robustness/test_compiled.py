"""Compiled models: estimated as they were written, with nothing compiled for it or after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Torch's compiler warns of what it does itself.
    pytest.mark.skipif(
        not hasattr(torch.compiler, "set_stance"), reason="torch has it from 2.6 on"
    ),
]


class Counter:
    """A compiler that changes nothing, and counts its calls."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compilations += 1
        forward: Callable[..., Any] = graph.forward
        return forward


def net() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), inner, nn.Linear(6, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(2)
    ]


def whole(model: nn.Sequential, backend: Counter) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Sequential, backend: Counter) -> Any:
    model.compile(backend=backend)
    return model


def regional(model: nn.Sequential, backend: Counter) -> Any:
    model[2] = torch.compile(model[2], backend=backend)
    return model


def function(model: nn.Sequential, backend: Counter) -> Any:
    return torch.compile(lambda x: model(x), backend=backend)


def same(state: dict[str, Any], other: dict[str, Any]) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k]
        for k, v in state.items()
    )


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("how", [whole, in_place, regional, function])
def test_same_bits_and_no_compilation(
    how: Callable[[nn.Sequential, Counter], Any], warm: bool
) -> None:
    torch._dynamo.reset()
    counter, model = Counter(), net()
    compiled = how(model, counter)

    def use() -> None:
        for training in (True, False):
            model.train(training)
            compiled(data()[0][0]).sum().backward()

    if warm:
        use()
    plain = net()
    plain.load_state_dict(
        {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    )
    expected = EKFACLinearOperator(plain, CE, list(plain.parameters()), data())
    model.eval()
    before = counter.compilations
    params = dict(model.named_parameters())
    found = EKFACLinearOperator(compiled, CE, params, data())
    penalty = exact_penalty()
    penalty.consolidate(model, CE, data(), forward=compiled)
    assert counter.compilations == before
    assert same(found.state_dict(), expected.state_dict())
    assert float(penalty.terms[0].operator.trace) > 0
    use()
    assert (counter.compilations > before) is not warm


class Slow:
    """Batches that come slowly."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data():
            time.sleep(self.seconds)
            yield batch


@pytest.mark.parametrize("seconds", [(0.02, 0.1), (0.1, 0.02)])
def test_compiled_code_runs_again_whoever_leaves_first(seconds: tuple[float, float]) -> None:
    torch._dynamo.reset()
    counter = Counter()
    model = torch.compile(net(), backend=counter)

    def estimate(pause: float) -> None:
        params = list(model.parameters())
        EKFACLinearOperator(model, CE, params, Slow(pause), check_deterministic=False)

    threads = [threading.Thread(target=estimate, args=(pause,)) for pause in seconds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.compilations == 0
    model(data()[0][0])
    assert counter.compilations > 0


def test_compiled_code_runs_again_after_an_error() -> None:
    torch._dynamo.reset()
    counter = Counter()
    model = torch.compile(net(), backend=counter)
    with pytest.raises(RuntimeError, match="shapes"):
        EKFACLinearOperator(
            model, CE, list(model.parameters()), [(torch.randn(3, 5), torch.tensor([0, 1, 2]))]
        )
    model(data()[0][0])
    assert counter.compilations > 0
