"""What a penalty has learned ⇄ its snapshot, a flat dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import (
    HEADER,
    LIBRARY,
    PenaltyHeader,
    TermLayout,
    read_header,
    write_header,
)
from rotate_ewc.io.snapshot import checked_tensor, layout_of, restore, tensors_of
from rotate_ewc.io.storage_dtype import DTYPES
from rotate_ewc.penalty.terms import Term


@dataclass(frozen=True)
class PenaltyState:
    """What a penalty has learned, and the options with which it was made.

    Attributes:
        options: The constructor's arguments by name, as JSON has them.
        mode: The mode it was learned in.
        weighting: How the tasks were weighted.
        terms: The quadratic terms.
        num_tasks: Number of consolidated tasks.
        last_examples: Number of examples of the last one.
        last_loss_terms: Number of its loss terms, which the reduction `mean` divides by.
    """

    options: Mapping[str, Any]
    mode: str
    weighting: str
    terms: tuple[Term, ...]
    num_tasks: int
    last_examples: int
    last_loss_terms: float

    def to_dict(self, prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the snapshot: tensors and a JSON header, under keys that begin with `prefix`.

        Args:
            prefix: The beginning of the keys.
            dtype: The dtype in which bases and eigenvalues are stored, where it is smaller than
                their own.
        """
        header = PenaltyHeader(
            library=LIBRARY,
            options=dict(self.options),
            mode=self.mode,
            weighting=self.weighting,
            num_tasks=self.num_tasks,
            last_examples=self.last_examples,
            last_loss_terms=self.last_loss_terms,
            terms=tuple(map(_layout, self.terms)),
        )
        state: dict[str, Any] = {prefix + HEADER: write_header(header)}
        for index, term in enumerate(self.terms):
            state.update(_tensors(term, f"{prefix}{index}/", dtype))
        return state

    @classmethod
    def from_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> PenaltyState:
        """Read and check a snapshot; keys that do not begin with the prefix are ignored.

        Args:
            state_dict: The dictionary, perhaps of a larger module.
            prefix: The beginning of the keys.

        Raises:
            SnapshotError: If anything is missing, left over or damaged.
        """
        given = {
            key[len(prefix) :] if isinstance(key, str) else key: value
            for key, value in state_dict.items()
            if not isinstance(key, str) or key.startswith(prefix)
        }
        return cls.restore(read_header(given, PenaltyHeader), given)

    @classmethod
    def restore(cls, header: PenaltyHeader, state: Mapping[str, Any]) -> PenaltyState:
        """Check the tensors of a snapshot whose header has been read.

        Args:
            header: The header.
            state: The snapshot.

        Raises:
            SnapshotError: If a tensor is missing, left over or damaged.
        """
        tensors: dict[str, dict[str, Any]] = {f"{i}/": {} for i in range(len(header.terms))}
        for key, value in state.items():
            place = key.find("/") + 1
            if key[:place] in tensors:
                tensors[key[:place]][key[place:]] = value
            elif key != HEADER:
                raise SnapshotError(f"snapshot has the unexpected key {key!r}")
        return cls(
            header.options,
            header.mode,
            header.weighting,
            tuple(
                _restored(term, tensors[place], place)
                for term, place in zip(header.terms, tensors, strict=True)
            ),
            header.num_tasks,
            header.last_examples,
            header.last_loss_terms,
        )

    def check(self, *, mode: str, weighting: str) -> None:
        """Raise `SnapshotError` if it is not of a penalty with these options."""
        for option, expected in (("mode", mode), ("weighting", weighting)):
            got = getattr(self, option)
            if got != expected:
                raise SnapshotError(
                    f"snapshot is of a penalty with {option} {got!r}; expected {expected!r}, the "
                    f"{option} of this one"
                )


def _layout(term: Term) -> TermLayout:
    """Return what a header says of a term."""
    operator = term.operator
    layout = layout_of(operator.blocks, operator.parameter_shapes, operator.provenance)
    return TermLayout(term.weight, layout)


def _tensors(term: Term, prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return a term's tensors under keys that begin with `prefix`."""
    operator = tensors_of(term.operator.blocks, dtype)
    return {
        **{f"{prefix}operator/{key}": value for key, value in operator.items()},
        **{f"{prefix}anchor/{name}": anchor for name, anchor in term.anchor.items()},
    }


def _restored(layout: TermLayout, tensors: Mapping[str, Any], prefix: str) -> Term:
    """Make a term of what a snapshot has for it.

    Args:
        layout: What the header says of it.
        tensors: Its tensors, by keys without the prefix.
        prefix: The beginning of the tensors' keys, for messages.

    Raises:
        SnapshotError: If anything is missing, left over, of the wrong shape or not finite.
    """
    own, found = _below(tensors, "operator/"), _below(tensors, "anchor/")
    if len(own) + len(found) < len(tensors):
        unexpected = min(k for k in tensors if not k.startswith(("operator/", "anchor/")))
        raise SnapshotError(f"snapshot has the unexpected key {prefix + unexpected!r}")
    parts = restore(layout.operator, own, f"{prefix}operator/")
    operator = EKFACLinearOperator.from_blocks(*parts)
    for block in operator.blocks:
        if not bool(torch.isfinite(block.eigenvalues * layout.weight).all()):
            raise SnapshotError(
                f"snapshot's term {prefix!r}: weight is {layout.weight}, with which "
                f"eigenvalues of {block.label!r} overflow; expected less"
            )
    for name in sorted(set(parts.parameter_shapes) ^ set(found)):
        key = f"{prefix}anchor/{name}"
        raise SnapshotError(f"snapshot key {key!r} is missing or unexpected")
    anchor = {
        name: checked_tensor(f"{prefix}anchor/{name}", found[name], shape, DTYPES.values())
        for name, shape in parts.parameter_shapes.items()
    }
    return Term(operator, anchor, layout.weight)


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
