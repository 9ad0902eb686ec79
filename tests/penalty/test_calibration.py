"""The calibrated strength against harm and curvature that are computed another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACPenalty, calibrated_strength
from tests.helpers.cases import LOSSES
from tests.helpers.cases.losses import make_targets
from tests.helpers.exact import exact_penalty
from tests.helpers.model_state import ModelState
from tests.helpers.oracles import Loss, dense_fisher, loss_mass, with_reduction
from tests.helpers.penalties import (
    CE,
    SUMMED,
    Batches,
    dense_quadratic,
    flat,
    make,
    move,
    shapes_of,
    task,
)

MEAN_SQUARES, SUM_OF_SQUARES = nn.MSELoss(), nn.MSELoss(reduction="sum")
IGNORED = -100


def summed_loss(model: nn.Module, loss: Loss, data: Batches) -> float:
    """The losses of one example after the other; the model is in evaluation mode."""
    summed, total = with_reduction(loss, "sum"), 0.0
    with torch.no_grad():
        for x, y in data:
            for x_n, y_n in zip(x, torch.chunk(y, len(x)), strict=True):
                total += float(summed(model(x_n[None]), y_n))
    return total


def divisor(model: nn.Module, loss: Loss, data: Batches) -> float:
    """What makes a mean loss of the summed one."""
    x, y = joined(data)
    with torch.no_grad():
        return loss_mass(loss, model(x), y)


def joined(data: Batches) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def harm(before: nn.Module, now: nn.Module, loss: Loss, data: Batches) -> float:
    """How much the loss has grown."""
    growth = summed_loss(now, loss, data) - summed_loss(before, loss, data)
    return growth / divisor(before, loss, data)


def climb(model: nn.Module, loss: Loss, data: Batches, rate: float = 0.3) -> None:
    """Do some harm: go up the gradient of the loss, with a direction of one's own besides."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, y = joined(data)
    gradients = torch.autograd.grad(with_reduction(loss, "sum")(model(x), y), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(rate * gradient / gradient.norm())
            parameter.add_(0.01 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def learned(
    name: str = "plain", loss: Loss = CE, mode: str = "merged", **options: Any
) -> tuple[EKFACPenalty, nn.Module, Batches, nn.Module]:
    """A penalty, a model that has been moved since to the harm of its task, and as it was."""
    model, data = make(name), task(name, 0)
    penalty = exact_penalty(2.5, mode, seed=3, **options)
    penalty.consolidate(model, loss, data)
    before = copy.deepcopy(model)
    climb(model, loss, data)
    return penalty, model, data, before


def least_squares(seed: int = 0, n: int = 9) -> tuple[nn.Linear, Batches]:
    """A linear layer with the smallest squared error, and its data in uneven batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([torch.ones(n, 1).double(), x], dim=1), y).solution
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.bias.copy_(solution[0])
        model.weight.copy_(solution[1:].T)
    return model, [(x[:5], y[:5]), (x[5:], y[5:])]


# ------------------------------------------------------------------ where theory knows the answer


@pytest.mark.parametrize("current_num_data", [None, 25])
@pytest.mark.parametrize("num_data", [None, 70])
@pytest.mark.parametrize("loss", [MEAN_SQUARES, SUM_OF_SQUARES], ids=["mean", "sum"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_is_one_where_the_loss_is_quadratic(
    mode: str, weighting: str, loss: Loss, num_data: int | None, current_num_data: int | None
) -> None:
    """The block of a linear layer and its bias is exact, and at a minimum nothing else counts."""
    model, data = least_squares()
    penalty = exact_penalty(
        2.5, mode, weighting=weighting, fisher_type="type2", separate_weight_and_bias=False
    )
    penalty.consolidate(model, loss, data, num_data=num_data)
    penalty.current_num_data = current_num_data
    move(model, 1)
    assert calibrated_strength(penalty, model, loss, data) == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("loss", [MEAN_SQUARES, SUM_OF_SQUARES], ids=["mean", "sum"])
def test_is_one_where_only_an_exact_block_has_moved(loss: Loss) -> None:
    model, ((x, _), _) = make("plain"), task("plain", 0)
    residuals = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(1)).double()
    data = [(x, model(x).detach() + residuals - residuals.mean(dim=0))]
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, loss, data)
    with torch.no_grad():
        model[2].bias.add_(torch.tensor([0.3, -0.1, 0.2]))
    assert calibrated_strength(penalty, model, loss, data) == pytest.approx(1.0, rel=1e-8)


def test_is_the_ratio_of_curvatures_of_other_data() -> None:
    """The same solution with twice the inputs behind it: four times the curvature, and harm."""
    model, data = least_squares()
    with torch.no_grad():
        model.bias.zero_()
    # Exact targets, so that the solution is that of other inputs too.
    data = [(x, model(x).detach()) for x, _ in data]
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, MEAN_SQUARES, data)
    with torch.no_grad():
        model.weight.add_(torch.tensor([0.3, -0.1, 0.2, 0.4]))
    doubled = [(2 * x, 2 * y) for x, y in data]
    strength = calibrated_strength(penalty, model, MEAN_SQUARES, doubled)
    assert strength == pytest.approx(4.0, rel=1e-8)


# ------------------------------------------------------------------ against other computations

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, tuple[int, ...]]] = {
    "rows": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), 1, (3,)),
    "positions": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)),
        (2, 4),
        1,
        (3, 3),
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(0, 1)),
        (2, 4),
        2,
        (3,),
    ),
}


@pytest.mark.parametrize(
    ("name", "net", "reduction"),
    [
        (name, net, ("mean", "sum")[(n + m) % 2])
        for n, name in enumerate(LOSSES)
        for m, net in enumerate(NETS)
    ],
)
def test_every_loss(name: str, net: str, reduction: str) -> None:
    """The block of an output bias is exact, so that dense matrices tell what it must be."""
    build, input_shape, rows, output_shape = NETS[net]
    torch.manual_seed(0)
    model = build().double()
    for index in (0, 1, 2):
        model[index].requires_grad_(False)
    model[2].bias.requires_grad_(True)
    loss = LOSSES[name].make(reduction, output_shape)
    x = torch.randn(7, *input_shape, dtype=torch.float64)
    y = make_targets(LOSSES[name], 7, rows, output_shape)
    # In each batch there are labels that are not ignored.
    data = list(zip(x.split([2, 5]), y.split([2 * rows, 5 * rows]), strict=True))
    penalty = exact_penalty(fisher_type="type2", include=["2.bias"])
    penalty.consolidate(model, loss, data)
    before = copy.deepcopy(model)
    climb(model, loss, data)
    fisher = dense_fisher(before, loss, ["2.bias"], x, y, "type2")
    delta = (model[2].bias - before[2].bias).detach()
    inside = divisor(before, loss, data) if reduction == "sum" else 1
    predicted = 0.5 * float(delta @ fisher @ delta) / inside
    expected = harm(before, model, loss, data) / predicted
    assert expected > 0
    assert calibrated_strength(penalty, model, loss, data) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_whole_networks(name: str, joint: bool, weighting: str, mode: str) -> None:
    penalty, model, data, before = learned(
        name, CE, mode, weighting=weighting, separate_weight_and_bias=not joint
    )
    (term,) = penalty.terms
    weight = term.weight if mode == "separate" else 1.0
    inside = 9 if weighting == "examples" else 1
    form = dense_quadratic(term.operator, term.anchor, shapes_of(model), weight / inside)
    expected = harm(before, model, CE, data) / float(form.value(flat(model)))
    assert expected > 0
    assert calibrated_strength(penalty, model, CE, data) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("loss", [CE, SUMMED], ids=["mean", "sum"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_at_this_strength_the_penalty_is_the_harm(mode: str, weighting: str, loss: Loss) -> None:
    penalty, model, data, before = learned("plain", loss, mode, weighting=weighting)
    penalty.strength = calibrated_strength(penalty, model, loss, data)
    examples = 9 if loss is SUMMED else 1
    expected = examples * harm(before, model, loss, data)
    assert penalty(model).item() == pytest.approx(expected, rel=1e-8)


def test_other_data_of_the_task() -> None:
    """Held-out data are fine, however many."""
    penalty, model, data, before = learned()
    other = task("plain", 5, n=13)
    ratio = harm(before, model, CE, other) / harm(before, model, CE, data)
    assert ratio > 0
    strengths = [calibrated_strength(penalty, model, CE, some) for some in (other, data)]
    assert strengths[0] / strengths[1] == pytest.approx(ratio, rel=1e-8)


def test_a_grown_classifier_is_compared_with_what_it_was() -> None:
    """New classes take probability from the old: that is harm as well."""
    penalty, model, data, before = learned()
    grown = nn.Sequential(model[0], model[1], nn.Linear(5, 5).double())
    with torch.no_grad():
        for new, old in zip(grown[2].parameters(), model[2].parameters(), strict=True):
            new[:3] = old
    expected = harm(before, grown, CE, data) / harm(before, model, CE, data)
    assert expected > 1
    ratio = calibrated_strength(penalty, grown, CE, data)
    ratio /= calibrated_strength(penalty, model, CE, data)
    assert ratio == pytest.approx(expected, rel=1e-8)


# ------------------------------------------------------------------ what must not matter


def test_settings_that_do_not_matter() -> None:
    penalty, model, data, _ = learned(decay=0.5)
    expected = calibrated_strength(penalty, model, CE, data)
    assert expected > 0
    for strength in (0.0, 1e300):
        penalty.strength = strength
        assert calibrated_strength(penalty, model, CE, data) == expected
    penalty.current_num_data = 1
    assert calibrated_strength(penalty, model, CE, data) == expected
    x, y = joined(data)
    for size in (1, 4, 9):
        cut = list(zip(x.split(size), y.split(size), strict=True))
        assert calibrated_strength(penalty, model, CE, cut) == pytest.approx(expected, rel=1e-10)


def test_wrappers_do_not_matter() -> None:
    penalty, model, data, _ = learned()
    expected = calibrated_strength(penalty, model, CE, data)
    compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(model)
    for wrapped in (compiled, parallel):
        assert calibrated_strength(penalty, wrapped, CE, data) == expected


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_a_saved_penalty_is_as_good(mode: str, tmp_path: Any) -> None:
    penalty, model, data, _ = learned(mode=mode)
    torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
    resumed = exact_penalty(mode=mode)
    resumed.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    expected = calibrated_strength(penalty, model, CE, data)
    assert calibrated_strength(resumed, model, CE, data) == expected


def noisy_net() -> nn.Module:
    """A network that would draw random numbers and collect statistics in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()


def shuffled(data: Batches) -> DataLoader[Any]:
    """Batches that take random numbers to make."""
    return DataLoader(TensorDataset(*joined(data)), batch_size=4, shuffle=True)


def in_two_modes() -> tuple[EKFACPenalty, nn.Module, Batches, nn.Module]:
    """A model of which one module is not in training mode, with gradients."""
    model, data, penalty = noisy_net(), task("plain", 0), exact_penalty()
    penalty.consolidate(model, CE, data)
    before = copy.deepcopy(model).eval()
    climb(model.eval(), CE, data)
    model.train()
    model[1].eval()
    for parameter in model[0].parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    return penalty, model, data, before


def test_model_and_random_states_are_left_alone() -> None:
    penalty, model, data, before = in_two_modes()
    state, penalty_before = ModelState.of(model), copy.deepcopy(penalty.state_dict())
    expected = calibrated_strength(penalty, model, CE, data)
    assert calibrated_strength(penalty, model, CE, shuffled(data)) == pytest.approx(expected)
    state.assert_unchanged(model)
    for key, value in penalty.state_dict().items():
        same = torch.equal if isinstance(value, Tensor) else str.__eq__
        assert same(value, penalty_before[key]), key
    # Nothing is dropped while measuring.
    evaluated = copy.deepcopy(model).eval()
    assert calibrated_strength(penalty, evaluated, CE, data) == expected
    assert harm(before, evaluated, CE, data) > 0


def test_a_failure_leaves_the_model_alone_too() -> None:
    penalty, model, data, _ = in_two_modes()
    state = ModelState.of(model)

    class Failing:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            torch.rand(1)
            yield data[0]
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        calibrated_strength(penalty, model, CE, Failing())
    state.assert_unchanged(model)


def test_random_data_are_the_same_before_and_after() -> None:
    """Else what differs between two looks at augmented images would pass for harm."""
    penalty, model, data, _ = learned()

    class Augmented:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in data:
                yield x + torch.randn_like(x), y

    torch.manual_seed(5)
    first_look = list(Augmented())
    expected = calibrated_strength(penalty, model, CE, first_look)
    torch.manual_seed(5)
    strength = calibrated_strength(penalty, model, CE, Augmented())
    assert strength == pytest.approx(expected, rel=1e-10)


# ------------------------------------------------------------------ what has no answer


def test_no_harm_is_no_strength() -> None:
    model, data = make("plain"), task("plain", 0)
    penalty = exact_penalty()
    penalty.consolidate(model, CE, data)
    climb(model, CE, data, rate=-0.3)
    with pytest.warns(UserWarning, match="there was no harm to measure") as caught:
        assert calibrated_strength(penalty, model, CE, data) == 0.0
    assert caught[0].filename == __file__
    assert len(caught) == 1


def refused(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    """Check that good arguments with these changes are refused."""
    penalty, model, data, _ = learned()
    arguments = {"penalty": penalty, "model": model, "loss_func": CE, "old_data": data} | changes
    with pytest.raises(error, match=message):
        calibrated_strength(**arguments)


def test_penalties_that_are_none() -> None:
    refused("penalty is NoneType; expected an EKFACPenalty", TypeError, penalty=None)
    refused("penalty is Linear; expected an EKFACPenalty", TypeError, penalty=nn.Linear(1, 1))


def test_models_that_are_none() -> None:
    parameters = dict(make("plain").named_parameters())
    refused("model is dict; expected a torch.nn.Module", TypeError, model=parameters)


@pytest.mark.parametrize("tasks", [0, 2])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_one_task_must_have_been_consolidated(mode: str, tasks: int) -> None:
    model, penalty = make("plain"), exact_penalty(mode=mode)
    for t in range(tasks):
        penalty.consolidate(model, CE, task("plain", t))
    move(model, 0)
    message = f"has consolidated {tasks} tasks; expected one: calibrate after the second task"
    refused(message, penalty=penalty, model=model)


def test_a_model_that_has_not_moved() -> None:
    model, penalty = make("plain"), exact_penalty()
    penalty.consolidate(model, CE, task("plain", 0))
    refused("the model is where it was when the task was consol", penalty=penalty, model=model)


def test_a_model_of_another_form() -> None:
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    refused(
        r"parameters '2\.weight', '2\.bias' are protected by the penalty, but the model has",
        model=other,
    )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "has reduction='none'; expected 'mean' or 'sum'"),
        (nn.L1Loss(), "loss_func is L1Loss, which is not supported"),
    ],
)
def test_losses_without_a_likelihood(loss: nn.Module, message: str) -> None:
    refused(message, loss_func=loss)


def test_batches_that_are_none() -> None:
    ((x, y), _) = task("plain", 0)
    refused("data is empty; expected at least one batch", old_data=[])
    refused(r"batch 0 of data is a tuple of 3 items; expected \(inp", old_data=[(x, y, y)])
    refused("batch 1 of data is a Tensor; expected", old_data=[(x, y), x])
    refused("targets of type list; expected a tensor", TypeError, old_data=[(x, y.tolist())])


def test_data_that_can_be_read_only_once() -> None:
    """They are read for the model as it was, and again for the model as it is."""
    data = task("plain", 0)
    refused(r"data is a one-shot iterator \(list_iterator\)", old_data=iter(data))
    refused("data is int; expected an iterable of batches", TypeError, old_data=3)


def test_labels_that_do_not_fit_the_loss() -> None:
    """A squared error would broadcast them, and answer all the same."""
    model, data = least_squares()
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, MEAN_SQUARES, data)
    move(model, 1)
    narrow = [(x, y[:, :1]) for x, y in data]
    refused(
        "targets .* do not fit; expected the same shape",
        penalty=penalty,
        model=model,
        loss_func=MEAN_SQUARES,
        old_data=narrow,
    )


def test_the_loss_must_be_the_one_that_was_consolidated() -> None:
    """Per example a summed squared error is three times the mean one, of three outputs."""
    model, data = least_squares()
    data = [(x, y.sigmoid()) for x, y in data]
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, MEAN_SQUARES, data)
    move(model, 1)
    moved = {"penalty": penalty, "model": model, "old_data": data}
    refused("reduction 'sum'.*'mean'", loss_func=SUM_OF_SQUARES, **moved)
    refused("'BCEWithLogitsLoss'.*'MSELoss'", loss_func=nn.BCEWithLogitsLoss(), **moved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_has_no_strength(value: float) -> None:
    """Neither zero nor infinity nor no number is an answer."""
    penalty, model, data, _ = learned()
    with torch.no_grad():
        model[2].bias[0] = value
    refused("not finite", penalty=penalty, model=model, old_data=data)


def test_data_that_are_not_numbers_have_no_strength() -> None:
    penalty, model, ((x, y), _), _ = learned()
    refused("not finite", penalty=penalty, model=model, old_data=[(x * float("nan"), y)])


@pytest.mark.parametrize("loss", [CE, SUMMED], ids=["mean", "sum"])
def test_a_batch_of_ignored_labels(loss: Loss) -> None:
    """Its mean loss is not a number, but it is no part of the mean over all data."""
    penalty, model, data, before = learned(loss=loss)
    x, y = data[0]
    more = [*data, (x[:2], torch.full_like(y[:2], IGNORED))]
    expected = calibrated_strength(penalty, model, loss, data)
    expected *= harm(before, model, loss, more) / harm(before, model, loss, data)
    for some in (more, [joined(more)]):
        strength = calibrated_strength(penalty, model, loss, some)
        assert strength == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_precision(weighted: bool, dtype: torch.dtype) -> None:
    """The class weights have the model's dtype, as the loss demands when it is trained."""
    model, data = make("plain").to(dtype), [(x.to(dtype), y) for x, y in task("plain", 0)]
    loss = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]) if weighted else None).to(dtype)
    penalty = exact_penalty()
    penalty.consolidate(model, loss, data)
    with torch.no_grad():
        model[2].bias.add_(torch.tensor([3.0, -3.0, 0.0], dtype=dtype))
    exact = copy.deepcopy(penalty).double()
    wide = [(x.double(), y) for x, y in data]
    expected = calibrated_strength(exact, copy.deepcopy(model).double(), loss.double(), wide)
    loss.to(dtype)
    assert calibrated_strength(penalty, model, loss, data) == pytest.approx(expected, rel=0.05)


def test_many_terms_in_half_precision() -> None:
    """They are more than the largest number in that precision."""
    model = nn.Linear(4, 3).half()
    small, large = ((torch.ones(n, 4).half(), torch.ones(n, 3).half()) for n in (9, 30_000))
    penalty = exact_penalty()
    penalty.consolidate(model, MEAN_SQUARES, [small])
    with torch.no_grad():
        model.bias.sub_(10)
    expected = calibrated_strength(penalty, model, MEAN_SQUARES, [small])
    strength = calibrated_strength(penalty, model, MEAN_SQUARES, [large])
    assert strength == pytest.approx(expected, rel=0.02)


def test_data_of_ignored_labels_only() -> None:
    penalty, model, ((x, y), _), _ = learned()
    nothing = [(x, torch.full_like(y, IGNORED))]
    refused("ignored|no terms|count nothing", penalty=penalty, model=model, old_data=nothing)
