"""Parameters for which there is no rule: refused, taken element by element, or left out."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases import WITHOUT_RULE, Case
from tests.helpers.exactness import Setting, assert_exact_diagonal, exact_matrix_of
from tests.helpers.oracles import assert_close, block_matrix, dense_block

over_cases = pytest.mark.parametrize("case", WITHOUT_RULE, ids=str)


def without_rule(case: Case) -> set[str]:
    """Return the names of the parameters that no rule covers."""
    return {
        name for layout in case.layouts if layout.kind == "diagonal" for name in layout.parameters
    }


def operator(case: Case, unsupported: str) -> EKFACLinearOperator:
    """Estimate with a choice of what to do, and whatever warnings come with it."""
    model = case.model()
    params = {name: model.get_parameter(name) for name in case.names(model)}
    return EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        params,
        case.data("ce"),
        fisher_type=FisherType.TYPE2,
        check_deterministic=False,
        unsupported=unsupported,
    )


@over_cases
def test_error_names_a_parameter_and_the_way_out(case: Case) -> None:
    """By default nothing is silently approximated."""
    with pytest.raises(ValueError, match="unsupported=") as raised:
        operator(case, "error")
    assert any(name in str(raised.value) for name in without_rule(case))


@over_cases
def test_diagonal_is_exact_and_warns(case: Case) -> None:
    """The exact diagonal for these parameters, blocks for the others, one warning for each name."""
    setting = Setting(case)
    with pytest.warns(UserWarning, match="diagonal") as warned:
        result = operator(case, "diagonal")
    messages = " ".join(str(warning.message) for warning in warned)
    assert {name for name in setting.shapes() if repr(name) in messages} == without_rule(case)
    dense, shapes = exact_matrix_of(setting), setting.shapes()
    assert_exact_diagonal(result, dense, shapes)
    for block in result.blocks:
        if {*block.parameters} <= without_rule(case):
            assert block.gradient_basis is None
            assert block.activation_basis is None
            exact = block_matrix(dense, shapes, block.parameters).diagonal(dim1=1, dim2=2)
            assert_close(dense_block(block).diagonal(dim1=1, dim2=2), exact)


@over_cases
def test_skip_leaves_out_and_warns(case: Case) -> None:
    """The others are as they would be had only they been asked for."""
    left_out = without_rule(case)
    with pytest.warns(UserWarning, match="left out") as warned:
        result = operator(case, "skip")
    messages = " ".join(str(warning.message) for warning in warned)
    assert all(repr(name) in messages for name in left_out)
    setting = Setting(case)
    assert [*result.parameter_shapes] == [n for n in setting.shapes() if n not in left_out]
    for block in result.blocks:
        assert not left_out & {*block.parameters}
        groups = block.eigenvalues.shape[0]
        matrix = block_matrix(
            exact_matrix_of(setting), setting.shapes(), block.parameters, groups, block.transposed
        )
        exact = matrix.diagonal(dim1=1, dim2=2).sum()
        assert_close(block.trace, exact)


@over_cases
@pytest.mark.parametrize("choice", ["diagonal", "skip"])
def test_nothing_is_said_where_there_are_rules(case: Case, choice: str) -> None:
    """Without the parameters in question the choice has no effect, and no warning."""
    model = case.model()
    params = {n: p for n, p in model.named_parameters() if n not in without_rule(case)}
    if not params:
        pytest.skip("no other parameters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = EKFACLinearOperator(
            model, nn.CrossEntropyLoss(), params, case.data("ce"), unsupported=choice
        )
    assert [*result.parameter_shapes] == [*params]


@pytest.mark.filterwarnings("ignore:there is no rule:UserWarning")
def test_nothing_is_left_when_all_is_skipped() -> None:
    """A model without a single known use cannot be estimated by skipping."""
    case = next(case for case in WITHOUT_RULE if case.name == "bag-of-tokens")
    model = case.model()
    params = {name: model.get_parameter(name) for name in without_rule(case)}
    with pytest.raises(ValueError, match=r"0\.w"):
        EKFACLinearOperator(
            model, nn.CrossEntropyLoss(), params, case.data("ce"), unsupported="skip"
        )


def test_choice_is_checked() -> None:
    """Another word is refused with those that would do."""
    with pytest.raises(ValueError, match=r"'error'.*'diagonal'.*'skip'"):
        operator(WITHOUT_RULE[0], "ignore")


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_are_more_than_tables_are_refused(options: dict[str, Any]) -> None:
    """One changes its weight in the forward pass, the other its gradient in the backward pass."""
    model = nn.Sequential(nn.Embedding(4, 3, **options), nn.Flatten(), nn.Linear(6, 2))
    data = [(torch.randint(4, (3, 2)), torch.randn(3, 2))]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"0.weight.*{next(iter(options))}"):
        EKFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
