"""Batches, their order, and the memory budget change nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases import BASIC, BY_NAME, FURTHER, PLAIN_LOSSES, Case
from tests.helpers.cases.modules import using
from tests.helpers.exactness import (
    EXACT_FISHERS,
    Counting,
    Setting,
    assert_exact_diagonal,
    estimated,
    exact_matrix_of,
    ignore_even_kernels,
)
from tests.helpers.oracles import Fisher, assert_close, dense_fisher, dense_operator

pytestmark = ignore_even_kernels

# Few examples, since a small budget takes them one by one, with one label vector after the other.
# With fewer examples than inputs the factor of REDUCE is degenerate, and with it the operator, so
# that only EXPAND, whose null space is also that of the data, is compared on every case.
INVARIANT_CHOICES: tuple[tuple[str, Fisher, bool], ...] = (
    ("ce", "type2", False),
    ("bce", "type2", True),
    ("mse", "empirical", False),
)
INVARIANT = [
    *(
        Setting(replace(case, batch_sizes=(2, 1)), loss, fisher=fisher, joint=joint)
        for i, case in enumerate((*BASIC, *FURTHER[::2]))
        for loss, fisher, joint in INVARIANT_CHOICES[i % 3 : i % 3 + 1]
    ),
    *(
        Setting(BY_NAME[name], "ce", approx="reduce", fisher=fisher)
        for name in ("pooled-tokens", "pooled-grid", "linear-twice", "sequence-outputs")
        for fisher in EXACT_FISHERS
    ),
]
FORMS = ("tanh-mlp", "attention-batch-first", "embedding-tied", "weight-norm-conv", "batch-norm2d")


@pytest.mark.parametrize("setting", INVARIANT[::2], ids=str)
def test_batches_and_order_do_not_matter(setting: Setting) -> None:
    """All at once or one by one, in other orders than the case's own batches of several sizes."""
    n = setting.case.examples
    sizes, order = [n], list(reversed(range(n)))
    if INVARIANT.index(setting) % 4:
        generator = torch.Generator().manual_seed(0)
        sizes, order = [1] * n, torch.randperm(n, generator=generator).tolist()
    data = setting.case.data(setting.loss, sizes, order)
    expected = setting.dense(estimated(setting))
    assert_close(setting.dense(setting.estimate(data=data)), expected, 1e-9)


@pytest.mark.parametrize("setting", INVARIANT[1::2], ids=str)
def test_memory_budget_does_not_matter(setting: Setting) -> None:
    """With next to no memory the data are passed twice and cut into chunks."""
    data = Counting(setting.case.data(setting.loss))
    small = setting.dense(setting.estimate(memory_budget=1, data=data))
    assert data.passes > 1
    assert_close(small, setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_one_pass_suffices_where_there_is_memory(name: str) -> None:
    """So that what small budgets are compared with above is the other way of computing it."""
    setting = Setting(BY_NAME[name])
    data = Counting(setting.case.data(setting.loss))
    setting.estimate(data=data)
    assert data.passes == 1


@pytest.mark.parametrize("budget", [1, 2**30], ids=["two-passes", "one-pass"])
def test_shuffling_data_loader(budget: int) -> None:
    """Another order in every pass, an uneven last batch, and the default check."""
    setting = Setting(BY_NAME["tanh-mlp"])
    dataset = TensorDataset(setting.case.inputs(), setting.case.targets("ce"))
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=3, shuffle=True, generator=generator)
    operator = setting.estimate(data=loader, memory_budget=budget, check_deterministic=True)
    assert_close(setting.dense(operator), setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4), (1, 2, 3), (6,)], ids=str)
def test_layouts_that_only_a_later_batch_decides(sizes: tuple[int, ...]) -> None:
    """Time-first, with two examples of four tokens that read from one half of the tokens each."""

    def read(m: Any, x: Tensor) -> Tensor:
        last = x[:, 0, 0].gt(0).long() * 3
        return torch.tanh(x.transpose(0, 1) @ m.w)[last, torch.arange(len(x))]

    case = Case("read-one-token", using(read, w=(3, 2)), (4, 3), (2,))
    model, x, y = case.model(), case.inputs(), case.targets("mse")
    x[:, 0, 0] = torch.tensor([-1, 1, 1, 1, -1, -1])
    data = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    operator = EKFACLinearOperator(
        model, nn.MSELoss(), [model.w], data, fisher_type=FisherType.TYPE2
    )
    dense = dense_fisher(model, nn.MSELoss(), ["w"], x, y, "type2")
    assert_exact_diagonal(operator, dense, {"w": (3, 2)})


def test_data_loader_that_drops_the_last_batch() -> None:
    """What the loader leaves out does not count."""
    case = BY_NAME["attention-batch-first"]
    dataset = TensorDataset(case.inputs(), case.targets("ce"))
    loader = DataLoader(dataset, batch_size=4, drop_last=True)
    kept = case.data("ce", [4, case.examples - 4])[:1]
    setting = Setting(case)
    actual = setting.dense(setting.estimate(data=loader))
    assert_close(actual, setting.dense(setting.estimate(data=kept)), 1e-9)
    assert (actual - setting.dense(estimated(setting))).norm() > 0.01 * actual.norm()


@pytest.mark.parametrize("name", FORMS)
def test_functional_call(name: str) -> None:
    """A function of a module and of plain tensors that do not require gradients."""
    setting = Setting(BY_NAME[name])
    model = setting.case.model().eval()
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    operator = EKFACLinearOperator(
        lambda x: functional_call(model, tensors, (x,)),
        setting.loss_func(),
        tensors,
        setting.case.data("ce"),
        fisher_type=FisherType.TYPE2,
    )
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert_exact_diagonal(operator, exact_matrix_of(setting), setting.shapes())
    assert_close(setting.dense(operator), setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_stateless_function_of_parameters(name: str) -> None:
    """Tensors that no module owns, under names of their own and in another order."""
    setting = Setting(BY_NAME[name])
    model = setting.case.model().eval()
    parameters = dict(reversed(list(model.named_parameters())))
    renamed = {f"my/{n}": p for n, p in parameters.items()}
    operator = EKFACLinearOperator(
        lambda x: model(x),
        setting.loss_func(),
        renamed,
        setting.case.data("ce"),
        fisher_type=FisherType.TYPE2,
    )
    assert {n for block in operator.blocks for n in block.parameters} == {*renamed}
    shapes = {n: tuple(p.shape) for n, p in renamed.items()}
    expected = dense_operator(
        estimated(setting).blocks, {n: tuple(p.shape) for n, p in parameters.items()}
    )
    assert_close(dense_operator(operator.blocks, shapes), expected, 1e-9)


# From a batch to another form of it, back, and from that form to its number of examples.
INPUT_FORMS: dict[
    str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any], int]]
] = {
    "dictionary": (
        lambda x: {"other": torch.zeros(7), "x": x, "flag": True},
        lambda inputs: inputs["x"],
        lambda inputs: len(inputs["x"]),
    ),
    "tuple": (
        lambda x: (torch.zeros(7), [x], None),
        lambda inputs: inputs[1][0],
        lambda inputs: len(inputs[1][0]),
    ),
    "batch-axis-second": (
        lambda x: x.transpose(0, 1),
        lambda inputs: inputs.transpose(0, 1),
        lambda inputs: inputs.shape[1],
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", INPUT_FORMS)
def test_inputs_of_other_forms(name: str, form: str) -> None:
    """Nested inputs, and inputs whose first axis is not that of the examples."""
    setting = Setting(BY_NAME[name])
    model = setting.case.model().eval()
    pack, unpack, count = INPUT_FORMS[form]
    operator = EKFACLinearOperator(
        lambda inputs: model(unpack(inputs)),
        setting.loss_func(),
        dict(model.named_parameters()),
        [(pack(x), y) for x, y in setting.case.data("ce")],
        fisher_type=FisherType.TYPE2,
        batch_size_fn=count,
    )
    assert_close(setting.dense(operator), setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs", "conv2d-stride-groups"])
def test_sum_is_count_times_mean(name: str, loss: str) -> None:
    """Cross entropy counts positions, the elementwise losses count elements."""
    case = BY_NAME[name]
    mean = Setting(case, loss)
    total = replace(mean, reduction="sum")
    classes, *positions = case.output_shape
    elements = classes if loss != "ce" else 1
    count = case.examples * elements * torch.Size(positions).numel()
    expected = count * mean.dense(estimated(mean))
    assert_close(total.dense(estimated(total)), expected, 1e-9)
