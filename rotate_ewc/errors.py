"""The package's own kinds of errors."""

from __future__ import annotations


class SnapshotError(ValueError):
    """A snapshot that cannot be used; the message names file and key, what was got and expected."""


class NotFiniteError(ValueError):
    """Numbers are not finite, or their squares are not, as those of a network that has diverged."""
