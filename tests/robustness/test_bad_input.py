"""Every bad input is refused by name, and nothing is changed by the attempt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()
BUILDERS = [
    pytest.param(lambda *a, **k: EKFACLinearOperator(*a, **k), id="operator"),
    pytest.param(lambda m, loss, p, d: exact_penalty().consolidate(m, loss, d, params=p), id="pen"),
]


def batch(n: int = 6, d: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, d, generator=generator)
    return inputs, torch.randint(classes, (n,), generator=generator)


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3))


def check_refused(
    message: str,
    model: nn.Module,
    *,
    loss: Any = CE,
    params: Any = None,
    data: Any = None,
    error: type[Exception] = ValueError,
    build: Callable[..., Any] = EKFACLinearOperator,
) -> None:
    """Check the message, and that model, gradients, modes and random state are untouched."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    chosen = list(model.parameters()) if params is None else params
    with pytest.raises(error, match=message):
        build(model, loss, chosen, [batch()] if data is None else data)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


class DistanceLayer(nn.Module):
    """Uses its weight by an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.weight)


class Bag(nn.Module):
    """Sums rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(2, 5, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x > 0).long())


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DistanceLayer(), r"parameter '1\.weight'.*cdist.*no rule.*linear.*unsupported='diagonal'"),
        (Bag(), r"parameter '1\.layer\.weight'.*embedding_bag.*no rule"),
        (
            nn.BatchNorm1d(5, track_running_stats=False),
            r"parameter '1\.bias', '1\.weight': a BatchNorm layer .*statistics of the batch",
        ),
    ],
)
def test_unsupported_layer_is_named(build: Any, layer: nn.Module, message: str) -> None:
    check_refused(message, net(layer), build=build)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.T, x.T @ grads[0]


class OwnFunctionLayer(DistanceLayer):
    def forward(self, x: Tensor) -> Tensor:
        return OwnFunction.apply(x, self.weight)


class Sequence(nn.Module):
    """Runs a layer that wants sequences, or two inputs, on rows of features."""

    def __init__(self, layer: nn.Module, form: str) -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "recurrent":
            return self.layer(x[:, None])[0][:, 0]
        return self.layer(x, x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Sequence(nn.LSTM(5, 5, batch_first=True), "recurrent"), r"layer\.weight_ih_l0'.*lstm"),
        (Sequence(nn.GRUCell(5, 5), "two inputs"), r"1\.layer\.weight_ih'.*gru_cell"),
        (OwnFunctionLayer(), r"'1\.weight' is used by an operation that cannot be observed"),
    ],
)
def test_other_ways_of_using_parameters_are_seen(layer: nn.Module, message: str) -> None:
    check_refused(message, net(layer))


def test_unsupported_layer_is_fine_when_its_parameters_are_left_out() -> None:
    model = net(DistanceLayer())
    params = [*model[0].parameters(), *model[2].parameters()]
    operator = EKFACLinearOperator(model, CE, params, [batch()])
    assert list(operator.parameter_shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert operator.trace > 0


def test_weight_and_input_confused() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.weight, x).mT

    check_refused(
        r"parameter '1\.weight' is used by .*linear, for which there is no rule", net(Squared())
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_model_cannot_be_observed() -> None:
    check_refused("cannot be observed", torch.jit.script(net(nn.ReLU())))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("loss", "message", "error"),
    [
        (nn.L1Loss(), r"loss_func is L1Loss.*fisher_type='empirical'", TypeError),
        (lambda f, y: f.sum(), r"loss_func is <lambda>.*Known are CrossEntropyLoss", TypeError),
        (nn.CrossEntropyLoss(reduction="none"), r"='none'; expected 'mean' or 'sum'", ValueError),
        (nn.CrossEntropyLoss(weight=-torch.ones(3)), r"class weights \[-1.*at least 0", ValueError),
        (
            nn.BCEWithLogitsLoss(pos_weight=-torch.ones(3)),
            r"pos_weight \[-1.*at least 0",
            ValueError,
        ),
    ],
)
def test_unsupported_loss_or_reduction(
    build: Any, loss: Any, message: str, error: type[Exception]
) -> None:
    check_refused(message, net(), loss=loss, build=build, error=error)


def one_shot() -> Iterator[tuple[Tensor, Tensor]]:
    yield batch()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("data", "message", "error"),
    [
        ([], "data is empty", ValueError),
        (one_shot(), r"one-shot iterator \(generator\)", ValueError),
        (iter([batch()]), "one-shot iterator", ValueError),
        (7, "data is int; expected an iterable", TypeError),
        ([7], r"batch 0 of data is a int; expected \(inputs, targets\)", ValueError),
        ([(*batch(), 1)], r"batch 0 of data is a tuple of 3 items", ValueError),
        ([(batch()[0], [0, 1])], "batch 0 of data has targets of type list", TypeError),
        ([batch(), ("text", batch()[1])], "batch 1.*batch_size_fn", TypeError),
        ([(torch.zeros(0, 4), torch.zeros(0).long())], "has 0 examples", ValueError),
    ],
)
def test_bad_data(build: Any, data: Any, message: str, error: type[Exception]) -> None:
    check_refused(message, net(), data=data, error=error, build=build)


def test_one_shot_iterator_keeps_its_batches() -> None:
    iterator = one_shot()
    check_refused("one-shot", net(), data=iterator)
    assert len(list(iterator)) == 1


@pytest.mark.parametrize(
    ("loss", "targets", "message", "error"),
    [
        (CE, torch.zeros(5).long(), r"outputs \[6, 3\] and targets \[5\] do not fit", ValueError),
        (
            CE,
            torch.full((6,), 3),
            r"run from 3 to 3; expected class indices from 0 to 2",
            ValueError,
        ),
        (CE, torch.full((6,), -1), r"run from -1", ValueError),
        (CE, -torch.rand(6, 3), r"floating-point, but not class probabilities", ValueError),
        (CE, torch.rand(6), r"targets \[6\] \(class probabilities\) do not fit", ValueError),
        (CE, torch.zeros(6) > 1, r"dtype torch.bool; expected class indices", TypeError),
        (
            nn.CrossEntropyLoss(weight=torch.ones(4)),
            torch.zeros(6).long(),
            "has 4 class weights; expected 3",
            ValueError,
        ),
        (
            nn.BCEWithLogitsLoss(weight=torch.ones(6, 1, 1)),
            torch.rand(6, 3),
            r"weight of shape \[6, 1, 1\] cannot be broadcast",
            ValueError,
        ),
        (nn.BCEWithLogitsLoss(), 2 * torch.ones(6, 3), "targets run from 2 to 2", ValueError),
        (nn.MSELoss(), torch.rand(6), r"outputs \[6, 3\] and targets \[6\] do not fit", ValueError),
        (nn.MSELoss(), torch.zeros(6, 3).long(), r"torch.int64; expected floating", TypeError),
        (nn.BCEWithLogitsLoss(), torch.rand(6, 2), r"do not fit", ValueError),
    ],
)
def test_outputs_and_targets_that_do_not_fit(
    loss: Any, targets: Tensor, message: str, error: type[Exception]
) -> None:
    check_refused(
        f"batch 0 of data: .*{message}", net(), loss=loss, error=error, data=[(batch()[0], targets)]
    )


def test_later_batch_is_named() -> None:
    check_refused("batch 1 of data: .*do not fit", net(), data=[batch(), (batch()[0], batch(4)[1])])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_activation_names_the_layer(value: float) -> None:
    inputs, targets = batch()
    inputs[2, 1] = value

    class Cleaned(nn.Module):
        """Hides the bad value from the outputs, but not from its first layer's input."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).nan_to_num(0.0, 1.0, -1.0))

    check_refused(
        "layer inputs of 'first.weight' are not finite", Cleaned(), data=[(inputs, targets)]
    )


def test_not_finite_gradient_names_the_layer() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("inf")

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Steep.apply(x)

    check_refused("output gradients of '0.weight' are not finite", net(Layer()))


def test_not_finite_outputs() -> None:
    model = net()
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="batch 0 of data: the model's outputs are not finite"):
        EKFACLinearOperator(model, CE, list(model.parameters()), [batch()])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("params", "message", "error"),
    [
        ([], "params is empty", ValueError),
        (
            [torch.nn.Parameter(torch.zeros(5, 4))],
            r"'0' \(shape \[5, 4\]\) is not a param",
            ValueError,
        ),
        ({"w": torch.nn.Parameter(torch.zeros(2))}, "'w' .*is not a parameter of the", ValueError),
        (torch.zeros(3), "params is Tensor; expected a list", TypeError),
        (["0.weight"], "params '0' is str; expected a floating-point", TypeError),
    ],
)
def test_bad_params(build: Any, params: Any, message: str, error: type[Exception]) -> None:
    check_refused(message, net(), params=params, error=error, build=build)


def test_parameter_given_twice() -> None:
    model = net()
    check_refused("more than once", model, params=[model[0].weight, model[0].weight])


def test_parameter_that_a_function_does_not_use() -> None:
    model, stranger = net(), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="parameter '1' is not used by model_func"):
        EKFACLinearOperator(lambda x: model(x), CE, [model[0].weight, stranger], [batch()])


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Accumulated(nn.Module):
    """Later examples depend on earlier ones, but not the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=0)


@pytest.mark.parametrize("layer", [Centred(), Accumulated()])
def test_mixed_examples_are_noticed(layer: nn.Module) -> None:
    check_refused("depend on other examples' values in the layer of '0.weight'", net(layer))


def test_examples_on_no_axis() -> None:
    model = nn.Sequential(_Mean(), nn.Linear(4, 3), _Repeat())
    check_refused(
        r"other examples' values in the layer of '1.weight' \(input shape \[1, 4\]\)", model
    )


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=0, keepdim=True)


class _Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(6, 3)


def test_input_modified_in_place_after_use() -> None:
    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.last(x)
            x.zero_()
            return y

    check_refused("input of the layer of 'last.weight' was modified in place", Spoiled())


def test_outputs_that_are_no_tensor() -> None:
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return (self.last(x),)

    check_refused("model returned tuple; expected a tensor", Tuple(), error=TypeError)


def test_joint_block_needs_a_fixed_pair() -> None:
    class TwoBiases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.b1, self.b2 = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight, self.b1).tanh(), self.weight, self.b2)

    model = TwoBiases()
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"'weight' and 'b1', .* are used in different pairs"):
        EKFACLinearOperator(model, CE, params, [batch()], separate_weight_and_bias=False)
    assert EKFACLinearOperator(model, CE, params, [batch()]).trace > 0


def test_random_model_or_data_is_noticed() -> None:
    model = net()

    def noisy(x: Tensor) -> Tensor:
        return model(F.dropout(x, 0.5, training=True))

    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"two estimates of the block of '0' .*random"):
        EKFACLinearOperator(noisy, CE, params, [batch()], fisher_type="type2")
    with pytest.warns(RuntimeWarning, match="outputs are random: two runs of the first batch"):
        EKFACLinearOperator(noisy, CE, params, [batch()], check_deterministic=False)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        (
            {"fisher_type": "full"},
            "fisher_type is 'full'; expected one of 'type2'",
            ValueError,
        ),
        ({"kfac_approx": 3}, "kfac_approx is 3; expected one of 'expand'", ValueError),
        ({"mc_samples": 0}, "mc_samples is 0; expected a positive", ValueError),
        ({"mc_samples": 1.5}, "mc_samples is 1.5; expected a positive", TypeError),
        ({"seed": "x"}, "seed is 'x'; expected an integer", TypeError),
        ({"memory_budget": -1}, "memory_budget is -1", ValueError),
        ({"num_data": 0}, "num_data is 0", ValueError),
        ({"num_per_example_loss_terms": 2}, "num_per_example_loss_terms is 2, but", ValueError),
        ({"batch_size_fn": 6}, "batch_size_fn is 6; expected a function", TypeError),
        (
            {"batch_size_fn": lambda x: 4},
            "for 4 examples, as batch_size_fn counts them",
            ValueError,
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, error: type[Exception]) -> None:
    model = net()
    with pytest.raises(error, match=message):
        EKFACLinearOperator(model, CE, list(model.parameters()), [batch()], **options)


def test_model_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="model_func is 3; expected a module or a function"):
        EKFACLinearOperator(3, CE, list(net().parameters()), [batch()])


@pytest.mark.parametrize(
    ("vectors", "message", "error"),
    [
        ([torch.zeros(5, 4)], "got 1 tensors; expected 4", ValueError),
        (
            [torch.zeros(5, 4)] * 4,
            r"'1.weight' got a tensor of shape \[5, 4\]; expected \[3, 5\] or \[3, 5, K\]",
            ValueError,
        ),
        ([None] * 4, "'0.weight' got NoneType", TypeError),
        (
            torch.zeros(44),
            r"cannot multiply with shape \[44\]; expected \[43\] or \[43, K\]",
            ValueError,
        ),
        (3.0, "cannot multiply with float", TypeError),
    ],
)
def test_bad_vectors(vectors: Any, message: str, error: type[Exception]) -> None:
    model = net()
    operator = EKFACLinearOperator(model, CE, list(model.parameters()), [batch()])
    with pytest.raises(error, match=message):
        operator @ vectors


def test_columns_must_agree() -> None:
    model = net()
    operator = EKFACLinearOperator(model, CE, list(model.parameters()), [batch()])
    vectors = [torch.zeros(*p.shape, 2 + i % 2) for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match=r"different numbers of columns: \[\(2,\), \(3,\)\]"):
        operator @ vectors


class Alternating(nn.Module):
    """Uses its parameters in another way in every call."""

    def __init__(self, *ways: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways, self.calls = ways, 0
        self.weight, self.other = (nn.Parameter(torch.randn(3, 4)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.zeros(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.ways[min(self.calls, len(self.ways)) - 1](self, x)


def test_layer_that_appears_in_the_second_pass() -> None:
    model = Alternating(
        lambda m, x: F.linear(x, m.weight),
        lambda m, x: F.linear(x, m.weight) + F.linear(x, m.other),
    )
    with pytest.raises(ValueError, match="'other' was used in the second pass over the data but"):
        EKFACLinearOperator(
            model, CE, [model.weight, model.other], [batch()],
            check_deterministic=False, memory_budget=1,
        )  # fmt: skip


@pytest.mark.parametrize("joint", [False, True])
def test_pairs_that_differ_between_batches(joint: bool) -> None:
    model = Alternating(
        lambda m, x: F.linear(x, m.weight, m.b1), lambda m, x: F.linear(x, m.weight, m.b2)
    )
    params, data = [model.weight, model.b1, model.b2], [batch(6), batch(5)]
    options: dict[str, Any] = {"check_deterministic": False, "separate_weight_and_bias": not joint}
    if not joint:
        assert EKFACLinearOperator(model, CE, params, data, **options).trace > 0
        return
    with pytest.raises(ValueError, match=r"'weight' is used in different pairs .*'weight\+b1' and"):
        EKFACLinearOperator(model, CE, params, data, **options)


def test_errors_of_the_users_own_kind_come_through_as_they_are() -> None:
    class OwnError(ValueError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fails(m: nn.Module, x: Tensor) -> Tensor:
        raise OwnError(1, 2)

    check_refused("^1 and 2$", Alternating(fails), error=OwnError)


def test_model_whose_outputs_have_another_shape_for_one_example() -> None:
    """Without a rule every example is run by itself, and must give what it gave in the batch."""

    def squeezed(m: Any, x: Tensor) -> Tensor:
        outputs = x @ m.weight.mT.sinh() + torch.cdist(x, m.other.cumsum(0))
        return outputs if len(x) > 1 else outputs[0]

    model = Alternating(lambda m, x: torch.ops.aten.add(squeezed(m, x), m.b1))
    with pytest.raises(ValueError, match="example 0 are not the same when it is run alone"):
        EKFACLinearOperator(
            model, CE, [model.weight, model.other, model.b1], [batch()], unsupported="diagonal"
        )
