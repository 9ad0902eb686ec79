"""The one command: its options, messages and exit codes; and whole runs on the digits."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks import data as data_sets
from benchmarks import experiment
from benchmarks.__main__ import COMMANDS, main
from benchmarks.configuration import SCENARIO_DEFAULTS, StreamOptions, settle
from benchmarks.data import ImageData
from benchmarks.methods import DEFAULT_METHODS
from benchmarks.permuted_mnist import Options, variants
from benchmarks.results import Job, Record
from benchmarks.suite import run as run_module
from benchmarks.suite import sweep as sweep_module
from tests.benchmarks.helpers import make_record, refused

ELSEWHERE = ("speed", "speed-penalty", "peers")
MINE = [name for name in COMMANDS if name not in ELSEWHERE]


def parsed(words: str) -> Any:
    """The options that a command would get."""
    name, *others = words.split()
    return tyro.cli(COMMANDS[name].load()[0], args=others)


# Command lines


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_help_of_every_command_imports_neither_torch_nor_avalanche() -> None:
    lines = [
        "import contextlib, io, sys",
        "from benchmarks.__main__ import main",
        f"for name in {MINE}:",
        "    with contextlib.suppress(SystemExit):",
        "        main([name, '--help'])",
        "print(*{'torch', 'avalanche'} & set(sys.modules), sep='', end='')",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("usage: python -m benchmarks ") == len(MINE)
    assert done.stdout.endswith("╯\n"), "and not the name of a module"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("permutd-mnist", "got 'permutd-mnist'; did you mean permuted-mnist?"),
        ("permuted-mnist --taks 3", "Unrecognized options: --taks, 3"),
        ("permuted-mnist --tasks x", "--tasks: expected a whole number ≥ 1, got 'x'"),
        ("permuted-mnist --tasks 0", "--tasks: expected a whole number ≥ 1, got '0'"),
        ("permuted-mnist --lr 0", "--lr: expected a finite number > 0, got '0'"),
        ("permuted-mnist --lr inf", "--lr: expected a finite number > 0, got 'inf'"),
        ("permuted-mnist --warm-up 2", "--warm-up: expected a finite number ≥ 0 and ≤ 1, got '2'"),
        ("permuted-mnist --optimizer a", "--optimizer: expected one of adam, adamw, "),
        (
            "permuted-mnist --temperature 0",
            "--temperature: expected a finite number > 0, or auto, ",
        ),
        ("permuted-mnist --ewc-lambda aut", "--ewc-lambda: expected a finite number ≥ 0, or auto,"),
        ("permuted-mnist --plasticity 1", "--plasticity: expected a finite number > 0 and < 1, "),
        ("run split_images", "--images: expected a folder for split_images"),
        (
            "run split_mnist --images tests",
            "--images: expected a folder for split_images, and none",
        ),
        ("run split_images --images Makefile", "--images: expected a folder, got 'Makefile'"),
        ("permuted-mnist --seeds", "--seeds: expected at least one value, got none"),
        ("permuted-mnist --hidden", "--hidden: expected at least one value, got none"),
        (
            "permuted-mnist --seeds 1 2 1",
            "--seeds: expected every value once, got 1 more than once",
        ),
        ("permuted-mnist --seeds 0,1", "--seeds: expected a whole number ≥ 0"),
        ("permuted-mnist --output Makefile", "--output: expected a folder, got 'Makefile'"),
        ("permuted-mnist --output", "Missing value for argument '--output'"),
        ("permuted-mnist --device here", "--device: expected a device that PyTorch can use "),
        ("run", "Missing from python -m benchmarks run: SCENARIO "),
        ("run mnist", "SCENARIO: expected one of "),
        ("run all --search-values 4", "--search-values: expected an odd number or 0, got 4"),
        ("run rotated_mnist --increment task", "--increment: expected a split stream, got "),
        ("study-storage --methods ewc", "--methods: expected one of rotated-ewc"),
        ("study-storage --tasks 1", "--tasks: expected at least 2, got 1"),
    ],
)
def test_wrong_words_are_refused_with_what_was_expected(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words, capsys)


def test_what_is_not_given_depends_on_scenario_and_data() -> None:
    options = parsed("run all")
    assert settle(options, "permuted_mnist") == settle(parsed("permuted-mnist"), "permuted_mnist")
    for name, defaults in SCENARIO_DEFAULTS.items():
        found = settle(options, name)
        assert found.scenario == name
        assert all(getattr(found, key) == value for key, value in defaults.items())
    quick = settle(options, "rotated_mnist", quick=True)
    assert (quick.tasks, quick.epochs, quick.batch_size) == (3, 2, 50)
    assert (quick.training_images, quick.fisher_samples) == (6_000, 1_000)
    digits = settle(options, "split_mnist", quick=True, digits=True, increment="class")
    assert (digits.epochs, digits.batch_size, digits.increment) == (10, 32, "class")


def test_what_is_given_is_as_it_was_given() -> None:
    words = "--tasks 7 --epochs 1 --hidden 5 5 --batch-size 9 --lr 0.5 --fisher-samples 0"
    words += " --training-images 0 --seeds 3 1 --replay 4 --schedule linear"
    words += " --temperature auto --plasticity 0.5 --images tests"
    options = parsed(f"run split_images {words}")
    found = settle(options, "split_images", quick=True, digits=True)
    assert (found.temperature, found.plasticity, found.images) == ("auto", 0.5, Path("tests"))
    assert (found.tasks, found.epochs, found.hidden, found.batch_size) == (7, 1, (5, 5), 9)
    assert (found.learning_rate, found.schedule, found.replay) == (0.5, "linear", 4)
    assert (found.fisher_samples, found.training_images) == (0, 0)
    assert options.seeds == (3, 1)
    assert found.as_dict()["hidden"] == [5, 5]


def test_the_folder_of_the_data_is_that_of_the_environment(monkeypatch: Any) -> None:
    assert parsed("run all --data-root here").data_root == Path("here")
    monkeypatch.setenv("ROTATE_EWC_DATA", "/somewhere")
    assert parsed("permuted-mnist").data_root == StreamOptions().data_root == Path("/somewhere")
    monkeypatch.delenv("ROTATE_EWC_DATA")
    assert parsed("run all").data_root == Path("data")


def test_variants_of_given_strengths() -> None:
    assert [variant.label for variant in variants(Options())] == list(DEFAULT_METHODS)
    words = "--methods ewc naive rotated-ewc si --baseline-ewc-lambda 0.5 100 --ewc-lambda 4"
    found = variants(parsed(f"permuted-mnist {words}"))
    labels = ["ewc[λ=0.5]", "ewc[λ=100]", "naive", "rotated-ewc", "si"]
    assert [variant.label for variant in found] == labels
    assert [variant.strength for variant in found] == [0.5, 100.0, None, 4.0, 1.0]
    words = "--methods rotated-ewc rotated-ewc-loss --ewc-lambda auto"
    found = variants(parsed(f"permuted-mnist {words}"))
    assert [variant.strength for variant in found] == ["auto", 1.0], "it is found in steps alone"


# Whole runs


@pytest.mark.usefixtures("no_download")
def test_naive_and_joint_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--methods naive joint --tasks 2 --epochs 1 --hidden 8 --threads 1 --validate"
    folders = f"--data-root {tmp_path / 'absent'} --output {tmp_path / 'out'}"
    assert main(["permuted-mnist", *words.split(), *folders.split()]) == 0
    document = json.loads((tmp_path / "out" / "permuted_mnist.json").read_text(encoding="utf-8"))
    assert document["scenario"] == "permuted_mnist"
    records = [Record(**fields) for fields in document["records"]]
    assert [record.method for record in records] == ["naive", "joint"]
    for record in records:
        assert len(record.accuracy_matrix) == 2
        assert (record.configuration["data"], record.configuration["batch_size"]) == ("digits", 32)
        assert record.for_validation
    assert (tmp_path / "out" / "permuted_mnist.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Data: scikit-learn digits" in out
    assert "Defaults for so few images: epochs 10, batch size 32." in out
    assert "Permuted digits (not MNIST): 2 tasks, 1 seed" in out
    assert "\nAfter 2 tasks, one after another:\n  plain training keeps " in out


def test_an_interruption_keeps_what_is_finished(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: ImageData,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(variant: Any, *arguments: Any, **keywords: Any) -> Record:
        if variant.name == "joint":
            raise KeyboardInterrupt
        return make_record(variant.name)

    monkeypatch.setattr(data_sets, "load_images", lambda root: tiny_images)
    monkeypatch.setattr(experiment, "run", interrupted)
    words = ["--methods", "naive", "joint", "--output", str(tmp_path)]
    assert main(["permuted-mnist", *words]) == 130
    records = json.loads((tmp_path / "permuted_mnist.json").read_text(encoding="utf-8"))["records"]
    assert [record["method"] for record in records] == ["naive"]
    assert "Interrupted; the records of finished runs are kept." in capsys.readouterr().err


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["permuted-mnist", "--output", str(tmp_path / "file" / "below")]) == 1
    assert "--output: cannot make the folder" in capsys.readouterr().err

    def without(options: Any) -> int:
        raise ModuleNotFoundError("No module named 'avalanche'", name="avalanche")

    monkeypatch.setattr(run_module, "run", without)
    assert main(["run", "all", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "python -m benchmarks run: error: avalanche is missing; it comes with: "
        "pip install '.[bench]'\n"
    )


# The suite


class Runs:
    """Stands in for training."""

    def __init__(self) -> None:
        self.done: list[Job] = []
        self.accuracies = {"naive": 0.5, "ewc": 0.6, "rotated-ewc": 0.7}
        self.error: BaseException | None = None

    def __call__(self, job: Job, data_root: Path, threads: int) -> Record:
        self.done.append(job)
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        name = job.variant.name
        return make_record(
            name,
            [[self.accuracies[name]]],
            seed=job.seed,
            strength=job.variant.strength,
            validate=job.configuration.validate,
        )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tiny_images: ImageData) -> Runs:
    found = Runs()

    monkeypatch.setattr(sweep_module, "_run", found)
    monkeypatch.setattr(data_sets, "load_images", lambda root: replace(tiny_images))
    monkeypatch.setattr(
        data_sets, "load_folder", lambda folder: replace(tiny_images, source=folder.name)
    )
    return found


def call(folder: Path, words: str, methods: str = "naive ewc rotated-ewc") -> int:
    output = ["--output", str(folder), "--methods", *methods.split()]
    return main(["run", *words.split(), *output])


def test_the_same_call_again_runs_nothing(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "permuted_mnist --quick") == 0
    first = len(runs.done)
    assert len(list((tmp_path / "permuted_mnist").glob("*.json"))) == first > 0
    out = capsys.readouterr().out
    assert out.startswith("Data: tiny.")
    assert "permuted_mnist: rotated-ewc 70.00% > ewc 60.00%" in out
    assert call(tmp_path, "permuted_mnist --quick") == 0
    assert len(runs.done) == first
    assert call(tmp_path, "permuted_mnist --quick --seeds 0 1") == 0
    assert {job.seed for job in runs.done[first:]} == {1}
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in runs.accuracies)
    assert (tmp_path / "page" / "permuted_mnist-accuracy.png").exists()
    assert f"Wrote {tmp_path / 'page' / 'report.md'}" in out


@pytest.mark.parametrize(("quick", "code"), [("--quick", 1), ("", 0)])
def test_methods_out_of_order_fail_a_check_alone(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: str, code: int
) -> None:
    runs.accuracies["rotated-ewc"] = 0.1
    assert call(tmp_path, f"permuted_mnist --tasks 2 {quick}") == code
    assert ("NOT SO" in capsys.readouterr().out) == bool(quick)


def test_failed_runs_are_told_once_and_fail(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.error = RuntimeError("no luck")
    assert call(tmp_path, "permuted_mnist --search-values 0", "naive") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\nFailed: ") == captured.err.count("\nRuntimeError: no luck") == 1
    assert captured.err.count("permuted_mnist, test: naive, seed ") == 3
    runs.error = KeyboardInterrupt()
    assert call(tmp_path, "permuted_mnist --quick") == 130
    runs.error = None
    assert call(tmp_path, "permuted_mnist --quick") == 0


def test_images_of_a_folder_are_one_more_stream(runs: Runs, tmp_path: Path) -> None:
    assert call(tmp_path, "all --quick --increment domain") == 0
    known = {"permuted_mnist", "rotated_mnist", "split_mnist_domain"}
    assert {job.scenario for job in runs.done} == known
    (tmp_path / "birds").mkdir()
    words = f"--quick --images {tmp_path / 'birds'}"
    assert call(tmp_path, f"all {words} --increment domain") == 0
    assert {job.scenario for job in runs.done} == known | {"split_birds_domain"}
    assert {job.configuration.images for job in runs.done if job.scenario in known} == {None}
    runs.done.clear()
    assert call(tmp_path, f"split_images {words}") == 0
    assert {job.scenario for job in runs.done} == {"split_birds_task", "split_birds_class"}
    assert {job.data_source for job in runs.done} == {"birds"}


def test_streams_that_cannot_be_made_are_errors(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(tmp_path, "split_mnist --tasks 3 --increment task") == 1
    assert "split_mnist: tasks: got 3" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(tmp_path, f"split_images --images {tmp_path}") == 1
    err = capsys.readouterr().err
    assert f"split_images: --images: got {tmp_path}, expected train/CLASS" in err


def test_nothing_to_present_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert f"no record in {tmp_path / 'empty'}" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert "does not exist" in capsys.readouterr().err
