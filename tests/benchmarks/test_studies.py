"""The studies, from command line to file; that of stored snapshots with small images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data as data_sets
from benchmarks.__main__ import main
from benchmarks.data import ImageData
from benchmarks.studies import scale
from benchmarks.studies.drift import Learned
from benchmarks.studies.networks import PROBLEMS, decoder
from benchmarks.studies.processes import Case, Share
from benchmarks.studies.rank import CASES
from benchmarks.studies.scale import Decoder
from rotate_ewc import EKFACPenalty


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


def test_wide_layers_are_consolidated(tmp_path: Path, capsys: Any) -> None:
    assert tuple(PROBLEMS) == CASES
    (one,) = call("rank", "--cases few-examples --rank auto --threads 1", tmp_path)["records"]
    # The parameters themselves are the anchor, and four rows are not zero.
    assert one["parameter_bytes"] == 4 * (8 * 1500 + 1500)
    assert one["parameter_bytes"] < one["file_bytes"] <= 2 * one["parameter_bytes"]
    assert "few-examples" in capsys.readouterr().out
    assert main(["study-rank", "--rank", "0", "--output", str(tmp_path)]) == 1
    assert "--rank: rank is 0; expected a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_decoders_are_as_large_as_their_sizes_say(tied: bool) -> None:
    """Of which the plans for large ones are made."""
    whole = Decoder(64, 192, 2, 4, 2, 80, tied)
    small = whole.divided(2)
    assert small == Decoder(32, 96, 2, 2, 1, 40, tied)
    problem = decoder(small, sequences=3, length=5, batch_size=2)
    shapes = [tuple(p.shape) for p in problem.model.parameters() if p.ndim == 2]
    assert sorted(shapes) == sorted([*small.matrices * 2, *[(40, 32)] * (1 if tied else 2)])
    (x, y), _ = problem.data
    assert problem.model(x).shape == (2, 40, 5)
    assert y.shape == (2, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_plans_count_what_there_is(tied: bool) -> None:
    """Numbers of parameters, bytes of a penalty and operations of a plain pass of a small one."""
    sizes = Decoder(64, 192, 2, 4, 2, 160, tied)
    options = scale.Options(rank=8, sequences=6, length=16)
    expected = scale.plan("small", sizes, options)
    problem = decoder(sizes, options.sequences, options.length, 3)
    model, loss = problem.model, torch.nn.CrossEntropyLoss()
    assert expected.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        for x, y in problem.data:
            loss(model(x), y).backward()
    # Attention itself is not in the plan.
    assert 1.0 <= counter.get_total_flops() / expected.plain < 1.1
    penalty = EKFACPenalty(1.0, rank=8, temperature=1.0)
    penalty.consolidate(model, loss, problem.data)
    assert penalty.nbytes == expected.snapshot_bytes


def test_plans_of_large_decoders(tmp_path: Path, capsys: Any) -> None:
    assert main(["study-scale", "--rate", "1e11", "--output", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))["records"]
    found = {one["name"]: one["parameters"] / 1e9 for one in records}
    assert found == {
        "1b": pytest.approx(1.24, abs=0.01),
        "1b-eighth": pytest.approx(0.0195, abs=0.005),
        "8b": pytest.approx(8.03, abs=0.01),
    }
    assert all(one["snapshot_bytes"] < 1.5 * one["weight_bytes"] for one in records)
    assert "8030 million" in capsys.readouterr().out


def test_ratios_of_processes() -> None:
    """One process takes 4 s for passes and 6 s for three decompositions, two 2 s and 3 s."""
    alone = Share(10.0, [(2, 1.0), (3, 3.0), (2, 2.0)], 0)
    together = [Share(5.0, [(3, 3.0)], 100), Share(5.0, [(2, 1.0), (2, 2.0)], 300)]
    case = Case("a", [alone], [together])
    assert case.speedups() == (2.0, 2.0, 2.0)
    assert case.exchanged() == 300
    # Four: a second of passes, three of the largest decomposition, and one for what is exchanged.
    assert case.planned(4, 300.0) == pytest.approx(10.0 / 5.0)
    # No more than three have something to decompose.
    assert case.planned(8, 300.0) == pytest.approx(10.0 / 4.5)


@pytest.mark.slow
def test_processes_share_an_estimation(tmp_path: Path, capsys: Any) -> None:
    (one,) = call("processes", "--cases a --fraction 0.1 --rounds 1", tmp_path)["records"]
    # 1,000 images; the inputs and the outputs' gradients of the layers.
    assert one["activations"] == 1000 * 4 * (784 + 400 + 400 + 400 + 400 + 10)
    ((first, second),) = one["together"]
    assert first["trace"] == second["trace"]
    # Every factor is decomposed once.
    sizes = [size for share in (first, second) for size, _ in share["decompositions"]]
    assert sorted(sizes) == sorted(size for size, _ in one["alone"][0]["decompositions"])
    assert "decompositions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["study-processes", "--processes", "1", "--output", str(tmp_path)])
    assert "expected a whole number ≥ 2, got '1'" in capsys.readouterr().err


def test_old_answers_drift_away(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--tasks 2 --epochs 2 --hidden 6 --batch-size 20 --lr 0.01 --damping 0 0.03"
    streams = call("drift", words, tmp_path)["records"]
    assert [one["damping"] for one in streams] == [0.0, 0.03]
    for stream in streams:
        (look,) = stream["looks"]
        assert (look["after"], look["old"]) == (2, 1)
        assert 0 <= look["accuracy"] <= 1
        assert 0 < look["exact"] < look["actual"]
    assert "How far old answers move" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks 1", "--tasks: expected one of 2, 5, 10, got 1"),
        ("--tasks 3", "--tasks: expected one of 2, 5, 10, got 3"),
        # Its loop has no use for them.
        ("--schedule linear", "Unrecognized options: --schedule"),
        ("--plasticity 0.5", "Unrecognized options: --plasticity"),
        ("--device cpu", "Unrecognized options: --device"),
    ],
)
def test_options_without_a_drift(words: str, message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["study-drift", *words.split(), "--output", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_distances_of_a_network_that_is_linear() -> None:
    """What moves is what the Gauss-Newton matrix says, here of a penalty of one example, too."""
    torch.manual_seed(0)
    model, image, target = nn.Linear(4, 3).double(), torch.randn(1, 4).double(), torch.tensor([1])
    penalty = EKFACPenalty(
        1.0, damping=0.0, temperature=2.0, fisher_type="type2", separate_weight_and_bias=False
    )
    penalty.consolidate(model, nn.CrossEntropyLoss(), [(image, target)])
    learned = Learned(model, penalty, 1, image, target)
    before = model(image)[0].detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    look = learned.look(model, after=2)
    change, p = model(image)[0].detach() - before, torch.softmax(before / 2, dim=0)
    mean = sum(float(p[i] * change[i]) for i in range(3))
    distance = sum(float(p[i]) * (float(change[i]) - mean) ** 2 for i in range(3)) / 2
    assert look.actual == pytest.approx(distance, rel=1e-10)
    assert look.exact == pytest.approx(distance, rel=1e-10)
    assert look.penalty == pytest.approx(distance, rel=1e-6)
    assert (look.after, look.old) == (2, 1)
