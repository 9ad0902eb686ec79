"""The package's own kinds of errors."""

from __future__ import annotations

from typing import Final

_MOST_CHARACTERS: Final = 400


class SnapshotError(ValueError):
    """A snapshot that cannot be used; the message names file and key, what was got and expected."""

    def __init__(self, message: str, *, file: str | None = None) -> None:
        """Make a readable one-line message, whatever names and values the snapshot has.

        Args:
            message: What is wrong; the middle of a long one is left out.
            file: The snapshot's file, if it is in one.
        """
        told = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _without_middle(message))
        super().__init__(told if file is None else f"{file!r}: {told}")


class NotFiniteError(ValueError):
    """Numbers are not finite, or their squares are not, as those of a network that has diverged."""


def _without_middle(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS // 2]} … {text[-_MOST_CHARACTERS // 2 + 3 :]}"
