"""Downloads by torchvision, made quiet and short."""

import contextlib
import io
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

NETWORK_TIMEOUT_SECONDS = 10.0


class DataUnavailableError(Exception):
    """A data set can be neither read nor downloaded; the message completes "NAME ..."."""


def download(make_dataset: Callable[[], object], folder: Path, data_root: Path) -> None:
    """Download a data set in silence, or raise within about twenty seconds.

    Args:
        make_dataset: Makes torchvision's data set, with ``download=True``.
        folder: Where its files go; if it was not there, it is not there after a failure.
        data_root: What the user knows the place as.

    Raises:
        DataUnavailableError: If the download fails.
    """
    missing_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with _silence(), _network_timeout(NETWORK_TIMEOUT_SECONDS):
            make_dataset()
    # No network, a full disk, a folder that cannot be written: other data help with all of them.
    except Exception as error:
        for parent in missing_folders:
            with contextlib.suppress(OSError):  # one that holds something is kept
                parent.rmdir()
        raise DataUnavailableError(
            f"is not in {data_root} and could not be downloaded ({reason(error)})"
        ) from error


def reason(error: Exception) -> str:
    """The last line of an error's message, which for torchvision is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep progress bars and mirror lists from preceding the announcement."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Give up on connections that hang, torchvision having no option for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
