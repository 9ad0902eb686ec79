"""Whatever happens to a save, the file is the old one or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.io import files
from tests.helpers.honest_snapshots import contents_of, digest_of, operator, penalty
from tests.helpers.killed_savers import STAGES, large

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

ROOT = Path(__file__).parents[2]


def experiments(folder: Path, *names: str) -> dict[str, Any]:
    """Let a process save in children, and tell what came of it."""
    # It is to be entered by another user, too.
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.getuid() and above.stat().st_mode & 0o005 != 0o005:
            above.chmod(above.stat().st_mode | 0o005)
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_savers", str(folder), *names],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


DONE = (
    "at_random_moments:20",
    "at_every_stage:0",
    "on_a_full_disk:0",
    "on_a_full_disk:1000000",
    "in_a_locked_folder:0",
    "at_once:20",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all experiments, in one process: most of its time goes into starting."""
    return experiments(tmp_path_factory.mktemp("saved"), *DONE)


def check_kills(found: dict[str, int], number: int) -> None:
    """What is left is looked at by the experiment; here, that there was something to look at."""
    assert found["old"] + found["new"] >= number
    assert min(found.values()) >= number / 4


def test_killed_at_random_moments(done: dict[str, Any]) -> None:
    check_kills(done["at_random_moments:20"], 20)


@pytest.mark.slow
def test_killed_two_hundred_times(tmp_path: Path) -> None:
    check_kills(experiments(tmp_path, "at_random_moments:200")["at_random_moments:200"], 200)


def test_killed_at_every_stage(done: dict[str, Any]) -> None:
    assert done["at_every_stage:0"] == {
        stage: ["new", 0] if stage == "before the folder is on the disk" else ["old", 1]
        for stage in STAGES
    }


@pytest.mark.parametrize("limit", [0, 10**6])
def test_full_disk(limit: int, done: dict[str, Any]) -> None:
    found = done[f"on_a_full_disk:{limit}"]
    assert found["error"].startswith("OSError")
    assert "target' cannot be written" in found["error"]
    assert "too large" in found["error"]
    assert (found["leftovers"], found["found"]) == (0, "old")


def test_locked_folder(done: dict[str, Any]) -> None:
    found = done["in_a_locked_folder:0"]
    assert found["error"].startswith("PermissionError")
    assert (found["leftovers"], found["found"]) == (0, "old")


def test_saved_by_many_at_once(done: dict[str, Any]) -> None:
    found = done["at_once:20"]
    assert not found["crashed"]
    assert found["leftovers"] == 0
    assert found["different"] >= 2


# --------------------------------------------------------------------------- without children


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace", "Path.chmod"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_failures_leave_the_old_file(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    operator(1).save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"rotate_ewc.io.files.{failing}", fail)
    with pytest.raises(type(error)):
        operator(2).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["target"]


def test_failure_after_the_renaming_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the new one, but may not be so after a loss of power."""
    path, calls = tmp_path / "target", []
    operator(1).save(path)
    fsync = os.fsync

    def fail_at_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        fsync(descriptor)

    monkeypatch.setattr("rotate_ewc.io.files.os.fsync", fail_at_second)
    with pytest.raises(OSError, match="the disk is gone"):
        operator(2).save(path)
    assert digest_of(EKFACLinearOperator.load(path)) == digest_of(operator(2))
    assert names_in(tmp_path) == ["target"]


def test_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(IsADirectoryError, match="target' is a folder; expected the name of a file"):
        operator().save(tmp_path / "target")
    assert names_in(tmp_path) == ["target"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        operator().save(tmp_path / "none" / "target")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        operator().save(tmp_path / "file" / "target")


def test_links_are_replaced(tmp_path: Path) -> None:
    """A link becomes a file, whether or not there was one that it pointed to, which stays."""
    operator(1).save(tmp_path / "first")
    before = (tmp_path / "first").read_bytes()
    for to in ("first", "none", "link"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(to)
        operator(2).save(link)
        assert not link.is_symlink()
        assert digest_of(EKFACLinearOperator.load(link)) == digest_of(operator(2))
    assert (tmp_path / "first").read_bytes() == before
    assert names_in(tmp_path) == ["first", "link"]


def test_read_through_links(tmp_path: Path) -> None:
    operator(1).save(tmp_path / "first")
    (tmp_path / "link").symlink_to("first")
    assert digest_of(EKFACLinearOperator.load(tmp_path / "link")) == digest_of(operator(1))


def test_hard_links_keep_the_old_file(tmp_path: Path) -> None:
    operator(1).save(tmp_path / "first")
    os.link(tmp_path / "first", tmp_path / "second")
    operator(2).save(tmp_path / "second")
    assert digest_of(EKFACLinearOperator.load(tmp_path / "first")) == digest_of(operator(1))


@pytest.mark.parametrize("path_type", [str, Path])
@pytest.mark.parametrize(
    "name", ["target", "no end.", ".hidden", "é ü", "a\nb", "t" * 240, "ü" * 120, "-"]
)
def test_names_of_files(
    path_type: Callable[[Any], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also relative ones, and such as are as long as names can be."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        operator(1).save(path_type(path))
        assert digest_of(EKFACLinearOperator.load(path_type(path))) == digest_of(operator(1))
    assert names_in(tmp_path) == [name]


def test_paths_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: list[Any] = [bytes(tmp_path / "target"), 3, None]
    for path in wrong:
        with pytest.raises(TypeError, match="path is "):
            operator().save(path)
        with pytest.raises(TypeError, match="path is "):
            EKFACLinearOperator.load(path)
        with pytest.raises(TypeError, match="path is "):
            EKFACPenalty.load(path)
    for path in ("", ".", "/"):
        with pytest.raises(IsADirectoryError, match="is a folder; expected the name"):
            operator().save(path)
        with pytest.raises(FileNotFoundError):
            EKFACLinearOperator.load(path)
    assert names_in(tmp_path) == []


# --------------------------------------------------------------------------- mapped files


def test_loaded_operators_outlive_their_file(tmp_path: Path) -> None:
    """It is mapped into memory; another in its place, or none, changes nothing."""
    path, large_one = tmp_path / "target", large(1)
    large_one.save(path)
    loaded = EKFACLinearOperator.load(path)
    large(2).save(path)
    assert digest_of(loaded) == digest_of(large_one)
    path.unlink()
    assert digest_of(loaded) == digest_of(large_one)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_onto_the_file_they_were_loaded_from(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    path = tmp_path / "target"
    large(1).save(path)
    loaded = EKFACLinearOperator.load(path)
    for _ in range(3):
        loaded.save(path)
        loaded = EKFACLinearOperator.load(path)
        assert digest_of(loaded) == digest_of(large(1))
    loaded.save(path, storage_dtype=dtype)
    assert digest_of(loaded) == digest_of(large(1))


def test_penalties_onto_the_file_they_were_loaded_from(tmp_path: Path) -> None:
    path, learned = tmp_path / "target", penalty("separate")
    learned.save(path)
    loaded = EKFACPenalty.load(path)
    loaded.save(path)
    assert digest_of(EKFACPenalty.load(path)) == digest_of(loaded) == digest_of(learned)


def test_changes_in_memory_do_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "target"
    operator(1).save(path)
    before = path.read_bytes()
    loaded = EKFACLinearOperator.load(path)
    for block in loaded.blocks:
        block.eigenvalues.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o660])
def test_permissions_stay(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "target"
    operator(1).save(path)
    path.chmod(mode)
    operator(2).save(path)
    assert path.stat().st_mode & 0o777 == mode


def test_saving_leaves_the_operator(tmp_path: Path) -> None:
    """Also one whose tensors are views, with strides, or shared between blocks."""
    made = operator(1)
    shared = made.map(lambda tensor: tensor)
    strided = shared.map(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)
    twice = strided.map(lambda t: torch.cat([t, t])[: len(t)])
    for one in (shared, strided, twice):
        one.save(tmp_path / "target")
        assert digest_of(one) == digest_of(made)
        assert digest_of(EKFACLinearOperator.load(tmp_path / "target")) == digest_of(made)


def test_blocks_that_share_a_tensor(tmp_path: Path) -> None:
    basis = operator(1).blocks[0].gradient_basis
    first, second = operator(1).blocks[0], operator(2).blocks[0]
    one = type(first)(("a",), basis, first.activation_basis, first.eigenvalues)
    other = type(first)(("b",), basis, second.activation_basis, first.eigenvalues)
    made = EKFACLinearOperator.from_blocks(
        [one, other], {"a": (6, 4), "b": (6, 4)}, operator().provenance
    )
    made.save(tmp_path / "target")
    assert digest_of(EKFACLinearOperator.load(tmp_path / "target")) == digest_of(made)
    files.save(contents_of(made), tmp_path / "target")
    assert digest_of(EKFACLinearOperator.load(tmp_path / "target")) == digest_of(made)
