"""The package's own kind of error."""

from __future__ import annotations


class SnapshotError(ValueError):
    """A snapshot that cannot be used; the message names file and key, what was got and expected."""
