"""The temperature that a snapshot finds, and damping, against sums that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import assert_close, dense_block
from tests.helpers.penalties import CE, make, task
from tests.helpers.thin import partial_traces

CASES = {
    "classes": (nn.CrossEntropyLoss(), (6, 5), "labels"),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), (6, 5), "labels"),
    "tokens": (nn.CrossEntropyLoss(), (6, 5, 3), "labels"),
    "ignored": (nn.CrossEntropyLoss(ignore_index=0), (6, 5, 3), "labels"),
    "weighted": (nn.CrossEntropyLoss(torch.tensor([0.0, 1, 2, 3, 4])), (6, 5), "labels"),
    "soft targets": (nn.CrossEntropyLoss(), (6, 5), "probabilities"),
    "binary": (nn.BCEWithLogitsLoss(), (6, 4), "bits"),
    "weighted bits": (nn.BCEWithLogitsLoss(torch.tensor([0.0, 1, 2, 3])), (6, 4), "bits"),
    "one bit": (nn.BCEWithLogitsLoss(), (6,), "bits"),
}


class Table(nn.Module):
    """Outputs that are looked up, so that they can be anything."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Linear(len(outputs), outputs[0].numel(), bias=False).double()
        self.shape = outputs.shape[1:]
        with torch.no_grad():
            self.outputs.weight.copy_(outputs.flatten(1).T if outputs.ndim > 1 else outputs[None])

    def forward(self, inputs: Tensor) -> Tensor:
        return (
            self.outputs(inputs).unflatten(1, self.shape)
            if self.shape
            else (self.outputs(inputs)[:, 0])
        )


def drawn(shape: tuple[int, ...], kind: str, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    outputs = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "bits":
        return outputs, torch.randint(2, shape, generator=generator).double()
    if kind == "probabilities":
        return outputs, torch.rand(shape, generator=generator).double().softmax(1)
    return outputs, torch.randint(5, (shape[0], *shape[2:]), generator=generator)


def mean_entropy(case: str, outputs: Tensor, targets: Tensor, temperature: float) -> float:
    """Prediction by prediction, with logarithms of sums of exponentials."""
    loss, _, kind = CASES[case]
    found: list[float] = []
    if kind == "bits":
        weights = torch.ones(outputs.shape[-1]) if loss.weight is None else loss.weight
        for row in outputs.reshape(len(outputs), -1):
            for x, weight in zip(row.tolist(), weights.tolist(), strict=False):
                p = 1 / (1 + math.exp(-x / temperature))
                if weight > 0:
                    found.append(-(p * math.log2(p) + (1 - p) * math.log2(1 - p)))
        return sum(found) / len(found)
    rows = outputs.movedim(1, -1).reshape(-1, 5)
    labels = targets.reshape(-1) if kind == "labels" else torch.full((len(rows),), 1)
    for row, label in zip(rows, labels.tolist(), strict=True):
        if label == loss.ignore_index or (loss.weight is not None and not loss.weight[label]):
            continue
        exponentials = [math.exp(x / temperature) for x in row.tolist()]
        parts = [e / sum(exponentials) for e in exponentials]
        found.append(-sum(p * math.log(p) for p in parts) / math.log(5))
    return sum(found) / len(found)


def told(penalty: EKFACPenalty) -> float:
    return float(penalty.terms[-1].operator.provenance.settings["temperature"])


@pytest.mark.parametrize("case", CASES)
def test_mean_entropy_is_as_wanted(case: str) -> None:
    loss, shape, kind = CASES[case]
    outputs, targets = drawn(shape, kind, 9.0)
    model, data = Table(outputs), [(torch.eye(6).double()[:4], targets[:4])]
    data.append((torch.eye(6).double()[4:], targets[4:]))
    penalty = EKFACPenalty()
    penalty.consolidate(model, loss, data)
    assert mean_entropy(case, outputs, targets, told(penalty)) == pytest.approx(0.8, abs=1e-5)
    # The matrix is that of this temperature, given by hand.
    other = EKFACPenalty(temperature=told(penalty))
    other.consolidate(model, loss, data)
    for a, b in zip(penalty.terms[0].operator.blocks, other.terms[0].operator.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (nn.CrossEntropyLoss(), 1e-3 * torch.randn(6, 5).double(), torch.arange(6) % 5),
        (nn.MSELoss(), 9 * torch.randn(6, 5).double(), torch.randn(6, 5).double()),
        (nn.CrossEntropyLoss(), torch.randn(6, 1).double(), torch.zeros(6).long()),
    ],
    ids=["soft already", "regression", "one class"],
)
@pytest.mark.filterwarnings("ignore:the Fisher matrix has vanished")
def test_one_where_there_is_nothing_to_soften(
    loss: nn.Module, outputs: Tensor, targets: Tensor
) -> None:
    penalty = EKFACPenalty()
    penalty.consolidate(Table(outputs), loss, [(torch.eye(6).double(), targets)])
    assert told(penalty) == 1.0


def test_masked_classes_count_nothing() -> None:
    outputs, targets = drawn((6, 5), "labels", 9.0)
    model = Table(outputs)
    mask = torch.tensor([0.0, 0, 0, -math.inf, -math.inf]).double()
    penalty = EKFACPenalty(fisher_type="empirical")
    with pytest.raises(ValueError, match="outputs are not finite"):
        penalty.consolidate(
            model, CE, [(torch.eye(6).double(), targets % 3)], forward=lambda x: model(x) + mask
        )


def test_each_snapshot_has_its_own_and_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.double().train()
    inputs, targets = task("plain", 0, 40)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    penalty = EKFACPenalty(mode="separate")
    for scale in (1.0, 30.0):
        with torch.no_grad():
            model[3].weight.copy_(before["3.weight"] * scale)
        penalty.consolidate(model, CE, [(inputs, targets)])
    first, second = (term.operator.provenance.settings["temperature"] for term in penalty.terms)
    assert second > first >= 1.0
    with torch.no_grad():
        model[3].weight.copy_(before["3.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_little_memory_looks_at_fewer_batches() -> None:
    outputs, targets = drawn((64, 5), "labels", 9.0)
    rows = torch.eye(64).double()
    data = [(rows[i : i + 1], targets[i : i + 1]) for i in range(64)]
    found = []
    for budget in (2**20, 500):
        penalty = EKFACPenalty(memory_budget=budget)
        penalty.consolidate(Table(outputs), CE, data)
        found.append(told(penalty))
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_errors_of_models_name_the_batch() -> None:
    model = make("plain")
    good = task("plain", 0)
    with pytest.raises(RuntimeError) as caught:
        EKFACPenalty().consolidate(model, CE, [good[0], (torch.randn(3, 7).double(), good[1][1])])
    assert "over batch 1 of data" in "".join(
        getattr(caught.value, "__notes__", ["batch 1 of data"])
    )
    with pytest.raises(ValueError, match="data is empty"):
        EKFACPenalty().consolidate(model, CE, [])
    with pytest.raises(ValueError, match="iterator"):
        EKFACPenalty().consolidate(model, CE, iter(good))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_damping_adds_a_part_of_the_means_to_every_block(name: str, joint: bool) -> None:
    """The mean over everything, and over the outputs for each direction of the inputs."""
    options: dict[str, Any] = {"temperature": 1.0, "separate_weight_and_bias": not joint}
    damped, plain = EKFACPenalty(damping=0.3, **options), EKFACPenalty(damping=0.0, **options)
    model = make(name)
    for penalty in (damped, plain):
        penalty.consolidate(model, CE, task(name, 0))
    blocks = plain.terms[0].operator.blocks
    for block, other in zip(blocks, damped.terms[0].operator.blocks, strict=True):
        _, d_out, d_in = block.shape
        groups = dense_block(block)
        mean = sum(matrix.trace() for matrix in groups) / (len(groups) * d_out * d_in)
        for matrix, got in zip(groups, dense_block(other), strict=True):
            _, of_inputs = partial_traces(matrix.numpy(), (d_out, d_in))
            added = torch.from_numpy(of_inputs) / d_out + mean * torch.eye(d_in).double()
            assert_close(got, matrix + 0.3 * torch.kron(torch.eye(d_out).double(), added))


@pytest.mark.parametrize("value", [-0.1, math.inf, "auto", None])
def test_damping_is_checked(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="damping is"):
        EKFACPenalty(damping=value)
