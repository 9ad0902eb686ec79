"""What a refusal advises is done, and then it works.

Each row provokes a refusal, and does afterwards what the message says: code in a message is run as
it is written there. All parameters concerned are in the first message, or the advice would lead to
the next one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rotate_ewc import (
    EKFACLinearOperator,
    EKFACPenalty,
    EmpiricalLoss,
    ModelLoss,
    merge,
)
from rotate_ewc.linalg.block import Block
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()

# What has no rule is told once more, by a warning, when the advice is followed.
pytestmark = pytest.mark.filterwarnings("ignore:there is no rule")


def seeded(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def labels(n: int = 6) -> Tensor:
    return torch.arange(n) % 3


def data(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(seeded(n, 4), labels(n))]


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3))


def estimate(model: nn.Module, batches: Any = None, **options: Any) -> EKFACLinearOperator:
    """An operator over all parameters, or over those that are not excluded."""
    exclude = options.pop("exclude", ())
    params = {name: p for name, p in model.named_parameters() if name not in exclude}
    function = options.pop("model_func", model)
    found = EKFACLinearOperator(
        function, options.pop("loss", CE), params, batches or data(), **options
    )
    assert float(found.trace) > 0
    return found


def consolidated(model: nn.Module, **options: Any) -> EKFACPenalty:
    penalty = exact_penalty(**options)
    penalty.consolidate(model, CE, data())
    return penalty


def refusal(call: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def written(message: str, pattern: str) -> Any:
    """Evaluate the code that a message has at the place of the pattern's group."""
    found = re.search(pattern, message, re.DOTALL)
    assert found is not None, message
    return eval(found[1])


def excluded(message: str) -> list[str]:
    names: list[str] = written(message, r"exclude=(\[.*?\])")
    return names


# ------------------------------------------------------------------ uses of parameters


class Distances(nn.Module):
    """Two parameters, used by two operations without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(seeded(5, 5))
        self.system = nn.Parameter(seeded(5, 5) + 5 * torch.eye(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(torch.linalg.solve(self.system, x, left=False), self.centres)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(seeded(5))
        self.second = nn.Parameter(seeded(5))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = Double.apply(Double.apply(x, self.first), self.second)
        return scaled


@pytest.mark.parametrize("layer", [Distances, Unseen])
@pytest.mark.parametrize("choice", ["diagonal", "skip", "exclude"])
def test_no_rule(layer: type[nn.Module], choice: str) -> None:
    model = net(layer())
    names = [f"1.{name}" for name, _ in model[1].named_parameters()]
    message = refusal(lambda: estimate(model))
    assert excluded(message) == sorted(names)
    if choice == "exclude":
        estimate(model, exclude=excluded(message))
        consolidated(model, exclude=excluded(message))
    else:
        option = written(message, f"unsupported=('{choice}')")
        found = estimate(model, unsupported=option)
        assert (names[0] in found.parameter_shapes) == (choice == "diagonal")


class Checkpointed(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, size))
        self.use_reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:  # which such checkpoints ask for
            x = x.clone().requires_grad_()
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return result


def test_reentrant_checkpoints() -> None:
    first, between = nn.Sequential(Checkpointed(4), *net()), net(Checkpointed(5))
    for model, place in ((first, 0), (between, 1)):
        message = refusal(lambda model=model: estimate(model))
        names = [f"{place}.inner.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
        assert excluded(message) == names
        if model is first:
            assert "Where no other parameter comes before them" in message
            estimate(model, exclude=names)
            estimate(model, unsupported=written(message, "unsupported=('skip')"))
        model[place].use_reentrant = written(message, "use_reentrant=(False)")
        assert names[0] in estimate(model).parameter_shapes


def test_inputs_that_are_modified_in_place() -> None:
    class Ruined(nn.Module):
        def __init__(self, *, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)
            self.head = nn.Linear(5, 3)
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            with torch.no_grad():
                detached = x.detach()
            hidden = self.a(x) + self.b(x)
            if self.in_place:
                detached.mul_(2)
            return self.head(hidden)

    message = refusal(lambda: estimate(Ruined(in_place=True)))
    assert "layer of 'a.weight', 'b.weight' was modified in place" in message
    assert "make that operation out-of-place" in message
    estimate(Ruined(in_place=False))


@pytest.mark.parametrize(("option", "value"), [("max_norm", 1.0), ("scale_grad_by_freq", True)])
def test_embeddings_that_are_more_than_tables(option: str, value: Any) -> None:
    class Tables(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = (nn.Embedding(5, 3, **options) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.a(x) + self.b(x)
            return outputs

    batches = [(torch.arange(5), labels(5))]
    model = Tables(**{option: value})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    message = refusal(lambda: estimate(model, batches))
    assert "'a.weight', 'b.weight'" in message
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    estimate(Tables(**{option: written(message, f"expected {option}=(\\w+)")}), batches)


def test_pairs_of_weight_and_bias_that_are_not_always_together() -> None:
    class Pairs(nn.Module):
        """Each weight has its bias the first time, and none the second."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a, self.b):
                x = F.linear(layer(x).tanh(), layer.weight)
            return x

    message = refusal(lambda: estimate(Pairs(), separate_weight_and_bias=False))
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        assert repr(name) in message
    estimate(Pairs(), separate_weight_and_bias=written(message, "separate_weight_and_bias=(True)"))


def test_uses_that_only_later_batches_show() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                return self.b(self.a(x))
            return torch.cdist(self.a(x), self.b.weight)

    batches = data(6) + data(4)
    model = Changing()
    message = refusal(lambda: estimate(model, batches, unsupported="skip"))
    estimate(model, batches, exclude=excluded(message))


# ------------------------------------------------------------------ the parameters that are given


def test_parameters_that_the_function_does_not_use() -> None:
    model, other = net(), net()
    params = {
        **dict(model.named_parameters()),
        **{f"o.{n}": p for n, p in other.named_parameters()},
    }
    message = refusal(lambda: EKFACLinearOperator(lambda x: model(x), CE, params, data()))
    names = excluded(message)
    assert names == [f"o.{name}" for name, _ in other.named_parameters()]
    left = {name: p for name, p in params.items() if name not in names}
    EKFACLinearOperator(lambda x: model(x), CE, left, data())


def test_parameters_of_another_model() -> None:
    model = net()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    message = refusal(lambda: EKFACLinearOperator(model, CE, copies, data()))
    assert all(f"'{i}' (shape" in message for i in range(4))
    assert "expected tensors from model.parameters(), not copies" in message
    EKFACLinearOperator(model, CE, list(model.parameters()), data())


def test_parameters_on_the_meta_device() -> None:
    model, weights = net().to("meta"), net().state_dict()
    message = refusal(lambda: estimate(model))
    assert "'0.weight', '0.bias', '1.weight', '1.bias'" in message
    assert "model.to_empty(device=...), then load_state_dict" in message
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    estimate(model)


def test_sparse_parameters() -> None:
    model = net()
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    message = refusal(lambda: estimate(model))
    assert excluded(message) == ["0.weight", "1.weight"]
    estimate(net(), exclude=excluded(message))
    assert "such as nn.Parameter(parameter.detach().to_dense())" in message
    for layer in model:
        parameter = layer.weight
        layer.weight = nn.Parameter(parameter.detach().to_dense())
    estimate(model)


def test_patterns_that_match_nothing() -> None:
    message = refusal(lambda: consolidated(net(), exclude=["first.*", "last.*"]))
    assert "exclude patterns 'first.*', 'last.*' match no parameter" in message
    consolidated(net(), exclude=written(message, r"names such as (\[.*?\])"))


def test_parameters_of_inference_mode() -> None:
    with torch.inference_mode():
        model = net()
    message = refusal(lambda: estimate(model))
    assert "made outside of torch.inference_mode" in message
    assert "'0.weight', '0.bias', '1.weight', '1.bias'" in message
    estimate(net())


# ------------------------------------------------------------------ data and outputs


class Output(dict[str, Tensor]):
    """Like the outputs of Hugging Face's models: a dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Transformer(nn.Module):
    """Takes keywords, and returns an output with a loss in it, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, features: Tensor, scale: Tensor) -> Output:
        logits = self.inner(features * scale)
        return Output(loss=logits.square().mean(), logits=logits)


def dictionaries(n: int = 6) -> list[dict[str, Tensor]]:
    return [{"features": seeded(n, 4), "scale": seeded(n, 1).exp(), "labels": labels(n)}]


def expected_of(model: Transformer) -> EKFACLinearOperator:
    (batch,) = dictionaries()
    inner = dict(model.inner.named_parameters())
    params = {f"inner.{name}": p for name, p in inner.items()}
    return EKFACLinearOperator(
        model.inner, CE, params, [(batch["features"] * batch["scale"], batch["labels"])]
    )


FORWARD = r"forward=(lambda batch: [^;]*?) \("


def followed(message: str, model: nn.Module, batches: Any) -> Tensor:
    """Take the advice as `forward` of a penalty, and as `model_func` of an operator."""
    assert "(for an operator, as model_func)" in message
    source = re.search(FORWARD, message)
    assert source is not None, message
    forward = eval(source[1], {"model": model})
    penalty = exact_penalty(mode="separate")
    penalty.consolidate(model, CE, batches, forward=forward)
    found = estimate(model, batches, model_func=forward)
    assert torch.equal(found.to_dense(), penalty.terms[0].operator.to_dense())
    return found.to_dense()


def unpacking(message: str, model: nn.Module) -> Callable[[Any], Any]:
    source = re.search(FORWARD, message)
    assert source is not None, message
    forward: Callable[[Any], Any] = eval(source[1], {"model": model})
    return forward


def pairs(message: str, batches: Any, **names: str) -> Any:
    source = re.search(r"data=(\[.*? in data\])", message)
    assert source is not None, message
    code = source[1]
    for name, meant in names.items():
        code = code.replace(name, meant)
    return eval(code, {"data": batches})


@pytest.mark.parametrize("target", ["labels", "category"])
def test_batches_that_are_dictionaries(target: str) -> None:
    """What the model returns is said when it has returned it."""
    model, batches = Transformer(), dictionaries()
    batches[0][target] = batches[0].pop("labels")
    message = refusal(lambda: estimate(model, batches))
    known = "'TARGET' is the one of ['features', 'scale', 'category'] that is the target"
    assert (known in message) == (target == "category")
    changed = pairs(message, batches, TARGET=target)
    forward = unpacking(message, model)
    message = refusal(lambda: estimate(model, changed, model_func=forward), TypeError)
    found = followed(message, model, changed)
    batches[0]["labels"] = batches[0].pop(target)
    assert torch.equal(found, expected_of(model).to_dense())


class Scaled(nn.Module):
    """Takes two arguments, and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, features: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.inner(features * scale)
        return y


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="errors have notes from 3.11 on")
@pytest.mark.parametrize("temperature", ["auto", 1.0])
@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_inputs_of_several_parts(kind: Any, temperature: Any) -> None:
    model = Scaled()
    features, scale = seeded(6, 4), seeded(6, 1).exp()
    named = {"features": features, "scale": scale}
    batches = [(named if kind is dict else kind(named.values()), labels())]
    penalty = EKFACPenalty(temperature=temperature)
    message = refusal(lambda: penalty.consolidate(model, CE, batches), TypeError)
    expected = EKFACLinearOperator(
        model.inner, CE, list(model.inner.parameters()), [(features * scale, labels())]
    )
    assert torch.equal(followed(message, model, batches), expected.to_dense())


def test_targets_that_are_the_last_of_three_items() -> None:
    model = Scaled()
    batches = [(seeded(6, 4), seeded(6, 1).exp(), labels())]
    message = refusal(lambda: estimate(model, batches))
    last = message[message.index("if the target is the last item") :]
    changed = pairs(last, batches)
    assert torch.equal(changed[0][1], labels())
    estimate(model, changed, model_func=unpacking(message, model))


def test_classes_on_the_last_axis() -> None:
    model, batches = net(), [(seeded(2, 5, 4), torch.arange(10).view(2, 5) % 3)]
    message = refusal(lambda: estimate(model, batches))
    forward = eval(written_code(message, r"forward=(lambda x: .*?) \(for"), {"model": model})
    found = estimate(model, batches, model_func=forward, fisher_type="type2")
    tokens = [(batches[0][0].flatten(0, 1), batches[0][1].flatten())]
    expected = estimate(model, tokens, fisher_type="type2")
    assert float(found.trace) == pytest.approx(float(expected.trace), rel=1e-5)


def written_code(message: str, pattern: str) -> str:
    found = re.search(pattern, message)
    assert found is not None, message
    return found[1]


def test_a_whole_whose_part_was_consolidated() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = net()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y

    model = Whole()
    penalty = consolidated(model.part)
    message = refusal(lambda: penalty.consolidate(model, CE, data()))
    code = written_code(message, r"\((penalty\.consolidate\(.*?\)) goes")
    eval(code, {"penalty": penalty, "model": model, "loss_func": CE, "data": data()})
    assert penalty.num_tasks == 2
    part = written_code(refusal(lambda: penalty(model)), r"consolidated: (\S+) ")
    assert float(penalty(eval(part, {"model": model})).detach()) == 0.0


@pytest.mark.parametrize("given", [(data(), CE), (data(),), (torch.utils.data.DataLoader([1]),)])
def test_data_in_the_place_of_the_loss(given: Any) -> None:
    message = refusal(lambda: EKFACPenalty().consolidate(net(), *given), TypeError)
    assert "expected consolidate(model, loss_func, data)" in message
    assert len(message) < 200


def test_parameters_that_are_not_finite() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    message = refusal(lambda: estimate(model))
    assert "because parameter '1.weight' is not finite" in message
    inputs = [(torch.full((6, 4), float("inf")), labels())]
    assert "though all parameters are" in refusal(lambda: estimate(net(), inputs))


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="errors have notes from 3.11 on")
def test_inputs_that_are_dictionaries() -> None:
    model = Transformer()
    (batch,) = dictionaries()
    targets = batch.pop("labels")
    batches = [(batch, targets)]
    message = refusal(lambda: estimate(model, batches), TypeError)
    assert "dict with ['features', 'scale'], and were given to the model as one argument" in message
    forward = unpacking(message, model)
    message = refusal(lambda: estimate(model, batches, model_func=forward), TypeError)
    found = followed(message, model, batches)
    assert torch.equal(found, expected_of(model).to_dense())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_outputs_of_transformers(temperature: float) -> None:
    model = Transformer()
    (batch,) = dictionaries()
    batches = [(batch, batch.pop("labels"))]

    def call() -> None:
        exact_penalty(temperature=temperature).consolidate(
            model, CE, batches, forward=lambda batch: model(**batch)
        )

    message = refusal(call, TypeError)
    assert "model returned Output" in message
    # With a temperature the function that is called is another one.
    assert torch.equal(followed(message, model, batches), expected_of(model).to_dense())


@dataclass
class Fields:
    aux: float
    scores: Tensor


@pytest.mark.parametrize(
    ("wrap", "code"),
    [
        (lambda x: (torch.arange(3), x), "model(batch)[1]"),
        (lambda x: {"n": 3, "out": x}, "model(batch)['out']"),
        (lambda x: Fields(0.0, x), "model(batch).scores"),
        (lambda x: Output(logits=x), "model(batch).logits"),
    ],
)
def test_outputs_that_are_no_tensor(wrap: Callable[[Tensor], Any], code: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.inner(x))

    model = Wrapped()
    message = refusal(lambda: estimate(model), TypeError)
    assert f"pass forward=lambda batch: {code} (" in message
    followed(message, model, data())


def test_data_that_can_be_read_once() -> None:
    message = refusal(lambda: estimate(net(), iter(data())))
    assert "such as a list" in message
    estimate(net(), list(iter(data())))


def test_inputs_whose_number_is_not_obvious() -> None:
    class Graphs:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    model = net()
    batches = [(Graphs(x), y) for x, y in data()]
    options: Mapping[str, Any] = {"model_func": lambda graphs: model(graphs.x)}
    message = refusal(lambda: estimate(model, batches, **options), TypeError)
    assert "pass batch_size_fn" in message
    estimate(model, batches, batch_size_fn=lambda graphs: len(graphs.x), **options)


# ------------------------------------------------------------------ losses


def test_losses_without_a_scale() -> None:
    message = refusal(lambda: estimate(net(), loss=nn.CrossEntropyLoss(reduction="none")))
    for reduction in re.findall(r"'(mean|sum)'", message):
        estimate(net(), loss=nn.CrossEntropyLoss(reduction=reduction))
    assert len(re.findall(r"'(mean|sum)'", message)) == 2


def test_losses_that_are_not_known() -> None:
    real = [(data()[0][0], seeded(6, 3))]
    message = refusal(lambda: estimate(net(), real, loss=nn.L1Loss()), TypeError)
    kind = written(message, r"Pass fisher_type=('\w+')")
    estimate(net(), real, loss=nn.L1Loss(), fisher_type=kind)
    classes = re.findall(r"\w+Loss(?=[, ]|$)", message.split("Known are")[1])
    assert {"CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss", "HuberLoss"} <= {*classes}
    last = {"NLLLoss": nn.LogSoftmax(dim=1), "BCELoss": nn.Sigmoid()}
    for name in classes:
        model = nn.Sequential(net(), last.get(name, nn.Identity()))
        targets: Any = seeded(6, 3).sigmoid()
        if name in ("CrossEntropyLoss", "NLLLoss"):
            targets = labels()
        if name == "GaussianNLLLoss":
            targets = targets, targets
        estimate(model, [(data()[0][0], targets)], loss=getattr(nn, name)())


def test_losses_that_count_differently() -> None:
    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        weights = targets + 1
        return (outputs[:, 0].square() * weights).sum() / weights.sum()

    options = {"fisher_type": "empirical"}
    message = refusal(lambda: estimate(net(), loss=weighted, **options))
    assert "EmpiricalLoss(loss, terms=...)" in message
    assert "return a number for each term" in message
    counted = EmpiricalLoss(weighted, terms=lambda outputs, targets: targets + 1)
    estimate(net(), loss=counted, **options)
    estimate(net(), loss=lambda f, y: f[:, 0].square() * (y + 1), **options)


def test_losses_that_a_model_returns() -> None:
    class Own(nn.Module):
        """Returns a loss for each example, and its outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.inner(x)
            return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}

    model, options = Own(), {"fisher_type": "empirical"}
    batch = {"x": data()[0][0], "labels": labels()}
    message = refusal(
        lambda: estimate(
            model,
            [(batch, None)],
            loss=lambda outputs, _: outputs["loss"],
            model_func=lambda batch: model(**batch),
            **options,
        )
    )
    assert "or ModelLoss, for a loss that the model computes itself" in message
    own = ModelLoss(lambda model, batch: model(**batch)["loss"])
    estimate(model, [batch], loss=own, **options)


def test_reductions_that_differ() -> None:
    penalty, model = consolidated(net()), net()
    loss = nn.CrossEntropyLoss(reduction="sum")
    message = refusal(lambda: penalty.consolidate(model, loss, data()))
    loss.reduction = written(message, r"earlier tasks had ('\w+')")
    penalty.consolidate(model, loss, data())


# ------------------------------------------------------------------ operators


def test_singular_operators() -> None:
    class Dead(nn.Module):
        """Two layers on which no output depends."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.a, self.b = net(), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.inner(x)
            return outputs

    operator = estimate(Dead())
    message = refusal(lambda: operator.inverse(damping=0.0))
    assert all(repr(f"{layer}.{kind}") in message for layer in "ab" for kind in ("weight", "bias"))
    assert "expected damping greater than 0" in message
    operator.inverse(damping=1e-3)


def test_blocks_of_different_kinds() -> None:
    separate = estimate(net())
    joint = estimate(net(), separate_weight_and_bias=False)
    message = refusal(lambda: merge([separate, joint]))
    assert "'0.weight', '0.bias', '1.weight', '1.bias'" in message
    assert "estimate both with the same separate_weight_and_bias" in message
    merge([separate, estimate(net(), separate_weight_and_bias=True)])


def test_large_matrices_are_products() -> None:
    size = 40_000
    block = Block(("weight",), None, None, torch.ones(1, size, 1))
    operator = EKFACLinearOperator.from_blocks(
        [block], {"weight": (size,)}, estimate(net()).provenance
    )
    message = refusal(operator.to_dense)
    assert "use products, or block(name)" in message
    assert torch.equal(operator @ torch.ones(size), torch.ones(size))
    assert operator.block("weight").trace == size


# ------------------------------------------------------------------ penalties and updates


def without(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name not in names}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: without(model, ["0.weight", "1.bias"]),
        lambda model: {
            n: p[:2] if n in ("0.weight", "1.bias") else p for n, p in model.named_parameters()
        },
    ],
    ids=["missing", "smaller"],
)
def test_parameters_that_do_not_fit(change: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    model = net()
    message = refusal(lambda: consolidated(model)(change(model)))
    assert "'0.weight'" in message
    assert "'1.bias'" in message
    lenient = consolidated(model, strict=written(message, r"strict=(False)"))
    with pytest.warns(UserWarning, match=r"parameters '0\.weight', '1\.bias' are missing"):
        lenient(change(model))


def attached_step(penalty: EKFACPenalty, model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with penalty.attach(optimizer, model):
        optimizer.step()


def test_attached_in_separate_mode() -> None:
    model = net()
    message = refusal(lambda: attached_step(consolidated(model, mode="separate"), model))
    attached_step(consolidated(model, mode=written(message, r"expected ('\w+')")), model)


def test_optimizers_of_joint_blocks() -> None:
    model = net()
    penalty = consolidated(model, separate_weight_and_bias=False)

    def step(penalty: EKFACPenalty, *, half: bool) -> None:
        model.zero_grad()
        CE(model(data()[0][0]), labels()).backward()
        if half:
            model[0].bias.grad = None
        attached_step(penalty, model)

    message = refusal(lambda: step(penalty, half=True))
    assert "Train all of them" in message
    step(penalty, half=False)
    option = written(message, "separate_weight_and_bias=(True)")
    step(consolidated(model, separate_weight_and_bias=option), half=True)


def test_optimizers_with_sparse_gradients() -> None:
    class Words(nn.Module):
        def __init__(self, *, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = (nn.Embedding(5, 3, sparse=sparse) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.a(x) + self.b(x)
            return outputs

    def step(sparse: bool) -> None:
        model = Words(sparse=sparse)
        penalty = exact_penalty()
        penalty.consolidate(model, CE, [(torch.arange(5), labels(5))])
        CE(model(torch.arange(5)), labels(5)).backward()
        attached_step(penalty, model)

    message = refusal(lambda: step(True))
    assert "'a.weight', 'b.weight'" in message
    step(written(message, "sparse=(False)"))


def test_loss_before_the_model() -> None:
    message = refusal(lambda: exact_penalty().consolidate(nn.MSELoss(), net(), data(6)))  # type: ignore[arg-type]
    assert "model is MSELoss" in message
    exact_penalty().consolidate(net(), nn.CrossEntropyLoss(), data(6))
