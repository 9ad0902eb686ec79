"""Arguments of nearly the right form: the refusal says what to pass, and then it works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from rotate_ewc import (
    EKFACLinearOperator,
    EKFACPenalty,
    EmpiricalLoss,
    ModelLoss,
    SumOfLosses,
)
from rotate_ewc.integrations.transformers import own_loss
from tests.helpers import hf_models

CE = nn.CrossEntropyLoss()


def x(n: int = 6) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(n))


def y(n: int = 6) -> Tensor:
    return torch.arange(n) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def trace(model: nn.Module) -> float:
    """`mean_n (1 - Σ_c p_nc²) (|x_n|² + 1)`, over weights and biases of a linear layer."""
    p = model(x()).detach().softmax(1)
    return float(((1 - p.square().sum(1)) * (x().square().sum(1) + 1)).mean())


def consolidated(data: Any, model: nn.Module | None = None, **options: Any) -> float:
    """Return the trace of a task's matrix, of the mean loss."""
    forward = options.pop("forward", None)
    penalty = EKFACPenalty(1.0, fisher_type="type2", temperature=1.0, damping=0.0, mode="separate")
    penalty.consolidate(model or net(), options.pop("loss", CE), data, forward=forward)
    return float(penalty.terms[0].operator.trace)


def operator(data: Any, model: nn.Module | None = None, **options: Any) -> float:
    model = model or net()
    found = EKFACLinearOperator(
        options.pop("forward", None) or model,
        options.pop("loss", CE),
        list(model.parameters()),
        data,
        fisher_type="type2",
    )
    return float(found.trace)


BUILDERS = [consolidated, operator]


def refused(call: Callable[[], Any], error: type[Exception], message: str) -> str:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        call()
    assert torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


def written(message: str, pattern: str, **names: Any) -> Any:
    """Evaluate the code that a message has at the place of the pattern's group."""
    found = re.search(pattern, message)
    assert found is not None, message
    return eval(found[1], {"torch": torch, "nn": nn, **names})


# ------------------------------------------------------------------ losses


class OwnLoss(nn.Module):
    """A loss that is none of torch's."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss])
def test_a_class_of_losses(build: Any, kind: type[nn.Module]) -> None:
    message = rf"^loss_func is the class nn\.{kind.__name__}; expected an object: pass"
    model = net()
    found = refused(lambda: build([(x(), y())], model, loss=kind), TypeError, message)
    loss = written(found, r"pass (.*)$")
    assert type(loss) is kind
    targets = y() if kind is nn.CrossEntropyLoss else x()[:, :3]
    assert build([(x(), targets)], loss=loss) > 0


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.L1Loss, r"nn\.L1Loss"),
        (OwnLoss, "OwnLoss"),
        (EmpiricalLoss(nn.L1Loss), r"nn\.L1Loss"),
        (ModelLoss(OwnLoss), "OwnLoss"),
        (SumOfLosses({0: CE, 1: nn.CrossEntropyLoss}), r"nn\.CrossEntropyLoss"),
    ],
)
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_classes_at_other_places(loss: Any, name: str, fisher_type: str) -> None:
    penalty = EKFACPenalty(1.0, fisher_type=fisher_type)
    with pytest.raises(TypeError, match=rf"^loss_func is the class {name}; .*pass {name}\(\)$"):
        penalty.consolidate(net(), loss, [(x(), y())])


# ------------------------------------------------------------------ data sets and batches


class Examples(Dataset[Any]):
    """Single examples, without an end that iteration would notice."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorDataset(x(), y()),
        lambda: Examples([*zip(x(), y(), strict=True)]),
        lambda: Subset(TensorDataset(x(), y()), range(6)),
    ],
)
def test_a_data_set_of_examples(build: Any, make: Any) -> None:
    data, model = make(), net()
    message = rf"^data is {type(data).__name__}, a data set of single examples; expected batches"
    found = refused(lambda: build(data, model), TypeError, message)
    loader = written(found, r"pass (torch\S+ batch_size=100\))", data=data)
    assert build(loader, model) == pytest.approx(trace(model), rel=1e-4)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_data_set_of_batches(build: Any) -> None:
    """It is the loader's part to say so, or that of a stream, which may have batches."""
    data, model = Examples([(x()[:2], y()[:2]), (x()[2:], y()[2:])]), net()
    found = refused(lambda: build(data, model), TypeError, "or batch_size=None, if each item is")
    assert "DataLoader(data, batch_size=100)" in found
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)
    assert build(loader, model) == pytest.approx(trace(model), rel=1e-4)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data.items)

    assert build(Stream(), model) == pytest.approx(trace(model), rel=1e-4)


def test_a_list_of_examples() -> None:
    data, model = [*zip(x(), y(), strict=True)], net()
    message = r"batch 0 of data: .* got \[3\], as for a single example; expected batches"
    found = refused(lambda: consolidated(data, model), ValueError, message)
    loader = written(found, r"as (torch\S+ batch_size=100\))", data=data)
    assert consolidated(loader, model) == pytest.approx(trace(model), rel=1e-4)


def test_a_data_set_for_a_models_own_loss() -> None:
    """Also of batches with lists, which are no tensors, under the names that the loss wants."""
    model, batch = hf_models.case("gpt2")
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    lists = [{name: values.tolist() for name, values in row.items()} for row in rows]
    penalty = EKFACPenalty(1.0)
    for items in (rows, lists):
        data = Examples(items)
        message = r"^data is Examples, a data set of single examples; .*the collate_fn of training"
        refused(lambda d=data: penalty.consolidate(model, data=d), TypeError, message)
        refused(lambda d=data: own_loss(model, d), TypeError, message)
    found = refused(
        lambda: penalty.consolidate(model, data=Examples(rows)), TypeError, "DataLoader"
    )
    loader = written(found, r"pass (torch\S+ batch_size=100\))", data=Examples(rows))
    penalty.consolidate(model, data=loader)
    assert penalty.terms[0].operator.num_data == 4


def test_one_batch_for_a_models_own_loss() -> None:
    model, batch = hf_models.case("gpt2")
    penalty = EKFACPenalty(1.0)
    message = r"^data is dict with \['.*\], as one batch is; expected a list of batches"
    found = refused(lambda: penalty.consolidate(model, data=batch), TypeError, message)
    penalty.consolidate(model, data=written(found, r"pass (\[data\])", data=batch))
    assert penalty.num_tasks == 1


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("kind", [tuple, list])
def test_one_batch(build: Any, kind: Any) -> None:
    model, data = net(), kind([x(), y()])
    message = rf"^data is a {kind.__name__} of inputs and targets, as one batch is; expected a list"
    found = refused(lambda: build(data, model), TypeError, message)
    assert build(written(found, r"pass (\[data\])", data=data), model) == pytest.approx(
        trace(model), rel=1e-4
    )


def test_two_batches_of_inputs_alone() -> None:
    """In a list they are what they seem to be; a tuple is more likely to be one batch."""
    model, parts = net(), [x()[:3], x()[3:]]
    refused(lambda: consolidated(tuple(parts), model), TypeError, "or a list of tensors, if")
    penalty = EKFACPenalty(1.0)
    penalty.consolidate(model, nn.MSELoss(), parts)
    assert penalty.terms[0].operator.num_data == 6


# ------------------------------------------------------------------ items of batches


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("task", ["numbers", "number"])
def test_batches_of_three_items(build: Any, task: str) -> None:
    """Both remedies: to leave the third out, and to give it to the model."""
    third = torch.full((6,), 2) if task == "numbers" else 2
    data, model = [(x(), y(), third)], net()
    message = r"^batch 0 of data is a tuple of 3 items; expected \(inputs, targets\): if the model"
    found = refused(lambda: build(data, model), ValueError, message)
    pairs = written(found, r"data=(\[\(x, y\) .*?\]); if", data=data)
    assert build(pairs, model) == pytest.approx(trace(model), rel=1e-4)

    def with_task(inputs: Tensor, number: Any) -> Tensor:
        assert bool(torch.as_tensor(number == 2).all())
        found: Tensor = model(inputs)
        return found

    nested = written(found, r"data=(\[\(\(x.*?\]) and", data=data)
    forward = written(found, r"forward=(lambda.*?) \(for", model=with_task)
    assert build(nested, model, forward=forward) == pytest.approx(trace(model), rel=1e-4)


def test_batches_of_one_item() -> None:
    data: DataLoader[Any] = DataLoader(TensorDataset(x()), 4)
    penalty = EKFACPenalty(1.0)
    message = r"^batch 0 of data is a list of 1 items; .* if they are inputs alone"
    found = refused(lambda: penalty.consolidate(net(), nn.MSELoss(), data), ValueError, message)
    penalty.consolidate(net(), nn.MSELoss(), written(found, r"data=(\[x .*\])$", data=data))
    assert penalty.terms[0].operator.num_data == 6


# ------------------------------------------------------------------ models without sizes


class Lazy(nn.Module):
    """Does not know the sizes of its layers before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LazyLinear(5), nn.LazyLinear(3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(inputs).tanh())
        return found


@pytest.mark.parametrize("build", BUILDERS)
def test_layers_without_sizes(build: Any) -> None:
    model, data = Lazy(), [(x(), y())]
    message = (
        r"^parameters 'body\.weight', .* are not initialised; the layers 'body', 'head', such as "
        r"nn\.LazyLinear, .*: run one batch through the model first"
    )
    refused(lambda: build(data, model), ValueError, message)
    assert model.body.has_uninitialized_params()
    model(x())
    assert build(data, model) > 0


def test_layers_without_sizes_that_are_not_protected() -> None:
    """Or the estimate would give them some."""
    penalty = EKFACPenalty(1.0, exclude=["head.*"])
    model, data = Lazy(), [(x(), y())]
    model.body(x())
    message = r"^parameters 'head\.weight', .*; the layers 'head', "
    with pytest.raises(ValueError, match=message):
        penalty.consolidate(model, CE, data)
    with pytest.raises(ValueError, match=message):
        EKFACLinearOperator(model, CE, list(model.body.parameters()), data)
    assert model.head.has_uninitialized_params()


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_a_penalty_is_attached_before_layers_have_sizes(update: str) -> None:
    """The first batch of training comes before the first step."""
    model, penalty = Lazy(), EKFACPenalty(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, update)
    for _ in range(2):
        optimizer.zero_grad()
        CE(model(x()), y()).backward()
        optimizer.step()
        penalty.consolidate(model, CE, [(x(), y())])
    assert penalty.num_tasks == 2
