"""Results on disk."""

import json
import math
import os
from pathlib import Path

import pytest

from benchmarks.records import group_by_label, read_records, write_records


def test_what_was_written_is_read(tmp_path: Path, make_record) -> None:
    path = tmp_path / "results.json"
    records = [
        make_record("ewc[λ=1]", [[0.5, 0.1], [0.25, 0.75]], seed=3),
        make_record("joint", [[0.9]], forgetting=None, backward_transfer=None),
    ]
    write_records(path, "scenario", records)
    assert read_records(path) == ("scenario", records)


def test_the_file_has_the_documented_form(tmp_path: Path, make_record) -> None:
    path = tmp_path / "results.json"
    write_records(path, "scenario", [make_record("naive", [[0.5]], forgetting=None)])
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"format", "scenario", "records"}
    assert document["format"] == "rotate_ewc.benchmarks/1"
    assert document["records"][0]["label"] == "naive"
    assert document["records"][0]["forgetting"] is None


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, make_record, monkeypatch) -> None:
    path = tmp_path / "results.json"
    good = [make_record("naive", [[0.5]])]
    write_records(path, "scenario", good)
    with pytest.raises(ValueError, match="JSON"):
        write_records(path, "scenario", [make_record("naive", [[math.nan]])])

    def fail(*arguments: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_records(path, "scenario", [])
    assert read_records(path) == ("scenario", good)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ['{"format": "other/2"}', "[]", "{}"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected 'rotate_ewc\.benchmarks/1'"):
        read_records(path)


def test_groups_keep_the_order_of_labels(make_record) -> None:
    records = [make_record(label, [[0.5]], seed=seed) for seed in (0, 1) for label in ("b", "a")]
    groups = group_by_label(records)
    assert list(groups) == ["b", "a"]
    assert [record.seed for record in groups["a"]] == [0, 1]
