"""What a penalty has learned ⇄ the flat dictionary that it is saved as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import HEADER, LIBRARY, PENALTY, read_header, upgraded
from rotate_ewc.penalty.terms import Term
from rotate_ewc.provenance import LARGEST_COUNT


@dataclass(frozen=True)
class PenaltyState:
    """What a penalty has learned, and the options with which it was made.

    Attributes:
        options: The constructor's arguments by name, as JSON has them; empty where not known.
        mode: The mode it was learned in.
        weighting: How the tasks were weighted.
        terms: The quadratic terms.
        num_tasks: Number of consolidated tasks.
        last_examples: Number of examples of the last one.
    """

    options: Mapping[str, Any]
    mode: str
    weighting: str
    terms: tuple[Term, ...]
    num_tasks: int
    last_examples: int

    def to_dict(self, prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return tensors and a JSON header, under keys that begin with `prefix`.

        Args:
            prefix: What the keys begin with.
            dtype: In what bases and eigenvalues are stored, where that is less than they have.
        """
        header = {
            "format": PENALTY,
            "library": LIBRARY,
            "options": dict(self.options),
            "mode": self.mode,
            "weighting": self.weighting,
            "num_tasks": self.num_tasks,
            "last_examples": self.last_examples,
            "terms": [term.describe() for term in self.terms],
        }
        state: dict[str, Any] = {prefix + HEADER: json.dumps(header)}
        for index, term in enumerate(self.terms):
            state.update(term.tensors(f"{prefix}{index}/", dtype))
        return state

    @classmethod
    def from_dict(cls, state_dict: Mapping[str, Any], prefix: str = "") -> PenaltyState:
        """Read and check what `to_dict` returned; other keys than the prefix's are not looked at.

        Args:
            state_dict: The dictionary, perhaps of a larger module.
            prefix: What the keys begin with.

        Raises:
            SnapshotError: If anything is missing, left over or damaged.
        """
        given = {
            key[len(prefix) :] if isinstance(key, str) else key: value
            for key, value in state_dict.items()
            if not isinstance(key, str) or key.startswith(prefix)
        }
        current = upgraded(given, PENALTY)
        header = read_header(current, PENALTY)
        terms, options = header.get("terms"), header.get("options")
        if not isinstance(terms, list) or not isinstance(options, dict):
            raise SnapshotError(
                f"snapshot has 'terms' {terms!r:.99} and 'options' {options!r:.99}; expected a "
                f"list and a dictionary"
            )
        tensors: dict[str, dict[str, Any]] = {f"{index}/": {} for index in range(len(terms))}
        for key, value in current.items():
            place = key.find("/") + 1
            if key[:place] in tensors:
                tensors[key[:place]][key[place:]] = value
            elif key != HEADER:
                raise SnapshotError(f"snapshot has the unexpected key {key!r}")
        state = cls(
            options,
            _text(header, "mode"),
            _text(header, "weighting"),
            tuple(
                Term.restore(term, tensors[place], place)
                for term, place in zip(terms, tensors, strict=True)
            ),
            _count(header, "num_tasks", least=0),
            _count(header, "last_examples", least=1),
        )
        state._check_terms()
        return state

    def _check_terms(self) -> None:
        """Raise unless the terms can be those of one penalty."""
        most = min(self.num_tasks, 1) if self.mode == "merged" else self.num_tasks
        if len(self.terms) > most:
            raise SnapshotError(
                f"snapshot has {len(self.terms)} 'terms', of {self.num_tasks} tasks in mode "
                f"{self.mode!r:.99}; expected at most {most}"
            )
        reductions = sorted({term.operator.provenance.reduction for term in self.terms})
        if len(reductions) > 1:
            raise SnapshotError(
                f"snapshot has 'terms' with reductions {reductions}; expected the same for all"
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


def _text(header: Mapping[str, Any], name: str) -> str:
    value = header.get(name)
    if not isinstance(value, str):
        raise SnapshotError(f"snapshot's {name!r} is {value!r:.99}; expected a string")
    return value


def _count(header: Mapping[str, Any], name: str, *, least: int) -> int:
    value = header.get(name)
    if type(value) is not int or not least <= value <= LARGEST_COUNT:
        raise SnapshotError(
            f"snapshot's {name!r} is {value!r:.99}; expected a whole number of at least {least}"
        )
    return value
