"""What every argument of the penalty does, on one example, whose Fisher matrix is written out.

The matrix of a linear layer is then `(diag(p) - p pᵀ) ⊗ x xᵀ`, and its blocks are exact.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rotate_ewc import (
    EKFACPenalty,
    EstimationSettings,
    FisherType,
    KFACType,
    Mode,
    SnapshotError,
    Unsupported,
)
from rotate_ewc.io import files
from rotate_ewc.io.header import header_text
from tests.helpers.crossing import crossed
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close, dense_operator
from tests.helpers.penalties import CE, SUMMED, flat, flat_gradient, move

INPUTS = torch.tensor([[0.5, -1.0, 2.0, 0.3]], dtype=torch.float64)
TARGETS = torch.tensor([1])
DATA = [(INPUTS, TARGETS)]


def linear(seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3, bias=bias).double()


def fisher(model: nn.Linear, temperature: float = 1.0) -> Tensor:
    """That of the weight, for the one example."""
    p = (model(INPUTS)[0].detach() / temperature).softmax(0)
    return torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(INPUTS[0], INPUTS[0]))


def learned(model: nn.Module, **options: Any) -> EKFACPenalty:
    penalty = exact_penalty(**{"fisher_type": "type2", **options})
    penalty.consolidate(model, CE, DATA)
    return penalty


# --- the constructor ---


def test_defaults() -> None:
    penalty = exact_penalty()
    assert penalty.strength == 1.0
    assert penalty.mode == "merged"
    assert penalty.weighting == "examples"
    assert penalty.decay == 1.0
    assert penalty.temperature == 1.0
    assert penalty.include == ("*",)
    assert penalty.exclude == ()
    assert penalty.strict is True
    assert penalty.current_num_data is None
    assert penalty.num_tasks == 0
    assert penalty.terms == ()
    assert not penalty.stacks
    assert penalty.nbytes == 0
    assert penalty.scale == 1.0
    assert penalty.settings == EstimationSettings()


def test_settings_are_handed_on() -> None:
    options: dict[str, Any] = {
        "num_per_example_loss_terms": 3,
        "separate_weight_and_bias": False,
        "seed": 5,
        "memory_budget": 1000,
        "progressbar": True,
    }
    penalty = exact_penalty(
        fisher_type="empirical", kfac_approx="reduce", unsupported="skip", **options
    )
    assert penalty.settings == EstimationSettings(
        fisher_type=FisherType.EMPIRICAL,
        kfac_approx=KFACType.REDUCE,
        unsupported=Unsupported.SKIP,
        **options,
    )


def test_only_strength_and_mode_are_positional() -> None:
    kinds = [p.kind for p in inspect.signature(EKFACPenalty).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "x"}, "^mode is 'x'; expected one of 'merged', 'separate'$"),
        ({"weighting": "x"}, "^weighting is 'x'; expected one of 'examples', 'uniform'$"),
        ({"strength": -2.0}, "^strength is -2.0"),
        ({"decay": -0.5}, "^decay is -0.5"),
        ({"decay": 1.0001}, "^decay is 1.0001; expected a number from 0 to 1$"),
        ({"temperature": 0.0}, "^temperature is 0.0"),
        ({"fisher_type": "x"}, "^fisher_type is 'x'"),
        ({"kfac_approx": "x"}, "^kfac_approx is 'x'"),
        ({"unsupported": "x"}, "^unsupported is 'x'"),
        ({"mc_samples": 0}, "^mc_samples is 0"),
        ({"strict": 1}, "^strict is 1"),
        ({"batch_size_fn": 3}, "^batch_size_fn is 3"),
        ({"num_per_example_loss_terms": 0}, "^num_per_example_loss_terms is 0"),
        ({"settings": {"seed": 3}}, "^settings is dict; expected an EstimationSettings$"),
        ({"fisher_typ": "mc"}, r"no argument 'fisher_typ' \(did you mean 'fisher_type'\?\)"),
        ({"strenth": 1.0}, r"^EKFACPenalty has no argument 'strenth' \(did you mean 'strength'"),
        ({"include": "x"}, "^include is 'x'"),
        ({"exclude": "x"}, "^exclude is 'x'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        exact_penalty(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decay", 1.2, "decay is 1.2; expected a number from 0 to 1"),
        ("plasticity", 95, "plasticity is 95; expected more than 0 and less than 1"),
        ("temperature", "hot", "temperature is 'hot'; expected a number .*or 'auto'"),
        ("damping", -1.0, "damping is -1.0"),
        ("include", "encoder.*", "include is 'encoder.*'; expected a list"),
        ("exclude", [1], "exclude is"),
        ("strict", 1, "strict is 1; expected True or False"),
        ("sharded", None, "sharded is None; expected True or False"),
        ("mode", "apart", "mode is 'apart'; expected one of"),
        ("settings", {}, "settings is dict; expected EstimationSettings"),
        ("rank", 64, r"penalty.rank cannot be set.*replace\(penalty.settings, rank=64\)"),
    ],
)
def test_options_that_are_set_are_checked(name: str, value: Any, message: str) -> None:
    """As in the constructor, or a penalty would save what no other can load."""
    penalty = EKFACPenalty()
    before = dict(vars(penalty))
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(penalty, name, value)
    assert dict(vars(penalty)) == before


def test_classes_of_the_users_own_have_attributes_of_any_name() -> None:
    class Own(EKFACPenalty):
        def __init__(self) -> None:
            super().__init__()
            self.seed, self.search, self.rank = 3, "grid", 64

    penalty = Own()
    assert (penalty.seed, penalty.search, penalty.rank) == (3, "grid", 64)
    assert penalty.settings == EKFACPenalty().settings


def test_shallow_copies_have_strengths_of_their_own() -> None:
    penalty = EKFACPenalty(5.0)
    other = copy.copy(penalty)
    other.strength = 77.0
    assert (penalty.strength, other.strength) == (5.0, 77.0)


def test_options_that_do_not_go_with_those_of_a_file(tmp_path: Path) -> None:
    EKFACPenalty(mc_samples=3).save(tmp_path / "penalty.safetensors")
    with pytest.raises(ValueError, match="mc_samples is 3") as caught:
        EKFACPenalty.load(tmp_path / "penalty.safetensors", fisher_type="type2")
    assert not isinstance(caught.value, SnapshotError)
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors", fisher_type="type2", mc_samples=1)
    assert loaded.settings.fisher_type == "type2"


def test_options_that_are_set_count(tmp_path: Path) -> None:
    penalty = EKFACPenalty()
    penalty.mode, penalty.weighting, penalty.include = "separate", "uniform", ["*"]
    penalty.settings = dataclasses.replace(penalty.settings, rank=64)
    assert (penalty.mode, penalty.include) == (Mode.SEPARATE, ("*",))
    penalty.consolidate(linear(), CE, DATA)
    for name, value in (("mode", "merged"), ("weighting", "examples")):
        with pytest.raises(ValueError, match=rf"{name} is '{value}'.*consolidated tasks"):
            setattr(penalty, name, value)
    penalty.decay = 0.5
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors", decay=0.7)
    assert (loaded.decay, loaded.mode, loaded.settings.rank) == (0.7, Mode.SEPARATE, 64)
    with pytest.raises(ValueError, match="decay is 7; expected a number from 0 to 1"):
        EKFACPenalty.load(tmp_path / "penalty.safetensors", decay=7)


@pytest.mark.parametrize("decay", [0, 1, 0.5])
def test_decays(decay: float) -> None:
    assert exact_penalty(decay=decay).decay == decay


# --- what is learned ---


def test_one_task_by_the_formula() -> None:
    model = linear()
    penalty = learned(model, strength=2.5)
    matrix, anchor = fisher(model), flat(model)
    move(model, 1)
    delta = flat(model) - anchor
    value = penalty(model)
    value.backward()
    assert_close(value.detach(), 0.5 * 2.5 * delta @ matrix @ delta)
    assert_close(flat_gradient(model), 2.5 * matrix @ delta)


@crossed(
    mode=["merged", "separate"],
    weighting=["examples", "uniform"],
    loss=[CE, SUMMED],
    decay=[1.0, 0.4],
    now=[None, 20],
)
def test_weights_of_tasks(
    mode: str, weighting: str, loss: nn.Module, decay: float, now: int | None
) -> None:
    """The tasks are one, so that merging is exact; they stand for other numbers of examples."""
    model, strength, counts, weights = linear(), 2.5, (30, 70, 50), (1.0, 0.3, 2.0)
    matrix, anchor = fisher(model), flat(model)
    penalty = exact_penalty(strength, mode, weighting=weighting, decay=decay, fisher_type="type2")
    for count, weight in zip(counts, weights, strict=True):
        penalty.consolidate(model, loss, DATA, num_data=count, weight=weight)
    penalty.current_num_data = now
    move(model, 1)
    delta, examples = flat(model) - anchor, now or counts[-1]
    omega = 0.0
    for t, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        share = count / examples if weighting == "examples" else 1.0
        omega += weight * decay ** (2 - t) * share
    if loss is SUMMED:
        omega *= examples
    assert_close(penalty(model), 0.5 * strength * omega * delta @ matrix @ delta)
    largest = float(torch.linalg.eigvalsh(matrix).max())
    assert penalty.max_curvature == pytest.approx(strength * omega * largest, rel=1e-9)
    assert penalty.num_tasks == 3


def test_tasks_have_the_weight_one_unless_told() -> None:
    model = linear()
    told, untold = exact_penalty(fisher_type="type2"), exact_penalty(fisher_type="type2")
    untold.consolidate(model, CE, DATA)
    told.consolidate(model, CE, DATA, weight=1.0)
    move(model, 1)
    assert torch.equal(told(model), untold(model))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_temperature_squared(temperature: float) -> None:
    model = linear()
    penalty = learned(model, temperature=temperature)
    dense = dense_operator(penalty.terms[0].operator.blocks, {"weight": (3, 4)})
    assert_close(dense, fisher(model, temperature))


def test_operators_tell_the_temperature() -> None:
    """Beside everything that was chosen for their estimation."""
    for temperature in (1.0, 3.0):
        penalty = learned(linear(), temperature=temperature, seed=4)
        told = penalty.terms[0].operator.provenance.settings
        assert told["temperature"] == temperature
        assert told["seed"] == 4


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_weights_that_single_precision_cannot_hold(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    penalty = exact_penalty(mode=mode, fisher_type="type2")
    data = [(INPUTS.float(), TARGETS)]
    with pytest.raises(ValueError, match="Fisher matrix of 'weight' is not finite"):
        penalty.consolidate(model, CE, data, weight=1e39)
    assert penalty.num_tasks == 0
    penalty.consolidate(model, CE, data, weight=1e-30)
    assert penalty.num_tasks == 1


def test_model_is_evaluated_and_left_in_its_mode() -> None:
    """No dropout in a Fisher matrix."""
    inner = linear()
    model = nn.Sequential(inner, nn.Dropout(0.9)).train()
    penalty = learned(model)
    assert_close(
        dense_operator(penalty.terms[0].operator.blocks, {"0.weight": (3, 4)}), fisher(inner)
    )
    assert model.training
    assert model[1].training


def test_tensors_that_are_not_the_models_are_named_as_they_were_given() -> None:
    model = linear()
    with pytest.raises(ValueError, match=r"^params 'mine' \(shape \[3, 4\]\) is not a parameter"):
        exact_penalty().consolidate(model, CE, DATA, params={"mine": model.weight.clone()})


def test_each_task_has_a_seed_of_its_own() -> None:
    """Sampled labels: of one example, several samples tell one seed from another."""
    model = linear()

    def traces(seed: int, tasks: int) -> list[float]:
        penalty = exact_penalty(mode="separate", seed=seed, mc_samples=5)
        for _ in range(tasks):
            penalty.consolidate(model, CE, DATA)
        return [float(term.operator.trace) for term in penalty.terms]

    found = traces(7, 6)
    assert found == [traces(7 + t, 1)[0] for t in range(6)]
    assert len(set(found)) > 1


def test_anchor_is_a_copy_apart_from_autograd() -> None:
    model = linear()
    penalty = learned(model)
    anchor = penalty.terms[0].anchor["weight"]
    before = anchor.clone()
    move(model, 1)
    assert torch.equal(anchor, before)
    assert not anchor.requires_grad
    assert not torch.equal(model.weight, anchor)


def test_forward_and_sizes_of_batches() -> None:
    """Inputs that are no tensor: what the model makes of them, and how many they are."""
    model = linear()
    data = [({"rows": INPUTS.repeat(3, 1)}, TARGETS.repeat(3)), ({"rows": INPUTS}, TARGETS)]
    penalty = exact_penalty(fisher_type="type2", batch_size_fn=lambda inputs: len(inputs["rows"]))
    penalty.consolidate(model, CE, data, forward=lambda inputs: model(inputs["rows"]))
    assert penalty.terms[0].operator.num_data == 4
    dense = dense_operator(penalty.terms[0].operator.blocks, {"weight": (3, 4)})
    assert_close(dense, 4 * fisher(model))  # a merged term carries its weight, the four examples


def test_bytes_of_everything_that_is_kept() -> None:
    penalty = learned(linear())
    # Two bases, the eigenvalues and the anchor, in float64.
    assert penalty.nbytes == 8 * (3 * 3 + 4 * 4 + 3 * 4 + 3 * 4)
    assert penalty.float().nbytes == 4 * (3 * 3 + 4 * 4 + 3 * 4 + 3 * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_data": 0}, "^num_data is 0; expected a positive integer"),
        ({"num_data": 2.0}, "^num_data is 2.0; expected a positive integer"),
        ({"weight": -1.0}, "^weight is -1.0"),
    ],
)
def test_bad_arguments_of_a_task_are_named(arguments: dict[str, Any], message: str) -> None:
    penalty = exact_penalty()
    with pytest.raises((ValueError, TypeError), match=message):
        penalty.consolidate(linear(), CE, DATA, **arguments)
    assert penalty.num_tasks == 0


def test_wrapped_models_have_plain_names() -> None:
    model = linear()
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(nn.DataParallel(model), CE, DATA)
    assert list(penalty.terms[0].anchor) == ["weight"]
    move(model, 1)
    assert penalty(nn.DataParallel(model)).item() == penalty(model).item() > 0


def test_parameters_that_an_earlier_task_had_and_this_one_lacks() -> None:
    """Merged terms keep the anchors of what was not consolidated again."""
    model = linear(bias=True)
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, CE, DATA, params=[model.weight])
    first = model.weight.detach().clone()
    move(model, 1)
    penalty.consolidate(model, CE, DATA, params=[model.bias])
    (term,) = penalty.terms
    assert set(term.anchor) == {"weight", "bias"}
    assert torch.equal(term.anchor["weight"], first)
    assert torch.equal(term.anchor["bias"], model.bias)
    move(model, 2)
    assert set(penalty.deltas(dict(model.named_parameters()))) == {
        name for stack in penalty.stacks for name in stack.block.parameters
    }
    penalty.consolidate(model, CE, DATA)
    (term,) = penalty.terms
    assert torch.equal(term.anchor["weight"], model.weight)
    assert penalty(model).item() == 0.0


# --- before the first task ---


def test_nothing_learned_yet() -> None:
    penalty = exact_penalty(3.0)
    assert penalty({}).item() == 0.0
    assert penalty({}).shape == ()
    half = {"w": torch.ones(2, dtype=torch.bfloat16), "v": torch.ones(2)}
    assert penalty(half).dtype == torch.bfloat16
    assert penalty.max_curvature == 0.0
    assert penalty.scale == 3.0
    assert penalty.deltas({}) == {}
    assert penalty.protected({}) == {}


def test_examples_have_one_loss_term_each_until_a_task_says_otherwise() -> None:
    penalty = exact_penalty(3.0)
    assert penalty.current_num_loss_terms == 1
    penalty.current_num_data = 12
    assert penalty.current_num_loss_terms == 12


# --- parameters that are left out ---


def without(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n != name}


def test_missing_parameters_are_left_out_with_one_warning() -> None:
    model = linear(bias=True)
    penalty = learned(model, strict=False)
    move(model, 1)
    expected = learned(linear(bias=True), include=["weight"])
    with pytest.warns(
        UserWarning,
        match=r"^parameter 'bias' is missing in the model, or smaller than when "
        r"consolidated, and not protected any more \(strict=False\)$",
    ):
        value = penalty(without(model, "bias"))
    assert_close(value, expected(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        penalty(without(model, "bias"))
        assert not caught
        penalty({"weight": model.weight[:2], "bias": model.bias})
    assert [str(w.message).split("'")[1] for w in caught] == ["weight"]


@pytest.mark.parametrize(
    "call",
    [
        lambda penalty, parameters: penalty(parameters),
        lambda penalty, parameters: penalty.deltas(parameters),
        lambda penalty, _: penalty.consolidate(linear(), CE, DATA),
    ],
    ids=["value", "deltas", "consolidate"],
)
def test_warning_points_at_the_line_of_the_user(call: Callable[..., Any]) -> None:
    """Whatever frames of this package and of torch lie in between."""
    penalty = learned(linear(bias=True), strict=False)
    parameters = without(linear(bias=True), "bias")
    with pytest.warns(UserWarning, match="'bias' is missing") as caught:
        call(penalty, parameters)
    assert [warning.filename for warning in caught] == [__file__]


def test_missing_parameters_count_as_unmoved() -> None:
    model = linear(bias=True)
    penalty = learned(model, strict=False, separate_weight_and_bias=False)
    move(model, 1)
    at_anchor = {"weight": model.weight, "bias": penalty.terms[0].anchor["bias"]}
    expected = penalty(at_anchor).item()
    with pytest.warns(UserWarning, match="'bias' is missing"):
        assert penalty(without(model, "bias")).item() == expected > 0
    deltas = penalty.deltas(without(model, "bias"))
    (stack,) = penalty.stacks
    weight, bias = stack.block.parameters
    assert torch.equal(deltas[bias], torch.zeros(1, 3, dtype=torch.float64))
    assert deltas[weight].shape == (1, 3, 4)


def test_deltas_are_computed_in_the_precision_of_the_blocks() -> None:
    """The difference of two numbers of half precision is known better than they are."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).bfloat16()
    penalty = exact_penalty(fisher_type="type2")
    penalty.consolidate(model, CE, [(INPUTS.bfloat16(), TARGETS)])
    with torch.no_grad():
        model.weight.mul_(1.5)
    (delta,) = penalty.deltas({"weight": model.weight.detach()}).values()
    anchor = penalty.terms[0].anchor["weight"]
    assert delta.dtype == torch.float32
    assert torch.equal(delta[0], model.weight.detach().float() - anchor.float())
    assert penalty(model).dtype == torch.float32


# --- state ---


def test_state_has_plain_keys_under_a_prefix() -> None:
    penalty = learned(linear())
    plain, below = penalty.state_dict(), nn.ModuleDict({"p": penalty}).state_dict()
    assert set(below) == {f"p.{key}" for key in plain}
    assert "header" in plain
    other = nn.ModuleDict({"p": exact_penalty(3.0)})
    other.load_state_dict(below)
    assert other["p"].num_tasks == 1
    assert set(other["p"].state_dict()) == set(plain)


def test_state_before_the_first_task() -> None:
    penalty = exact_penalty(3.0)
    penalty.load_state_dict(exact_penalty().state_dict())
    assert penalty.num_tasks == 0
    assert penalty(linear()).item() == 0.0


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_state_brings_everything_back(mode: str, weighting: str) -> None:
    model = linear()
    options = {"mode": mode, "weighting": weighting}
    penalty, resumed = exact_penalty(2.0, **options), exact_penalty(2.0, **options)
    for count in (7, 13):
        penalty.consolidate(model, CE, DATA, num_data=count, weight=0.5)
        move(model, count)
    resumed.load_state_dict(penalty.state_dict())
    assert resumed.num_tasks == 2
    assert resumed.scale == penalty.scale
    assert torch.equal(resumed(model), penalty(model))
    assert [t.weight for t in resumed.terms] == [t.weight for t in penalty.terms]
    for either in (penalty, resumed):  # the seed of the next task counts on
        either.consolidate(model, CE, DATA, num_data=5)
    move(model, 3)
    assert torch.equal(resumed(model), penalty(model))


def test_casts_reach_everything_inside_other_modules() -> None:
    penalty = learned(linear())
    outer = nn.ModuleDict({"p": penalty})
    assert outer.float() is outer
    assert {t.dtype for t in penalty.terms[0].anchor.values()} == {torch.float32}
    assert penalty.terms[0].operator.dtype == torch.float32
    assert {stack.block.eigenvalues.dtype for stack in penalty.stacks} == {torch.float32}


def test_casts_change_nothing_but_tensors() -> None:
    penalty = exact_penalty(3.0)
    for count in (7, 13):
        penalty.consolidate(linear(), CE, DATA, num_data=count)
    assert penalty.scale == 3.0 / 13
    penalty.float()
    assert penalty.num_tasks == 2
    assert penalty.scale == 3.0 / 13


def test_files_in_a_dtype_of_their_own(tmp_path: Path) -> None:
    """Bases and eigenvalues are stored in it, and nothing else is."""
    penalty, stored = learned(linear()), []
    for dtype in (None, torch.bfloat16):
        penalty.save(tmp_path / "penalty", storage_dtype=dtype)
        stored.append({name: t.dtype for name, t in load_file(tmp_path / "penalty").items()})
    assert set(stored[0].values()) == {torch.float64}
    kept = {name for name, dtype in stored[1].items() if dtype != torch.bfloat16}
    assert kept == {name for name in stored[1] if "anchor" in name}
    assert len(kept) == 1
    with pytest.raises((TypeError, ValueError), match=r"^storage_dtype is torch\.int8"):
        penalty.save(tmp_path / "penalty", storage_dtype=torch.int8)


def test_options_in_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    state = learned(linear())._state.to_dict()
    header = json.loads(header_text(state))
    header["options"]["strength"] = -1.0
    # With a digest that is right.
    files.save({**state, "header": json.dumps(header)}, tmp_path / "penalty")
    with pytest.raises(
        SnapshotError, match=r"snapshot's 'options' cannot be used: strength is -1.0; expected"
    ):
        EKFACPenalty.load(tmp_path / "penalty")


def test_casts_reach_what_was_added_to_a_penalty() -> None:
    penalty = learned(linear())
    penalty.register_buffer("extra", torch.ones(2, dtype=torch.float64))
    penalty.child = linear()
    penalty.float()
    assert penalty.extra.dtype == penalty.child.weight.dtype == torch.float32
    penalty.to_empty(device="meta", recurse=False)
    assert penalty.extra.device == penalty.terms[0].anchor["weight"].device == torch.device("meta")
    assert penalty.child.weight.device == torch.device("cpu")


# --- learning rates ---


def test_learning_rates() -> None:
    model = linear()
    penalty = learned(model, strength=2.5)
    largest = 2.5 * float(torch.linalg.eigvalsh(fisher(model)).max())
    assert penalty.max_curvature == pytest.approx(largest)
    assert penalty.check_learning_rate(1.99 / largest) is True
    assert penalty.check_learning_rate(0) is True
    with pytest.warns(UserWarning, match=r"learning rate \S+ × .* \(strength 2.5\) is 2.01, more"):
        assert penalty.check_learning_rate(2.01 / largest) is False
    with pytest.raises(ValueError, match=r"^learning_rate is -1"):
        penalty.check_learning_rate(-1)


def test_losses_of_another_reduction_are_refused() -> None:
    model = linear()
    penalty = learned(model)
    with pytest.raises(
        ValueError,
        match=r"^loss_func has reduction 'sum', but earlier tasks had 'mean'; expected the same "
        r"for all tasks$",
    ):
        penalty.consolidate(model, SUMMED, DATA)
    assert penalty.num_tasks == 1
