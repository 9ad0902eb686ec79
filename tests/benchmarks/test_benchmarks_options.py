"""Command lines of the suite, good and bad."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.configuration import SCENARIO_DEFAULTS
from benchmarks.methods import METHODS
from benchmarks.suite.options import (
    QUICK_DEFAULTS,
    QUICK_SEARCH,
    QUICK_TASKS,
    RunOptions,
    ShowOptions,
    parse,
)
from benchmarks.suite.sweep import Search


def run(words: str) -> RunOptions:
    options = parse(["run", *words.split()])
    assert isinstance(options, RunOptions)
    return options


def show(words: str) -> ShowOptions:
    options = parse(words.split())
    assert isinstance(options, ShowOptions)
    return options


@pytest.mark.parametrize("name", SCENARIO_DEFAULTS)
def test_defaults(name: str) -> None:
    options = run(name)
    assert options.search == Search(values=5, refine=True, seeds=(0,))
    assert (options.jobs, options.check, options.output) == (1, False, Path("results"))
    for configuration in options.configurations:
        assert configuration.scenario == name
        assert configuration.methods == tuple(METHODS)
        assert configuration.seeds == (0, 1, 2)
        assert not configuration.validate
        for field, value in SCENARIO_DEFAULTS[name].items():
            assert getattr(configuration, field) == value


def test_split_mnist_has_three_increments_and_the_others_one() -> None:
    found = [(one.scenario, one.increment) for one in run("all").configurations]
    split = [("split_mnist", kind) for kind in ("task", "domain", "class")]
    others = [(name, "task") for name in SCENARIO_DEFAULTS if name != "split_mnist"]
    assert sorted(found) == sorted(split + others)
    found = [one.increment for one in run("split_mnist --increment class,task").configurations]
    assert found == ["class", "task"]


def test_every_option_reaches_its_place() -> None:
    options = run(
        "permuted_mnist --tasks 3 --epochs 4 --hidden 5 --batch-size 6 --lr 0.5 --optimizer sgd "
        "--fisher-samples 0 --fisher-type type2 --methods joint,naive --seeds 9 --data-root here "
        "--output there --threads 1 --replay 7 --training-images 8 --jobs 2 --search-values 3 "
        "--search-seeds 4 5 --no-refinement --schedule linear --warm-up 0.5 --temperature 2 "
        "--proximal-every 3"
    )
    (found,) = options.configurations
    assert (found.tasks, found.epochs, found.hidden, found.batch_size) == (3, 4, (5,), 6)
    assert (found.learning_rate, found.optimizer, found.schedule) == (0.5, "sgd", "linear")
    assert (found.fisher_samples, found.fisher_type, found.temperature) == (0, "type2", 2.0)
    assert (found.methods, found.seeds, found.replay) == (("joint", "naive"), (9,), 7)
    assert (found.training_images, found.threads, found.warm_up) == (8, 1, 0.5)
    assert (found.data_root, options.output) == (Path("here"), Path("there"))
    assert options.search == Search(3, refine=False, seeds=(4, 5))
    assert options.jobs == 2


@pytest.mark.parametrize("name", SCENARIO_DEFAULTS)
def test_quick_is_small_and_checks(name: str) -> None:
    options = run(f"{name} --quick")
    assert options.check
    assert options.search == QUICK_SEARCH
    for configuration in options.configurations:
        assert configuration.seeds == (0,)
        for field, value in QUICK_DEFAULTS.items():
            assert getattr(configuration, field) == value
        tasks = QUICK_TASKS.get(name, SCENARIO_DEFAULTS[name].get("tasks"))
        assert configuration.tasks == tasks


def test_quick_does_not_replace_what_was_given() -> None:
    options = run(
        "permuted_mnist --quick --training-images 0 --epochs 3 --batch-size 250 --tasks 10 "
        "--fisher-samples 10000 --seeds 0 1 2 --search-values 5 --search-seeds 7"
    )
    (found,) = options.configurations
    assert (found.training_images, found.epochs, found.batch_size) == (0, 3, 250)
    assert (found.tasks, found.fisher_samples, found.seeds) == (10, 10_000, (0, 1, 2))
    assert options.search == Search(5, refine=False, seeds=(7,))


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("--increment both", "'both'"),
        ("--increment task,task", "task more than once"),
        ("--increment ,", "none"),
        ("--search-values 4", "4"),
        ("--search-values -1", "'-1'"),
        ("--search-seeds -1", "'-1'"),
        ("--search-seeds 1 1", "1 more than once"),
        ("--replay -1", "'-1'"),
        ("--training-images x", "'x'"),
        ("--jobs 0", "'0'"),
        ("--methods magic", "'magic'"),
        ("--seeds 1,1", "1 more than once"),
        ("--tasks 0", "'0'"),
        ("--warm-up 2", "'2'"),
        ("--temperature 0", "'0'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(f"split_mnist {words}")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {words.split()[0]}: expected " in message
    assert f", got {got}" in message


def test_increments_are_those_of_split_streams(capsys: pytest.CaptureFixture[str]) -> None:
    found = [one.increment for one in run("split_cifar10 --increment class").configurations]
    assert found == ["class"]
    with pytest.raises(SystemExit):
        run("permuted_mnist --increment task")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "argument --increment: expected a split stream, got permuted_mnist" in message


@pytest.mark.parametrize("words", ["--validate", "--ewc-lambda 3", "--baseline-ewc-lambda 3"])
def test_what_the_protocol_decides_is_no_option(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(f"split_mnist {words}")
    assert f"unrecognized arguments: {words}" in capsys.readouterr().err


def test_an_unknown_scenario_is_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run("mnist")
    expected = f"expected one of {', '.join(SCENARIO_DEFAULTS)}, all, got 'mnist'"
    assert expected in capsys.readouterr().err


def test_commands_that_present() -> None:
    assert show("compare") == ShowOptions("compare", [Path("results")], None)
    assert show("plot a b") == ShowOptions("plot", [Path("a"), Path("b")], Path("plots"))
    assert show("report a --output c") == ShowOptions("report", [Path("a")], Path("c"))


@pytest.mark.parametrize("command", ["run split_mnist", "plot", "report"])
def test_output_must_not_be_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        parse([*command.split(), "--output", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "--output: expected a folder, got the file" in capsys.readouterr().err


def test_help_answers_without_importing_anything_slow() -> None:
    program = (
        "import sys; from benchmarks.__main__ import main\n"
        "for words in (['--help'], ['run', '--help'], ['run', 'split_mnist', '--jobs', 'x']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'avalanche', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--search-values" in done.stdout
