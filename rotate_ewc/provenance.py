"""Where an operator comes from."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from rotate_ewc._utils.validation import as_choice
from rotate_ewc.options import FisherType, Reduction

# What 64 bits can count.
LARGEST_COUNT: Final = 2**63 - 1

Setting = bool | int | float | str | list[str] | dict[str, int | float | str] | None


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """Where an operator comes from.

    The constraints of the fields are checked when a snapshot is read.

    Attributes:
        loss: Class name of the loss.
        reduction: The loss's reduction.
        fisher_type: Which expectation over labels was taken.
        num_data: Examples the operator stands for.
        num_loss_terms: Terms of their loss: what the reduction `mean` divides by, such as examples,
            tokens that count, or elements of the outputs.
        settings: How it was estimated, by the names of the arguments; those of the latest task if
            it was merged from several, empty if they are not known.
    """

    loss: str
    reduction: Reduction
    fisher_type: FisherType
    num_data: Annotated[int, Meta(ge=1, le=LARGEST_COUNT)]
    num_loss_terms: Annotated[float, Meta(ge=0, le=float(LARGEST_COUNT))]
    settings: dict[str, Setting] = {}

    def __post_init__(self) -> None:
        """Turn strings into choices.

        Raises:
            ValueError: If there is no such choice.
        """
        force_setattr(self, "reduction", as_choice("reduction", self.reduction, Reduction))
        fisher_type = as_choice("fisher_type", self.fisher_type, FisherType)
        force_setattr(self, "fisher_type", fisher_type)

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.fisher_type} Fisher of {self.loss} ({self.reduction}), N = {self.num_data}"
