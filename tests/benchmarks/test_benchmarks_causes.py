"""The experiment that tells causes apart: its oracle, and the whole of it on the digits."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.causes.__main__ import main
from benchmarks.causes.curvatures import OldTasks, exact_penalty
from benchmarks.data import ImageData
from benchmarks.scenarios import PermutedImages


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def dense_value(model: nn.Module, anchor: dict[str, Tensor], images: Tensor) -> Tensor:
    """`½ Δᵀ (Σ_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n) Δ / N`, from Jacobians written out."""
    delta = torch.cat([(p - anchor[name]).flatten() for name, p in model.named_parameters()])
    total = torch.zeros((), dtype=torch.float64)
    for image in images:
        derivative = jacrev(lambda p, x=image: functional_call(model, p, (x,)))(anchor)
        rows = torch.cat([derivative[name].flatten(1) for name in anchor], dim=1)
        p = functional_call(model, anchor, (image,)).softmax(0)
        change = rows @ delta
        total = total + 0.5 * change @ (torch.diag(p) - torch.outer(p, p)) @ change
    return total / len(images)


def test_exact_penalty_is_the_dense_one() -> None:
    model = network()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = 3 * dense_value(model, anchor, images)
    found = exact_penalty(model, anchor, images, tasks=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-14)


def test_old_images_are_those_of_old_tasks(tiny_images: ImageData) -> None:
    scenario = PermutedImages(tiny_images, tasks=4, seed=1)
    old = OldTasks(scenario, tiny_images.train_inputs, tiny_images.train_labels)
    known = [tiny_images.train_inputs[:, scenario.permutations[task]] for task in range(4)]
    owners = [
        [bool((image == known[task]).all(dim=1).any()) for task in range(4)]
        for image in old.sample(2, 60)
    ]
    assert {tuple(row) for row in owners} == {
        (True, False, False, False),
        (False, True, False, False),
    }
    ((images, labels),) = old.batches(3, 12)
    assert len(images) == len(labels) == 12
    for image, label in zip(images, labels, strict=True):
        (row,) = (image == known[3]).all(dim=1).nonzero().flatten().tolist()
        assert label == tiny_images.train_labels[row]


@pytest.mark.slow
@pytest.mark.usefixtures("no_download")
def test_every_combination_is_run_and_remembers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--tasks 3 --epochs 8 --batch-size 32 --hidden 30 --exact-samples 200"
    folders = ["--data-root", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]
    assert main([*words.split(), *folders]) == 0
    document = json.loads((tmp_path / "out" / "causes.json").read_text(encoding="utf-8"))
    records = document["records"]
    assert [(r["curvature"], r["optimizer"]) for r in records] == [
        (curvature, optimizer)
        for curvature in ("stored", "refreshed", "exact")
        for optimizer in ("adam", "rotated-adam")
    ]
    for record in records:
        assert len(record["accuracies"]) == 3
        assert min(record["accuracies"]) > 0.6, record
    assert document["data"] == "digits"
    assert document["settings"]["learning_rate"] == 3e-3
    printed = capsys.readouterr().out
    assert "Accuracies are those on the last 249 training images" in printed.replace("\n", " ")
    assert "rotated-adam  refreshed" in printed


@pytest.mark.usefixtures("no_download")
def test_a_choice_of_combinations(tmp_path: Path) -> None:
    words = "--tasks 2 --epochs 1 --optimizers adam --curvatures stored,exact --seeds 3 4"
    folders = ["--data-root", str(tmp_path / "absent"), "--output", str(tmp_path)]
    assert main([*words.split(), *folders, "--hidden", "10", "8"]) == 0
    document = json.loads((tmp_path / "causes.json").read_text(encoding="utf-8"))
    assert [(r["seed"], r["curvature"]) for r in document["records"]] == [
        (3, "stored"), (3, "exact"), (4, "stored"), (4, "exact"),
    ]  # fmt: skip
    assert document["settings"]["hidden"] == [10, 8]


@pytest.mark.parametrize("words", ["--optimizers sgd", "--curvatures none", "--tasks 0", "--lr 0"])
def test_bad_options(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert words.split()[0] in capsys.readouterr().err
