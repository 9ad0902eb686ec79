"""The suite from command line to exit code, with runs that are made up."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.data import ImageData
from benchmarks.download import DataUnavailableError
from benchmarks.records import Record
from benchmarks.suite import pool as pool_module
from benchmarks.suite.store import Job
from tests.benchmarks.suite_records import flat

LIKELY = {"naive": 0.5, "ewc": 0.6, "rotated-adam": 0.7}


class Runs:
    """Stands in for training."""

    def __init__(self) -> None:
        self.done: list[Job] = []
        self.accuracies = dict(LIKELY)
        self.error: BaseException | None = None

    def __call__(self, job: Job, threads: int) -> Record:
        self.done.append(job)
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        name = job.variant.name
        return flat(
            name,
            self.accuracies[name],
            seed=job.seed,
            strength=job.variant.strength,
            validate=job.configuration.validate,
            configuration={"data": job.data_source},
        )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tiny_images: ImageData) -> Runs:
    found = Runs()
    monkeypatch.setattr(pool_module, "_run", found)
    monkeypatch.setattr("benchmarks.data.load_images", lambda root: tiny_images)

    def fail(root: Path, classes: int) -> ImageData:
        raise DataUnavailableError("is not in ROOT and could not be downloaded (no network)")

    monkeypatch.setattr("benchmarks.cifar.load_cifar", fail)
    return found


@pytest.fixture
def call(tmp_path: Path):
    def go(words: str, methods: Sequence[str] = tuple(LIKELY)) -> int:
        output = ["--output", str(tmp_path / "results"), "--methods", *methods]
        return main(["run", *words.split(), *output])

    return go


def test_all_is_well(runs: Runs, call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("permuted_mnist --quick") == 0
    out = capsys.readouterr().out
    assert out.startswith("Data: tiny.")
    assert "permuted_mnist: rotated-adam 70.00% > ewc 60.00%" in out
    assert str(tmp_path / "results") in out
    files = list((tmp_path / "results" / "permuted_mnist").glob("*.json"))
    assert len(files) == len(runs.done)


def test_the_same_call_again_runs_nothing(runs: Runs, call) -> None:
    assert call("permuted_mnist --quick") == 0
    first = len(runs.done)
    assert call("permuted_mnist --quick") == 0
    assert len(runs.done) == first > 0
    assert call("permuted_mnist --quick --seeds 0 1") == 0
    assert {job.seed for job in runs.done[first:]} == {1}


@pytest.mark.parametrize(("quick", "code"), [("--quick", 1), ("", 0)])
def test_methods_out_of_order_fail_a_check_alone(
    runs: Runs, call, capsys: pytest.CaptureFixture[str], quick: str, code: int
) -> None:
    runs.accuracies["rotated-adam"] = 0.1
    assert call(f"permuted_mnist --tasks 2 {quick}") == code
    assert ("NOT SO" in capsys.readouterr().out) == bool(quick)


def test_failed_runs_are_told_once_and_fail(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.error = RuntimeError("no luck")
    assert call("permuted_mnist --search-values 0", ["naive"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("Traceback") == 1
    assert captured.err.count("permuted_mnist, test: naive, seed ") == 3


def test_an_interruption_is_told_and_gone_on_from(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.error = KeyboardInterrupt()
    assert call("permuted_mnist --quick") == 130
    captured = capsys.readouterr()
    assert "Interrupted; finished runs are kept" in captured.out
    assert captured.err == ""
    runs.error = None
    assert call("permuted_mnist --quick") == 0


def test_missing_cifar_alone_is_an_error(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("split_cifar10 --quick") == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "benchmarks.suite: error: split_cifar10: its data set is not in ROOT and could not be "
        "downloaded (no network)\n"
    )
    assert runs.done == []


def test_missing_cifar_is_left_out_of_all(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("all --quick --increment domain") == 0
    out = capsys.readouterr().out
    for classes in (10, 100):
        assert f"Left out split_cifar{classes}: its data set is not in ROOT" in out
    found = {job.scenario for job in runs.done}
    assert found == {"permuted_mnist", "rotated_mnist", "split_mnist_domain"}


def test_classes_that_cannot_be_split_are_an_error(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("split_mnist --tasks 3 --increment task") == 1
    assert "split_mnist: tasks: got 3" in capsys.readouterr().err
    assert runs.done == []


def test_a_setting_is_announced_when_there_are_few_images(
    runs: Runs, call, capsys: pytest.CaptureFixture[str]
) -> None:
    call("permuted_mnist --search-values 0", ["naive"])
    assert "--epochs 10 --batch-size 32" in capsys.readouterr().out
    assert {job.configuration.epochs for job in runs.done} == {10}
    assert {job.data_source for job in runs.done} == {"digits"}


def test_compare_shows_what_was_run(runs: Runs, call, tmp_path: Path, capsys) -> None:
    call("permuted_mnist --quick")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert "permuted_mnist" in out
    assert all(name in out for name in LIKELY)


@pytest.mark.parametrize("command", ["compare", "plot", "report"])
def test_nothing_to_present_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    output = [] if command == "compare" else ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert main([command, str(tmp_path / "empty"), *output]) == 1
    assert f"no record in {tmp_path / 'empty'}" in capsys.readouterr().err
    assert main([command, str(tmp_path / "absent"), *output]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.find_spec", lambda name: name != "avalanche")
    assert main(["run", "permuted_mnist", "--output", str(tmp_path)]) == 1
    assert "pip install avalanche-lib\n" in capsys.readouterr().err


def test_bad_words_leave_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "mnist"])
    assert stop.value.code == 2
