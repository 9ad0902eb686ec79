"""Complex parameters have no diagonal of their own; real ones that are viewed as complex do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from tests.helpers.exact import exact_penalty
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import dense_ggn, parameter_shapes

CE = nn.CrossEntropyLoss()


def seeded(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator, dtype=torch.float64)


DATA = [(seeded(6, 4), torch.tensor([0, 1, 2, 0, 1, 1]))]


class Spectral(nn.Module):
    """Linear layers around complex numbers, whose parameters are complex, or real and viewed."""

    def __init__(self, *, viewed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5).double()
        numbers = {"mixing": seeded(5, 5, 2), "scale": seeded(5, 2)}
        for name, values in numbers.items():
            setattr(self, name, nn.Parameter(values if viewed else torch.view_as_complex(values)))
        self.last = nn.Linear(5, 3).double()
        self.viewed = viewed

    def forward(self, x: Tensor) -> Tensor:
        mixing, scale = self.mixing, self.scale
        if self.viewed:
            mixing, scale = torch.view_as_complex(mixing), torch.view_as_complex(scale)
        hidden = self.first(x).to(torch.cdouble) @ mixing * scale + scale
        return self.last(hidden.abs())


@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_complex_parameters_are_refused_all_at_once(unsupported: str) -> None:
    model = Spectral(viewed=False)
    message = (
        r"parameters 'mixing', 'scale' are complex.* unsupported='skip'.*"
        r"exclude=\['mixing', 'scale'\].*view_as_complex.*unsupported='diagonal'"
    )
    with pytest.raises(ValueError, match=message):
        EKFACLinearOperator(model, CE, list(model.parameters()), DATA, unsupported=unsupported)
    penalty = exact_penalty(unsupported=unsupported)
    with pytest.raises(ValueError, match=message):
        penalty.consolidate(model, CE, DATA)
    assert penalty.num_tasks == 0


@pytest.mark.parametrize("how", ["skip", "exclude", "params"])
def test_the_others_are_exact_without_them(how: str) -> None:
    model = Spectral(viewed=False)
    kept = [n for n, p in model.named_parameters() if not p.is_complex()]
    options = {"skip": {"unsupported": "skip"}, "exclude": {"exclude": ["mixing", "scale"]}}
    penalty = exact_penalty(mode="separate", fisher_type="type2", **options.get(how, {}))
    params = [model.get_parameter(name) for name in kept] if how == "params" else None
    if how == "skip":
        with pytest.warns(UserWarning, match=r"'mixing', 'scale'; they are left out"):
            penalty.consolidate(model, CE, DATA)
    else:
        penalty.consolidate(model, CE, DATA, params=params)
    dense = dense_ggn(model, CE, kept, *DATA[0])
    assert_exact_diagonal(penalty.terms[0].operator, dense, parameter_shapes(model, kept))
    penalty(model).backward()


def test_nothing_is_left_of_a_model_of_complex_numbers() -> None:
    model = Spectral(viewed=False)
    params = {name: p for name, p in model.named_parameters() if p.is_complex()}
    with pytest.raises(ValueError, match=r"no parameter is left: .*'mixing', 'scale'"):
        EKFACLinearOperator(model, CE, params, DATA, unsupported="skip")


def test_real_parameters_that_are_viewed_as_complex() -> None:
    """No rule multiplies complex numbers, which would need conjugates; the diagonal is exact."""
    model = Spectral(viewed=True)
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"'mixing' is used by .* 'scale' is used by .*no rule"):
        EKFACLinearOperator(model, CE, params, DATA)
    with pytest.warns(UserWarning, match=r"'mixing', 'scale'; .* exact diagonal"):
        operator = EKFACLinearOperator(
            model, CE, params, DATA, fisher_type="type2", unsupported="diagonal"
        )
    dense = dense_ggn(model, CE, list(params), *DATA[0])
    assert_exact_diagonal(operator, dense, parameter_shapes(model, list(params)))


def test_weights_that_come_out_of_complex_numbers_are_as_any_other() -> None:
    """A convolution whose kernel is parametrised by its spectrum."""

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.spectrum = nn.Parameter(seeded(3, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.fft.irfft(torch.view_as_complex(self.spectrum), n=4)
            return nn.functional.linear(x, weight)

    model = Kernel()
    operator = EKFACLinearOperator(model, CE, list(model.parameters()), DATA, fisher_type="type2")
    dense = dense_ggn(model, CE, ["spectrum"], *DATA[0])
    assert_exact_diagonal(operator, dense, parameter_shapes(model, ["spectrum"]))
