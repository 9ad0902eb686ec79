"""Command lines, good and bad."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.configuration import (
    Configuration,
    add_arguments,
    configuration_from,
    parse_configuration,
)
from benchmarks.methods import METHODS


def parse(*words: str) -> Configuration:
    return parse_configuration(words, program="program", description="description")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROTATE_EWC_DATA", raising=False)
    configuration = parse()
    assert configuration == Configuration()
    assert configuration.tasks == 10
    assert configuration.hidden == (100, 100)
    rotated = ("rotated-ewc", "rotated-ewc-separate", "rotated-adam")
    assert configuration.methods == ("naive", "ewc", *rotated, "joint")
    assert configuration.data_root == Path("data")
    assert configuration.chosen == frozenset()


def test_data_root_comes_from_the_environment_unless_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROTATE_EWC_DATA", "from-environment")
    assert parse().data_root == Path("from-environment")
    assert parse("--data-root", "given").data_root == Path("given")


def test_every_option_reaches_its_field() -> None:
    words = """--tasks 3 --epochs 4 --hidden 5 --batch-size 6 --lr 0.5 --optimizer sgd
        --ewc-lambda 7 --baseline-ewc-lambda 8 --fisher-samples 0 --fisher-type type2
        --methods joint --seeds 9 --data-root here --output there --device cpu --threads 1"""
    configuration = parse(*words.split())
    expected = Configuration(
        tasks=3,
        epochs=4,
        hidden=(5,),
        batch_size=6,
        learning_rate=0.5,
        optimizer="sgd",
        ewc_lambda=7.0,
        baseline_ewc_lambda=(8.0,),
        fisher_samples=0,
        fisher_type="type2",
        methods=("joint",),
        seeds=(9,),
        data_root=Path("here"),
        output=Path("there"),
        device="cpu",
        threads=1,
        chosen=configuration.chosen,
    )
    assert configuration == expected
    assert len(configuration.chosen) == 16


def test_validation_is_asked_for_and_recorded() -> None:
    assert not parse().validate
    configuration = parse("--validate")
    assert configuration.validate
    assert configuration.chosen == {"validate"}
    assert configuration.as_dict()["validate"] is True


def test_another_command_can_have_the_same_options_with_defaults_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    defaults = Configuration(tasks=2, ewc_lambda=7.0, methods=("rotated-ewc",))
    add_arguments(parser, defaults, methods=("rotated-ewc", "joint"), leave_out=["--tasks"])

    def parse_other(*words: str) -> Configuration:
        return configuration_from(parser.parse_args(words), parser, defaults)

    assert parse_other() == defaults
    changed = parse_other("--methods", "joint", "--ewc-lambda", "3")
    assert (changed.tasks, changed.methods, changed.ewc_lambda) == (2, ("joint",), 3.0)
    assert changed.chosen == {"methods", "ewc_lambda"}
    for words in (["--tasks", "3"], ["--methods", "naive"]):
        with pytest.raises(SystemExit):
            parse_other(*words)
    assert "expected one of rotated-ewc, joint, got 'naive'" in capsys.readouterr().err
    text = parser.format_help()
    assert "(default: 7)" in text
    assert "--tasks" not in text


@pytest.mark.parametrize("words", [["1", "2", "3"], ["1,2,3"], ["1,", "2,3"], ["1,2", "3"]])
def test_lists_are_separated_by_spaces_or_commas(words: list[str]) -> None:
    assert parse("--seeds", *words).seeds == (1, 2, 3)
    assert parse("--hidden", *words).hidden == (1, 2, 3)
    assert parse("--baseline-ewc-lambda", *words).baseline_ewc_lambda == (1.0, 2.0, 3.0)


def test_only_widths_may_repeat() -> None:
    assert parse("--hidden", "50", "50").hidden == (50, 50)


def test_methods_are_separated_by_spaces_or_commas() -> None:
    assert parse("--methods", "naive,joint", "ewc").methods == ("naive", "joint", "ewc")


@pytest.mark.parametrize(
    ("words", "got"),
    [
        ("--tasks 0", "'0'"),
        ("--tasks 2.5", "'2.5'"),
        ("--epochs none", "'none'"),
        ("--hidden 100 0", "'0'"),
        ("--batch-size -1", "'-1'"),
        ("--lr 0", "'0'"),
        ("--lr nan", "'nan'"),
        ("--optimizer lion", "'lion'"),
        ("--ewc-lambda -1", "'-1'"),
        ("--ewc-lambda inf", "'inf'"),
        ("--baseline-ewc-lambda 1,x", "'x'"),
        ("--fisher-samples -1", "'-1'"),
        ("--fisher-type exact", "'exact'"),
        ("--methods naive magic", "'magic'"),
        ("--seeds -1", "'-1'"),
        ("--seeds 1,1", "1 more than once"),
        ("--methods ewc,ewc", "ewc more than once"),
        ("--hidden ,", "none"),
        ("--device toaster", "'toaster'"),
        ("--threads 0", "'0'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {words.split()[0]}: expected " in message
    assert f", got {got}" in message


def test_an_unknown_method_is_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse("--methods", "magic")
    expected = f"expected one of {', '.join(METHODS)}, got 'magic'"
    assert expected in capsys.readouterr().err


def test_output_must_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        parse("--output", str(file))
    assert stop.value.code == 2
    assert "--output: expected a folder, got the file" in capsys.readouterr().err


def test_digits_change_defaults_but_not_what_was_given() -> None:
    changed = parse().for_digits()
    assert (changed.epochs, changed.batch_size) == (10, 32)
    # 250 is MNIST's default, but here somebody asked for it.
    given = parse("--batch-size", "250").for_digits()
    assert (given.epochs, given.batch_size) == (10, 250)


def test_the_record_of_options_holds_plain_values_and_no_folders() -> None:
    plain = parse("--hidden", "7", "--data-root", "here").as_dict()
    assert plain["hidden"] == [7]
    assert plain["learning_rate"] == 1e-3
    assert not {"data_root", "output", "chosen"} & set(plain)


def test_parsing_imports_neither_torch_nor_avalanche() -> None:
    program = (
        "import sys; from benchmarks.permuted_mnist import parse_configuration as parse; "
        "parse(['--tasks', '3'], program='p', description='d'); "
        "print(sorted({'torch', 'avalanche', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
