"""One file for every run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.configuration import Configuration
from benchmarks.methods import Variant
from benchmarks.suite.store import Job, load, load_all, save

JOB = Job(Variant("ewc", "ewc", 1.0), 0, Configuration(), "permuted_mnist", "mnist")
MATTERS: dict[str, Any] = {
    "scenario": "split_mnist",
    "increment": "class",
    "training_images": 600,
    "tasks": 3,
    "epochs": 7,
    "hidden": (100,),
    "batch_size": 17,
    "learning_rate": 0.5,
    "optimizer": "sgd",
    "schedule": "linear",
    "warm_up": 0.5,
    "validate": True,
    "proximal_every": 3,
    "fisher_samples": 7,
    "fisher_type": "type2",
    "temperature": 2.0,
    "replay": 5,
    "device": "meta",
}
DOES_NOT: dict[str, Any] = {
    "ewc_lambda": 7.0,
    "baseline_ewc_lambda": (7.0,),
    "methods": ("naive",),
    "seeds": (0, 1, 2),
    "data_root": Path("elsewhere"),
    "output": Path("elsewhere"),
    "threads": 7,
    "chosen": frozenset({"tasks"}),
}
FOLDER = Path("folder")


def test_every_option_either_matters_or_does_not() -> None:
    assert set(vars(Configuration())) == MATTERS.keys() | DOES_NOT.keys()


@pytest.mark.parametrize("name", MATTERS)
def test_options_that_matter_have_files_of_their_own(name: str) -> None:
    other = replace(JOB, configuration=replace(JOB.configuration, **{name: MATTERS[name]}))
    assert other.path(FOLDER) != JOB.path(FOLDER)


@pytest.mark.parametrize("name", DOES_NOT)
def test_other_options_do_not(name: str) -> None:
    other = replace(JOB, configuration=replace(JOB.configuration, **{name: DOES_NOT[name]}))
    assert other.path(FOLDER) == JOB.path(FOLDER)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"variant": Variant("ewc", "ewc", 2.0)},
        {"variant": Variant("ewc", "ewc", 1.0000001)},
        {"variant": Variant("ewc-online", "ewc", 1.0)},
        {"variant": Variant("ewc", "ewc", None)},
        {"data_source": "digits"},
        {"scenario": "other"},
    ],
)
def test_runs_that_differ_have_files_of_their_own(changes: dict[str, Any]) -> None:
    assert replace(JOB, **changes).path(FOLDER) != JOB.path(FOLDER)


def test_names_tell_what_is_inside() -> None:
    job = replace(JOB, configuration=Configuration(validate=True), seed=3)
    assert job.path(FOLDER).parent == FOLDER / "permuted_mnist"
    assert job.path(FOLDER).name.startswith("ewc_1_seed3_search_")
    assert JOB.path(FOLDER).name.startswith("ewc_1_seed0_test_")
    naive = replace(JOB, variant=Variant("naive", "naive", None))
    assert naive.path(FOLDER).name.startswith("naive_seed0_test_")
    assert str(job) == "permuted_mnist, search: ewc, λ = 1, seed 3"
    assert str(naive) == "permuted_mnist, test: naive, seed 0"


def test_what_was_saved_is_loaded(tmp_path: Path, make_record) -> None:
    record = make_record("ewc", [[0.5]])
    assert load(JOB, tmp_path) is None
    save(record, JOB, tmp_path)
    assert load(JOB, tmp_path) == record
    assert load(replace(JOB, seed=1), tmp_path) is None


def damaged_texts(good: str) -> dict[str, str]:
    """Files that are no record, from one that is."""
    document = json.loads(good)
    without = {**document["records"][0]}
    del without["state_bytes"]
    return {
        "half": good[: len(good) // 2],
        "empty": "",
        "list": "[]",
        "other format": json.dumps({**document, "format": "other/2"}),
        "no records": json.dumps({**document, "records": []}),
        "two records": json.dumps({**document, "records": document["records"] * 2}),
        "older record": json.dumps({**document, "records": [without]}),
        "newer record": json.dumps({**document, "records": [{**without, "new": 1}]}),
        "not a list": json.dumps({**document, "records": 3}),
        "record is a list": json.dumps({**document, "records": [[1]]}),
    }


@pytest.mark.parametrize("damage", damaged_texts('{"records": [{"state_bytes": 0}]}'))
def test_a_damaged_file_is_no_record(tmp_path: Path, make_record, damage: str) -> None:
    save(make_record("ewc", [[0.5]]), JOB, tmp_path)
    path = JOB.path(tmp_path)
    path.write_text(damaged_texts(path.read_text(encoding="utf-8"))[damage], encoding="utf-8")
    assert load(JOB, tmp_path) is None


def test_a_file_that_is_no_text_is_no_record(tmp_path: Path, make_record) -> None:
    save(make_record("ewc", [[0.5]]), JOB, tmp_path)
    JOB.path(tmp_path).write_bytes(b"\xff\xfe\x00")
    assert load(JOB, tmp_path) is None


def test_all_records_of_folders_and_files(tmp_path: Path, make_record) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first / "deep" / "deeper", second)):
        save(make_record("ewc", [[0.5]], seed=seed), replace(JOB, seed=seed), folder)
    (first / "foreign.json").write_text('{"records": 1}', encoding="utf-8")
    (first / "list.json").write_text("[1]", encoding="utf-8")
    (first / "broken.json").write_bytes(b"\xff{")
    (first / "notes.txt").write_text("no JSON", encoding="utf-8")
    found = load_all([first, replace(JOB, seed=1).path(second)])
    assert [(scenario, record.seed) for scenario, record in found] == [
        ("permuted_mnist", 0),
        ("permuted_mnist", 1),
    ]


def test_a_record_in_overlapping_folders_counts_once(tmp_path: Path, make_record) -> None:
    save(make_record("ewc", [[0.5]]), JOB, tmp_path / "inner")
    assert len(load_all([tmp_path, tmp_path / "inner"])) == 1


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no record in .*python -m benchmarks run"):
        load_all([tmp_path])
    absent = tmp_path / "absent"
    with pytest.raises(ValueError, match=f"got {absent}, which does not exist"):
        load_all([tmp_path, absent])
