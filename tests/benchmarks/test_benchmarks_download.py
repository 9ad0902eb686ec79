"""Downloads that fail and succeed, without a network."""

import socket
import sys
from pathlib import Path

import pytest

from benchmarks.download import NETWORK_TIMEOUT_SECONDS, DataUnavailableError, download, reason


def fail() -> None:
    raise RuntimeError("Error downloading:\nTried somewhere, got:\n<no network here>\n")


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError) as error:
        download(fail, tmp_path / "a", tmp_path)
    assert str(error.value) == (
        f"is not in {tmp_path} and could not be downloaded (<no network here>)"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("first\n second \n\n"), "second"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("  "), "ValueError"),
    ],
)
def test_reasons_are_the_last_line_or_the_kind(error: Exception, expected: str) -> None:
    assert reason(error) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_printed_and_the_timeout_is_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    timeouts = []

    def make() -> None:
        timeouts.append(socket.getdefaulttimeout())
        sys.stdout.write("mirrors\n")
        sys.stderr.write("100%\n")
        if fails:
            fail()

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3.0)
    try:
        if fails:
            with pytest.raises(DataUnavailableError):
                download(make, tmp_path / "a", tmp_path)
        else:
            download(make, tmp_path / "a", tmp_path)
        after = socket.getdefaulttimeout()
    finally:
        socket.setdefaulttimeout(before)
    assert (timeouts, after) == ([NETWORK_TIMEOUT_SECONDS], 3.0)
    assert capsys.readouterr() == ("", "")


def test_folders_that_were_made_in_vain_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "data" / "raw"

    def make() -> None:
        folder.mkdir(parents=True)
        fail()

    with pytest.raises(DataUnavailableError):
        download(make, folder, tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_or_hold_something_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "raw"
    folder.parent.mkdir()

    def make() -> None:
        folder.mkdir()
        (folder / "half").touch()
        fail()

    with pytest.raises(DataUnavailableError):
        download(make, folder, tmp_path / "root")
    assert (folder / "half").exists()
    (folder / "half").unlink()
    with pytest.raises(DataUnavailableError):
        download(fail, folder, tmp_path / "root")
    assert folder.is_dir()


def test_an_interruption_is_not_a_failure(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(interrupt, tmp_path / "a", tmp_path)
