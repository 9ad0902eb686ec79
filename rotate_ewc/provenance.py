"""Where an operator comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final

from rotate_ewc.errors import SnapshotError

# What 64 bits can count.
LARGEST_COUNT: Final = 2**63 - 1

Setting = bool | int | float | str | None

_TYPES: Final[dict[str, type]] = {
    "loss": str,
    "reduction": str,
    "fisher_type": str,
    "num_data": int,
    "settings": dict,
}


@dataclass(frozen=True)
class Provenance:
    """Where an operator comes from.

    Attributes:
        loss: Class name of the loss.
        reduction: The loss's reduction, `"mean"` or `"sum"`.
        fisher_type: Value of the `FisherType`.
        num_data: Examples the operator stands for.
        settings: How it was estimated, by the names of the arguments; of the latest task, where it
            was merged of several. Empty where it is not known.
    """

    loss: str
    reduction: str
    fisher_type: str
    num_data: int
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.fisher_type} Fisher of {self.loss} ({self.reduction}), N = {self.num_data}"

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**vars(self), "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, value: object) -> Provenance:
        """Read and check what `to_json` returned.

        Raises:
            SnapshotError: If anything is missing, left over, or of the wrong type or range.
        """
        if not isinstance(value, dict) or set(value) != set(_TYPES):
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise SnapshotError(f"snapshot's provenance is {got}; expected {sorted(_TYPES)}")
        for name, expected in _TYPES.items():
            got = value[name]
            if not isinstance(got, expected) or isinstance(got, bool):
                raise SnapshotError(
                    f"snapshot's provenance {name!r} is {type(got).__name__}; expected "
                    f"{expected.__name__}"
                )
        if not 1 <= value["num_data"] <= LARGEST_COUNT or value["reduction"] not in ("mean", "sum"):
            raise SnapshotError(
                f"snapshot's provenance has num_data {value['num_data']!r:.99} and reduction "
                f"{value['reduction']!r:.99}; expected at least 1, and 'mean' or 'sum'"
            )
        for name, setting in value["settings"].items():
            if not isinstance(setting, (bool, int, float, str, NoneType)):
                raise SnapshotError(
                    f"snapshot's provenance has {type(setting).__name__} in 'settings' for "
                    f"{name!r:.99}; expected a number, a string or null"
                )
        return cls(**value)
