"""The studies: what they measure, and from command line to file with small images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks import data as data_sets
from benchmarks.__main__ import main
from benchmarks.data import ImageData
from benchmarks.scenarios import PermutedImages
from benchmarks.studies.oracles import OldTasks, exact_penalty
from tests.benchmarks.helpers import DOUBLE


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, learnable_images: ImageData) -> ImageData:
    """Have small images loaded, whatever the folder."""
    monkeypatch.setattr(data_sets, "load_images", lambda root: learnable_images)
    return learnable_images


def call(name: str, words: str, folder: Path) -> Any:
    """Run a study, and return the document that it wrote."""
    assert main([f"study-{name}", *words.split(), "--output", str(folder)]) == 0
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_both_precisions_are_stored(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--epochs 2 --hidden 6 --batch-size 20 --lr 0.01 --fisher-samples 40 --tasks 3"
    words += " --methods rotated-ewc rotated-ewc-loss --seeds 3"
    records = call("storage", words, tmp_path)["records"]
    found = {(one["record"]["method"], one["precision"]): one for one in records}
    assert len(found) == 4
    for method in ("rotated-ewc", "rotated-ewc-loss"):
        whole, half = found[method, "float32"], found[method, "bfloat16"]
        # Two tasks follow a first one, and nothing changes where all bits are stored.
        assert whole["penalty_errors"] == [0.0, 0.0]
        assert all(0 < error < 0.05 for error in half["penalty_errors"])
        assert half["file_bytes"] < whole["file_bytes"]
    assert main(["permuted-mnist", *words.split(), "--output", str(tmp_path)]) == 0
    plain = json.loads((tmp_path / "permuted_mnist.json").read_text(encoding="utf-8"))["records"]
    stored = found["rotated-ewc", "float32"]["record"]
    assert stored["accuracy_matrix"] == plain[0]["accuracy_matrix"]
    assert "bfloat16" in capsys.readouterr().out


def test_exact_penalty_is_the_dense_one() -> None:
    """`½ Δᵀ (Σ_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n) Δ / N`, from Jacobians written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(7, 6, dtype=DOUBLE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    delta = torch.cat([(p - anchor[name]).flatten() for name, p in model.named_parameters()])
    expected = torch.zeros((), dtype=DOUBLE)
    for image in images:

        def logits(parameters: dict[str, Tensor], x: Tensor = image) -> Tensor:
            found: Tensor = functional_call(model, parameters, (x,))
            return found

        derivative = jacrev(logits)(anchor)
        change = torch.cat([derivative[name].flatten(1) for name in anchor], dim=1) @ delta
        p = logits(anchor).softmax(0)
        expected = expected + 3 / 2 * change @ (torch.diag(p) - torch.outer(p, p)) @ change / 7
    found = exact_penalty(model, anchor, images, tasks=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=1e-10,
        atol=1e-14,
    )


def test_old_images_are_those_of_old_tasks(tiny_images: ImageData) -> None:
    scenario = PermutedImages(tiny_images, tasks=4, seed=1)
    old = OldTasks(scenario, tiny_images.train_inputs, tiny_images.train_labels)
    known = [tiny_images.train_inputs[:, scenario.permutations[task]] for task in range(4)]
    owners = {
        tuple(bool((image == known[task]).all(dim=1).any()) for task in range(4))
        for image in old.sample(2, 60)
    }
    assert owners == {(True, False, False, False), (False, True, False, False)}
    ((images, labels),) = old.batches(3, 12)
    assert len(images) == len(labels) == 12
    for image, label in zip(images, labels, strict=True):
        (row,) = (image == known[3]).all(dim=1).nonzero().flatten().tolist()
        assert label == tiny_images.train_labels[row]


def test_causes_of_every_combination(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--tasks 2 --epochs 6 --batch-size 20 --hidden 8 --exact-samples 50 --seeds 3"
    document = call("causes", f"{words} --lr 0.02 --fisher-samples 100", tmp_path)
    records = document["records"]
    assert [(r["curvature"], r["update"], r["seed"]) for r in records] == [
        (curvature, update, 3)
        for curvature in ("stored", "refreshed", "exact")
        for update in ("loss", "rotated")
    ]
    assert all(min(record["accuracies"]) > 0.5 for record in records)
    assert document["settings"]["hidden"] == [8]
    assert document["settings"]["learning_rate"] == 0.02
    printed = capsys.readouterr().out
    assert "Accuracies are those on the last 20 training images" in printed
    assert "rotated   refreshed" in printed
