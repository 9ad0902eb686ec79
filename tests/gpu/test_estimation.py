"""Estimation where the model is, from data that are elsewhere, against dense matrices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.linalg import eigenvalues
from tests.helpers.cases import BY_NAME
from tests.helpers.devices import GPU, on, random_state
from tests.helpers.exactness import (
    EXACT_FISHERS,
    Setting,
    assert_exact_diagonal,
    exact_matrix,
    exact_matrix_of,
    off_diagonal,
)
from tests.helpers.oracles import Fisher, block_matrix, dense_ggn, in_own_basis, parameter_shapes
from tests.helpers.penalties import Batches

CASES = (
    "tanh-mlp",
    "conv2d-stride-groups",
    "embedding-tied",
    "batch-norm2d",
    "attention-batch-first",
    "weight-norm-conv",
)


@pytest.mark.parametrize("budget", [1, 2**30], ids=["two-passes", "one-pass"])
@pytest.mark.parametrize("fisher", EXACT_FISHERS)
@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_are_exact(
    device: torch.device, name: str, fisher: Fisher, budget: int
) -> None:
    setting = Setting(BY_NAME[name], fisher=fisher)
    model = setting.case.model().to(device)
    operator = setting.estimate(model=model, memory_budget=budget)
    assert {t.device for block in operator.blocks for t in block.tensors.values()} == {device}
    assert_exact_diagonal(operator.to("cpu"), exact_matrix_of(setting), setting.shapes())


@pytest.mark.parametrize("loss", ["ce-weight-smooth-ignore", "bce-both-weights", "mse"])
def test_losses_with_weights(device: torch.device, loss: str) -> None:
    """The loss is moved with the model, as its weights have to be."""
    case = BY_NAME["tanh-mlp"]
    model = case.model().to(device)
    operator = EKFACLinearOperator(
        model,
        case.loss_func(loss).to(device),
        dict(model.named_parameters()),
        case.data(loss),
        fisher_type="type2",
    )
    dense = exact_matrix(case, loss, "mean", "type2")
    assert_exact_diagonal(operator.to("cpu"), dense, Setting(case).shapes())


def test_nested_inputs_are_moved(device: torch.device) -> None:
    """Some of a batch may be on the device already, and some be no tensor."""
    setting = Setting(BY_NAME["tanh-mlp"])
    model = setting.case.model().to(device)
    data = [
        ({"x": [x[:, :1], x[:, 1:].to(device)], "flag": True}, y)
        for x, y in setting.case.data(setting.loss)
    ]
    operator = EKFACLinearOperator(
        lambda inputs: model(torch.cat(inputs["x"], dim=1)),
        setting.loss_func(),
        dict(model.named_parameters()),
        data,
        fisher_type="type2",
        batch_size_fn=lambda inputs: len(inputs["x"][0]),
    )
    assert_exact_diagonal(operator.to("cpu"), exact_matrix_of(setting), setting.shapes())


@pytest.mark.parametrize("name", ["pooled-tokens", "conv2d-stride-groups", "embedding-tied"])
def test_chunks_of_every_size(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples are worked on one by one where chunks may have no size at all."""
    asked = []

    def nothing(where: torch.device) -> int:
        asked.append(where)
        return 1

    monkeypatch.setattr(eigenvalues, "chunk_bytes", nothing)
    setting = Setting(BY_NAME[name], fisher="empirical")
    operator = setting.estimate(model=setting.case.model().to(device))
    assert {*asked} == {device}
    assert_exact_diagonal(operator.to("cpu"), exact_matrix_of(setting), setting.shapes())


class Drawing:
    """Data that draw random numbers on a device whenever they are read, as some transforms do."""

    def __init__(self, data: Batches, device: torch.device) -> None:
        self.data, self.device = data, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.data:
            torch.rand(3, device=self.device)
            yield inputs, targets


def test_random_states_are_left_alone(device: torch.device) -> None:
    case = BY_NAME["tanh-mlp"]
    model = case.model().to(device)
    data = Drawing(case.data("ce"), device)
    states = random_state(device), random_state(torch.device("cpu"))
    parameters = dict(model.named_parameters())
    EKFACLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, fisher_type="mc")
    assert torch.equal(random_state(device), states[0])
    assert torch.equal(random_state(torch.device("cpu")), states[1])
    assert len(list(data)) == 3
    assert not torch.equal(random_state(device), states[0]), "reading draws nothing"


def test_labels_are_drawn_on_the_device_from_the_seed(device: torch.device) -> None:
    """The same bits again whatever has been drawn meanwhile, and others from another seed."""
    case = BY_NAME["tanh-mlp"]

    def drawn(seed: int, samples: int = 1) -> EKFACLinearOperator:
        torch.rand(1, device=device)
        model = case.model().to(device)
        return EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            dict(model.named_parameters()),
            case.data("ce"),
            fisher_type="mc",
            mc_samples=samples,
            seed=seed,
        )

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first.to_dense(), again.to_dense())
    assert not torch.equal(first.to_dense(), other.to_dense())
    exact = float(exact_matrix(case, "ce", "mean", "type2").trace())
    assert float(drawn(0, 100).trace) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_under_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Statistics are in single precision; only the model itself computes in half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    x, y = torch.randn(16, 6), torch.arange(16) % 3

    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            outputs: Tensor = model(inputs)
        assert outputs.dtype == dtype
        return outputs

    loss, parameters = nn.CrossEntropyLoss(), dict(model.named_parameters())
    operator = EKFACLinearOperator(forward, loss, parameters, [(x, y)], fisher_type="type2")
    assert operator.dtype == torch.float32
    assert operator.device == device
    whole, names = model.cpu().double(), list(parameters)
    dense = dense_ggn(whole, loss, names, x.double(), y)
    for block in operator.to("cpu", torch.float64).blocks:
        matrix = block_matrix(dense, parameter_shapes(whole, names), block.parameters)
        error = (block.eigenvalues - in_own_basis(block, matrix)).abs().max()
        assert error <= 0.02 * matrix.abs().max(), block.label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_under_autocast_around_everything(device: torch.device, dtype: torch.dtype) -> None:
    """Autocast that the caller has switched on lowers no covariance, basis or eigenvalue."""
    case = BY_NAME["tanh-mlp"]
    model = case.model().float().to(device)
    data = [(x.float(), y) for x, y in case.data("ce")]
    arguments = nn.CrossEntropyLoss(), dict(model.named_parameters()), data
    with torch.autocast(device.type, dtype):
        operator = EKFACLinearOperator(model, *arguments, fisher_type="type2")
    for block in operator.to("cpu").blocks:
        for basis in (block.gradient_basis, block.activation_basis):
            if basis is not None:
                gram = basis.mT @ basis
                assert float(off_diagonal(gram, torch.eye(gram.shape[-1])[None]).abs().max()) < 1e-5
        assert block.eigenvalues.dtype == torch.float32


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_memory_beyond_the_budget_is_not_used(device: torch.device) -> None:
    """Beside what the model's own passes need; measured by the allocator of the device."""
    mib = 2**20
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 16)).to(device)
    data = on(device, [(torch.randn(4096, 256), torch.arange(4096) % 16) for _ in range(2)])

    def peak(budget: int) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            dict(model.named_parameters()),
            data,
            fisher_type="type2",
            memory_budget=budget,
        )
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    peak(mib)  # cuBLAS and cuSOLVER take their workspaces once
    least, most = peak(mib), peak(2**34)
    assert peak(64 * mib) <= least + 64 * mib
    assert most > least + 64 * mib, "the data are too few to show anything"
