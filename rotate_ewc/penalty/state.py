"""Convert the state of a penalty to its snapshot, a flat dictionary of tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.parameters import fits
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import HEADER, LIBRARY, read_header, write_header
from rotate_ewc.io.layout import PenaltyHeader, TermLayout
from rotate_ewc.io.snapshot import checked_tensor, layout_of, restore, tensors_of
from rotate_ewc.io.storage_dtype import DTYPES
from rotate_ewc.penalty.strength import FoundStrength, GeometricMean
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
        found: The strength that was found.
    """

    options: Mapping[str, Any]
    mode: str
    weighting: str
    terms: tuple[Term, ...]
    num_tasks: int
    last_examples: int
    last_loss_terms: float
    found: FoundStrength

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by key, without the header."""
        return self._tensors(None)

    def to_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the snapshot: tensors, one of which is the header.

        Args:
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
            found_strength=(self.found.strengths, self.found.bounds),
            strength_limit=self.found.limit,
            terms=tuple(map(_layout, self.terms)),
        )
        device = self.terms[0].operator.device if self.terms else None
        return {HEADER: write_header(header, device), **self._tensors(dtype)}

    def _tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            key: tensor
            for index, term in enumerate(self.terms)
            for key, tensor in _tensors(term, f"{index}/", dtype).items()
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PenaltyState:
        """Read and check a snapshot.

        Raises:
            SnapshotError: If anything is missing, left over or damaged.
        """
        return cls.restore(read_header(state, PenaltyHeader), state)

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
                raise SnapshotError(
                    f"snapshot has the unexpected key {key!r}; expected only keys of the "
                    f"{len(header.terms)} terms in its header: load an unchanged copy"
                )
        strengths, bounds = header.found_strength
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
            FoundStrength(GeometricMean(*strengths), header.strength_limit, GeometricMean(*bounds)),
        )

    def check(self, *, mode: str, weighting: str) -> None:
        """Raise `SnapshotError` if the state is of a penalty with other options."""
        for option, expected in (("mode", mode), ("weighting", weighting)):
            got = getattr(self, option)
            if got != expected:
                raise SnapshotError(
                    f"snapshot is of a penalty with {option} {got!r}; expected {expected!r}, the "
                    f"{option} of this one: load it into a penalty with {option}={got!r}, or "
                    f"with EKFACPenalty.load without {option}"
                )

    def check_continues(self, other: PenaltyState) -> None:
        """Raise `SnapshotError` if another state holds tasks of another model or kind of loss.

        Parameters may be missing or smaller in one of the two, since models can grow.
        """
        if not self.terms or not other.terms:
            return
        advice = (
            "expected a snapshot of the same model and kind of loss; to load any snapshot, use "
            "EKFACPenalty.load or a new penalty"
        )
        got, expected = (s.terms[0].operator.provenance.reduction for s in (self, other))
        if got != expected:
            raise SnapshotError(
                f"snapshot is of losses with reduction {got!r}, but the tasks that this penalty "
                f"holds have {expected!r}; {advice}"
            )
        anchors, own = (
            {name: anchor for term in s.terms for name, anchor in term.anchor.items()}
            for s in (self, other)
        )
        shared = [name for name in anchors if name in own]
        if not shared:
            raise SnapshotError(
                f"snapshot has parameters {list(anchors)}, but this penalty has {list(own)}; "
                f"{advice}"
            )
        misfits = [
            f"parameter {name!r} with shape {list(anchors[name].shape)}, but this penalty has it "
            f"with {list(own[name].shape)}, and neither shape contains the other"
            for name in shared
            if not (fits(name, own, anchors[name]) or fits(name, anchors, own[name]))
        ]
        if misfits:
            raise SnapshotError(f"snapshot has {'; '.join(misfits)}; {advice}")

    def stored_in(self, dtype: torch.dtype | None) -> PenaltyState:
        """Return the state with all bases in this dtype; None keeps their dtypes."""
        if dtype is None:
            return self
        terms = (replace(t, operator=t.operator.to(storage_dtype=dtype)) for t in self.terms)
        return replace(self, terms=tuple(terms))

    def map(self, function: Callable[[Tensor], Tensor]) -> PenaltyState:
        """Return the state with every tensor replaced by `function` of it."""
        return replace(self, terms=tuple(term.map(function) for term in self.terms))


def _layout(term: Term) -> TermLayout:
    """Return the part of a header that describes a term."""
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
    """Make a term from its part of a snapshot.

    Args:
        layout: The term's part of the header.
        tensors: Its tensors, by keys without the prefix.
        prefix: The beginning of the tensors' keys, for messages.

    Raises:
        SnapshotError: If anything is missing, left over, of the wrong shape or not finite.
    """
    own, found = _below(tensors, "operator/"), _below(tensors, "anchor/")
    if len(own) + len(found) < len(tensors):
        unexpected = min(k for k in tensors if not k.startswith(("operator/", "anchor/")))
        raise SnapshotError(
            f"snapshot has the unexpected key {prefix + unexpected!r}; expected keys that begin "
            f"with '{prefix}operator/' or '{prefix}anchor/': load an unchanged copy"
        )
    parts = restore(layout.operator, own, f"{prefix}operator/")
    operator = EKFACLinearOperator.from_blocks(*parts)
    for block in operator.blocks:
        if not bool(torch.isfinite(block.eigenvalues * layout.weight).all()):
            raise SnapshotError(
                f"snapshot's term {prefix!r}: weight is {layout.weight}, which makes "
                f"eigenvalues of {block.label!r} overflow; expected a smaller weight: "
                f"load an undamaged copy"
            )
    for name in sorted(set(parts.parameter_shapes) ^ set(found)):
        key = f"{prefix}anchor/{name}"
        raise SnapshotError(
            f"snapshot key {key!r} is missing or unexpected; expected one anchor for each "
            f"parameter of the term's operator: load an unchanged copy"
        )
    anchor = {
        name: checked_tensor(f"{prefix}anchor/{name}", found[name], shape, DTYPES.values())
        for name, shape in parts.parameter_shapes.items()
    }
    return Term(operator, anchor, layout.weight)


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
