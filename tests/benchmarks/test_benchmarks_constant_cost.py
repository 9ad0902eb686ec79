"""The whole measurement, from command line to file, of tiny networks; no time is judged."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmarks.rounds
from benchmarks.constant_cost import Options, main, parse_options

QUICK = "--hidden 4 --tasks 3 --rounds 5 --repetitions 1"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few inputs instead of 784; and the threads of the process are what they were in the end."""
    monkeypatch.setattr("benchmarks.contenders.FEATURES", 6)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK.split(), "--threads", "1", "--output", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "constant_cost.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "rotate_ewc.benchmarks.constant_cost/1"
    assert document["configuration"] == {
        "hidden": [4],
        "tasks": [2, 3],
        "rounds": 5,
        "repetitions": 1,
        "threads": 1,
    }
    assert document["reference_tasks"] == 2
    assert {"python", "torch", "rotate_ewc", "processor"} <= set(document["versions"])
    plain, *costs = document["records"]
    assert plain["mode"] is None
    assert set(plain["milliseconds"]) == {"training step"}
    assert [(cost["mode"], cost["tasks"]) for cost in costs] == [
        *(("merged", tasks) for tasks in (2, 3)),
        *(("separate", tasks) for tasks in (2, 3)),
    ]
    for cost in costs:
        rotated = {"RotatedAdam step"} if cost["mode"] == "merged" else set()
        assert set(cost["milliseconds"]) == {"penalty", "training step"} | rotated
        for quantity, times in cost["rounds"].items():
            assert len(times) == 5
            assert cost["milliseconds"][quantity] == statistics.median(times) > 0
    assert [cost["state_ratio"] for cost in costs] == [1, 1, 1, 1.5]
    assert [path.name for path in path.parent.iterdir()] == ["constant_cost.json"]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "6-4-10: medians of 5 rounds of 1 calls; ratios to 2 tasks; 1 thread"
    )
    assert [line.split()[0] for line in lines[4:-1]] == ["no", *["merged"] * 2, *["separate"] * 2]
    assert lines[-1] == f"Wrote {path}."


def test_defaults() -> None:
    options = parse_options([])
    assert options == Options()
    assert options.hidden == (100, 100)
    assert options.tasks == (1, 2, 10, 50)
    assert options.rounds == 7
    assert options.threads is None
    assert options.output == Path("results")


def test_two_tasks_are_always_measured() -> None:
    assert parse_options(["--tasks", "50", "1,10"]).tasks == (1, 2, 10, 50)
    assert parse_options(["--tasks", "2"]).tasks == (2,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks 0", "argument --tasks: expected a whole number ≥ 1, got '0'"),
        ("--tasks 3 3", "argument --tasks: expected every value once, got 3 more than once"),
        ("--tasks ,", "argument --tasks: expected at least one value, got none"),
        ("--hidden x", "argument --hidden: expected a whole number ≥ 1, got 'x'"),
        ("--rounds 4", "argument --rounds: expected a whole number ≥ 5, got '4'"),
        ("--repetitions 0", "argument --repetitions: expected a whole number ≥ 1, got '0'"),
        ("--threads 0", "argument --threads: expected a whole number ≥ 1, got '0'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_output_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        parse_options(["--output", str(file)])
    assert "--output: expected a folder, got the file" in capsys.readouterr().err
    assert main(["--output", str(file / "below")]) == 1
    assert "benchmarks.constant_cost: error: --output: cannot" in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.constant_cost.find_spec", lambda name: name != "rich")
    assert main(["--output", str(tmp_path)]) == 1
    assert "it comes with: pip install rich\n" in capsys.readouterr().err


def test_an_interruption_leaves_an_earlier_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "constant_cost.json"
    earlier.write_text("earlier")

    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.rounds, "time_in_rounds", interrupted)
    assert main([*QUICK.split(), "--output", str(tmp_path)]) == 130
    assert "nothing is kept" in capsys.readouterr().out
    assert earlier.read_text() == "earlier"


def test_help_imports_neither_torch_nor_avalanche() -> None:
    program = (
        "import sys; from benchmarks.constant_cost import parse_options as parse; parse([]); "
        "print(sorted({'torch', 'avalanche', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
