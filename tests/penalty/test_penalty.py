"""The penalty: value, gradient, modes, state, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, SnapshotError, merge
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

CE = nn.CrossEntropyLoss()


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)
    )
    return model.double()


class Unseen(nn.PReLU):
    """Has a slope that is used where no torch function shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.prelu(x, self.weight)


def task(seed: int, n: int = 9) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 2, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (n,), generator=generator)
    return [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]


def move(model: nn.Module, seed: int) -> None:
    """Change every parameter a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def operator_at(model: nn.Module, data: Any, seed: int) -> EKFACLinearOperator:
    return EKFACLinearOperator(model, CE, list(model.parameters()), data, seed=seed)


def dense(operator: EKFACLinearOperator) -> Tensor:
    return dense_operator(operator.blocks, operator.parameter_shapes)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_value_and_gradient_are_those_of_the_formula(mode: str) -> None:
    """½ λ Σ_t (N_t / N_now) (θ - θ*)ᵀ F_t (θ - θ*), built from dense matrices."""
    model = net()
    penalty = exact_penalty(2.5, mode, seed=3)
    anchors, operators, counts = [], [], (9, 7, 8)
    for t, count in enumerate(counts):
        data = task(t, count)
        penalty.consolidate(model, CE, data)
        operators.append(operator_at(model, data, seed=3 + t))
        anchors.append(flat(model))
        move(model, t)
    penalty.current_num_data = 20
    theta = flat(model)
    if mode == "separate":
        exact = [n * dense(op) for n, op in zip(counts, operators, strict=True)]
    else:
        folded = operators[0] * 9.0
        for operator, count in zip(operators[1:], counts[1:], strict=True):
            folded = merge([folded, operator], [1.0, float(count)])
        exact, anchors = [dense(folded)], anchors[-1:]
    deltas = [theta - anchor for anchor in anchors]
    value = sum(d @ F @ d for d, F in zip(deltas, exact, strict=True)) * 0.5 * 2.5 / 20
    gradient = sum(F @ d for d, F in zip(deltas, exact, strict=True)) * 2.5 / 20
    loss = penalty(model)
    loss.backward()
    torch.testing.assert_close(loss.detach(), value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in model.parameters()]), gradient, rtol=1e-9, atol=1e-12
    )
    assert penalty.num_tasks == 3
    assert len(penalty.terms) == (1 if mode == "merged" else 3)


@pytest.mark.parametrize("joint", [False, True])
def test_gradcheck(joint: bool) -> None:
    model = net()
    penalty = exact_penalty(1.3, "separate", separate_weight_and_bias=not joint)
    for t in range(2):
        penalty.consolidate(model, CE, task(t))
        move(model, t)
    names = [name for name, _ in model.named_parameters()]
    tensors = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def value(*values: Tensor) -> Tensor:
        return penalty(dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(value, tensors)
    assert torch.autograd.gradgradcheck(value, tensors)


def test_torch_func_sees_through_it() -> None:
    model = net()
    penalty = exact_penalty(2.0)
    penalty.consolidate(model, CE, task(0))
    move(model, 1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(penalty)(parameters)
    penalty(model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_is_zero_before_the_first_task_and_at_the_anchor() -> None:
    model, penalty = net(), exact_penalty(3.0)
    assert penalty(model).item() == 0.0
    assert penalty(model).dtype == torch.float64
    penalty.consolidate(model, CE, task(0))
    assert penalty(model).item() == 0.0
    move(model, 0)
    assert penalty(model).item() > 0.0


def test_strength_can_be_changed() -> None:
    model, penalty = net(), exact_penalty(1.0)
    penalty.consolidate(model, CE, task(0))
    move(model, 0)
    before = penalty(model).item()
    penalty.strength = 10.0
    assert penalty(model).item() == pytest.approx(10 * before)
    with pytest.raises(ValueError, match=r"strength is -1.0; expected a finite number"):
        penalty.strength = -1.0
    with pytest.raises(ValueError, match="current_num_data is 0; expected a positive integer"):
        penalty.current_num_data = 0
    assert penalty(model).item() == pytest.approx(10 * before)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_consolidating_a_model_that_shrank_is_refused(mode: str) -> None:
    penalty = exact_penalty(1.0, mode)
    data = [(torch.randn(9, 4), torch.randint(2, (9,)))]
    penalty.consolidate(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), CE, data)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[4, 4\], but the penalty"):
        penalty.consolidate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), CE, data)
    with pytest.raises(
        ValueError, match=r"'1.weight', '1.bias' are protected by the penalty, but the model"
    ):
        penalty.consolidate(nn.Sequential(nn.Linear(4, 5)), CE, data)
    assert penalty.num_tasks == 1


def test_batching_of_summed_and_mean_losses() -> None:
    """With a summed loss the counts are inside the operator, so nothing is weighted twice."""
    model = net()
    mean, total = exact_penalty(1.0, seed=1), exact_penalty(1.0, seed=1)
    mean.consolidate(model, CE, task(0))
    total.consolidate(model, nn.CrossEntropyLoss(reduction="sum"), task(0))
    move(model, 0)
    mean.current_num_data = 1
    torch.testing.assert_close(mean(model), total(model), rtol=1e-10, atol=0.0)


def test_sample_stands_for_its_task() -> None:
    model = net()
    sample, whole = exact_penalty(1.0, seed=1), exact_penalty(1.0, seed=1)
    sample.consolidate(model, CE, task(0), num_data=900)
    whole.consolidate(model, CE, task(0))
    move(model, 0)
    sample.current_num_data = whole.current_num_data = 9
    torch.testing.assert_close(sample(model), 100 * whole(model), rtol=1e-10, atol=0.0)


def test_new_heads_and_grown_layers_are_free() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = [(torch.randn(9, 4).double(), torch.randint(2, (9,)))]
    penalty = exact_penalty(1.0)
    penalty.consolidate(old, CE, data)
    grown = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, 5)).double()
    with torch.no_grad():
        grown[0].load_state_dict(old[0].state_dict())
        grown[2].weight[:2], grown[2].bias[:2] = old[2].weight, old[2].bias
    assert penalty(grown).item() == 0.0
    move(grown, 1)
    loss = penalty(grown)
    loss.backward()
    assert loss.item() > 0
    assert grown[2].weight.grad[:2].abs().sum() > 0
    assert grown[2].weight.grad[2:].abs().sum() == 0
    assert grown[3].weight.grad is None
    wider = [(data[0][0], torch.randint(5, (9,)))]
    penalty.consolidate(grown, CE, wider)
    assert penalty.terms[0].anchor["2.weight"].shape == (5, 6)
    assert penalty(grown).item() == 0.0


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_state_goes_through_torch_save_without_pickle(mode: str, tmp_path: Any) -> None:
    model, penalty = net(), exact_penalty(2.0, mode)
    for t in range(2):
        penalty.consolidate(model, CE, task(t))
        move(model, t)
    torch.save(penalty.state_dict(), tmp_path / "penalty.pt")
    state = torch.load(tmp_path / "penalty.pt", weights_only=True)
    before = copy.deepcopy(model.state_dict())
    resumed = exact_penalty(2.0, mode)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(model), penalty(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for p in (penalty, resumed):
        p.consolidate(model, CE, task(2))
    move(model, 5)
    assert torch.equal(resumed(model), penalty(model))
    assert resumed.num_tasks == 3


def test_state_as_part_of_a_larger_module() -> None:
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.penalty = net(), exact_penalty(1.0)

    learner, resumed = Learner(), Learner()
    learner.penalty.consolidate(learner.model, CE, task(0))
    move(learner.model, 0)
    resumed.load_state_dict(learner.state_dict())
    assert torch.equal(resumed.penalty(resumed.model), learner.penalty(learner.model))
    assert learner.penalty(learner.model).item() > 0


def spoil(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = {key.replace("%2E", "."): value for key, value in state.items()}
    key = "0/operator/3.weight/eigenvalues"
    if how == "missing":
        del state["0/operator/3.weight/gradient_basis"], state[key]
    elif how == "anchor":
        state["0/anchor/3.weight"] = state["0/anchor/3.weight"][:1]
    elif how == "no anchor":
        del state["0/anchor/3.weight"]
    elif how == "nan":
        state[key] = state[key] * float("nan")
    elif how == "negative":
        state[key] = state[key] - 1e6
    elif how == "extra":
        state["7/anchor/3.weight"] = torch.zeros(1)
    elif how == "header":
        state["header"] = "{"
    elif how == "no header":
        del state["header"]
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "'0/operator/3.weight/eigenvalues' is missing"),
        ("anchor", r"'0/anchor/3.weight' is torch.float64 of shape \[1, 12\]; expected"),
        ("no anchor", "'0/anchor/3.weight' is missing"),
        ("nan", "'0/operator/3.weight/eigenvalues' has values that are not finite"),
        ("negative", "'0/operator/3.weight/eigenvalues' has negative values"),
        ("extra", "unexpected key '7/anchor/3.weight'"),
        ("header", "'header' is not JSON"),
        ("no header", "'header' is NoneType; expected a uint8 tensor"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(how: str, message: str) -> None:
    model, penalty, other = net(), exact_penalty(1.0), exact_penalty(1.0)
    penalty.consolidate(model, CE, task(0))
    other.consolidate(model, CE, task(1))
    move(model, 0)
    before = other(model).item()
    with pytest.raises(SnapshotError, match=message):
        other.load_state_dict(spoil(penalty.state_dict(), how))
    assert other(model).item() == before
    assert other.num_tasks == 1


def test_state_of_another_mode_is_refused() -> None:
    with pytest.raises(SnapshotError, match="mode 'merged'; expected 'separate'"):
        exact_penalty(1.0, "separate").load_state_dict(exact_penalty(1.0).state_dict())


def test_failed_consolidation_leaves_the_penalty_as_it_was() -> None:
    model, penalty = net(), exact_penalty(1.0)
    penalty.consolidate(model, CE, task(0))
    move(model, 0)
    before = penalty(model).item()
    with pytest.raises(ValueError, match="reduction 'sum', but earlier tasks had 'mean'"):
        penalty.consolidate(model, nn.CrossEntropyLoss(reduction="sum"), task(1))
    with pytest.raises(ValueError, match="data is empty"):
        penalty.consolidate(model, CE, [])
    assert penalty(model).item() == before
    assert penalty.num_tasks == 1


def test_moves_and_casts_with_to() -> None:
    model, penalty = net(), exact_penalty(1.0)
    penalty.consolidate(model, CE, task(0))
    move(model, 0)
    expected = penalty(model).item()
    single = penalty.to(torch.float32)
    assert single is penalty
    assert penalty.terms[0].operator.dtype == torch.float32
    assert penalty(model.float()).item() == pytest.approx(expected, rel=1e-5)
    penalty.to("meta")
    with pytest.raises(ValueError, match=r"are on cpu, but the penalty on meta; call penalty.to\("):
        penalty(model)


def test_wrong_model_is_refused_by_name() -> None:
    model, penalty = net(), exact_penalty(1.0)
    penalty.consolidate(model, CE, task(0))
    with pytest.raises(
        ValueError, match=r"'0.weight', .* are protected by the penalty, but the model"
    ):
        penalty(nn.Linear(2, 2))
    smaller = {name: p[:1] for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"has shape \[1, 1, 3\], but the penalty protects"):
        penalty(smaller)
    with pytest.raises(TypeError, match=r"model is int; expected a torch.nn.Module"):
        penalty(3)
    with pytest.raises(TypeError, match=r"model is dict; expected a torch.nn.Module"):
        penalty.consolidate({}, CE, task(0))


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        ({"strength": -1}, "strength is -1", ValueError),
        ({"strength": float("nan")}, "strength is nan", ValueError),
        ({"strength": "3"}, "strength is '3'", TypeError),
        ({"mode": "online"}, "mode is 'online'; expected one of 'merged', 'separate'", ValueError),
        ({"fisher_type": "x"}, "fisher_type is 'x'", ValueError),
        ({"include": "fc*"}, "include is 'fc\\*'; expected a list of name patterns", TypeError),
        ({"exclude": [1]}, r"exclude is \[1\]; expected every pattern to be a string", TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        exact_penalty(**arguments)


def test_chosen_parameters_only() -> None:
    model, penalty = net(), exact_penalty(1.0)
    model[3].bias.requires_grad_(False)
    penalty.consolidate(model, CE, task(0))
    assert list(penalty.terms[0].anchor) == ["0.weight", "0.bias", "3.weight"]
    only = exact_penalty(1.0)
    only.consolidate(model, CE, task(0), params=[model[3].bias])
    assert list(only.terms[0].anchor) == ["3.bias"]
    renamed = exact_penalty(1.0)
    renamed.consolidate(model, CE, task(0), params={"mine": model[3].bias})
    move(model, 0)
    torch.testing.assert_close(renamed(model), only(model), rtol=0.0, atol=0.0)
    assert not model[3].bias.requires_grad


def test_names_are_chosen_by_patterns() -> None:
    model = net()
    penalty = exact_penalty(1.0, include=["*.weight", "3.*"], exclude=["0.*"])
    penalty.consolidate(model, CE, task(0))
    assert list(penalty.terms[0].anchor) == ["3.weight", "3.bias"]
    with_unseen = nn.Sequential(model[0], Unseen().double(), *model[1:])
    with pytest.raises(ValueError, match=r"exclude=\['1.weight'\]"):
        exact_penalty(1.0).consolidate(with_unseen, CE, task(0))
    penalty = exact_penalty(1.0, exclude=["1.*"])
    penalty.consolidate(with_unseen, CE, task(0))
    assert list(penalty.terms[0].anchor) == ["0.weight", "0.bias", "4.weight", "4.bias"]


def test_parameters_without_a_rule_are_skipped_or_diagonal() -> None:
    model = nn.Sequential(net()[0], Unseen().double(), *net()[2:])
    names = [name for name, _ in model.named_parameters()]
    skipping = exact_penalty(1.0, unsupported="skip")
    diagonal = exact_penalty(1.0, unsupported="diagonal", fisher_type="type2")
    with pytest.warns(UserWarning, match=r"no rule .*'1.weight'; they are left out"):
        skipping.consolidate(model, CE, task(0))
    with pytest.warns(UserWarning, match=r"no rule .*'1.weight'; .*exact diagonal"):
        diagonal.consolidate(model, CE, task(0))
    assert list(skipping.terms[0].anchor) == [name for name in names if name != "1.weight"]
    assert list(diagonal.terms[0].anchor) == names
    with torch.no_grad():
        model[1].weight += 0.5
    assert skipping(model).item() == 0.0
    # Merged operators are sums over examples, here of one task of nine.
    summed = diagonal.terms[0].operator.block("1.weight").eigenvalues.item()
    expected = 0.5 * 0.5**2 * summed / 9
    assert diagonal(model).item() == pytest.approx(expected)
    assert expected > 0
    restored = exact_penalty(1.0, unsupported="skip")
    restored.load_state_dict(skipping.state_dict())
    assert restored(model).item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ["head.*"]}, r"include pattern 'head.\*' matches no parameter .*'0.weight'"),
        ({"exclude": ["weight"]}, r"exclude pattern 'weight' matches no parameter"),
        ({"exclude": ["*"]}, r"no parameter is left to protect: of 4 in the model"),
    ],
)
def test_patterns_that_choose_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact_penalty(**arguments).consolidate(net(), CE, task(0))


def test_compiled_model_has_the_same_parameters() -> None:
    model, penalty = net(), exact_penalty(1.0)
    compiled = torch.compile(model, backend="eager")
    penalty.consolidate(compiled, CE, task(0))
    move(model, 0)
    assert penalty(compiled).item() == penalty(model).item() > 0


def test_shows_what_it_is() -> None:
    assert repr(exact_penalty(3.0)) == "EKFACPenalty(strength=3.0, mode='merged', tasks=0)"
