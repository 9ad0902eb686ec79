"""What a penalty has learned ⇄ the flat dictionary that it is saved as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rotate_ewc import snapshot
from rotate_ewc.options import as_non_negative_number
from rotate_ewc.snapshot import HEADER, SnapshotError
from rotate_ewc.terms import Term

FORMAT: Final = "rotate_ewc.penalty/1"


@dataclass(frozen=True)
class PenaltyState:
    """What a penalty has learned.

    Attributes:
        mode: The mode it was learned in.
        weighting: How the tasks were weighted.
        terms: The quadratic terms.
        num_tasks: Number of consolidated tasks.
        last_examples: Number of examples of the last one.
    """

    mode: str
    weighting: str
    terms: tuple[Term, ...]
    num_tasks: int
    last_examples: int

    def to_dict(self, prefix: str) -> dict[str, Any]:
        """Return tensors and a JSON header, under keys that begin with `prefix`."""
        header = {
            "format": FORMAT,
            "mode": self.mode,
            "weighting": self.weighting,
            "weights": [term.weight for term in self.terms],
            "num_tasks": self.num_tasks,
            "last_examples": self.last_examples,
        }
        state: dict[str, Any] = {prefix + HEADER: json.dumps(header)}
        for index, term in enumerate(self.terms):
            state.update(term.state(f"{prefix}{index}/"))
        return state

    @classmethod
    def from_dict(
        cls, state_dict: Mapping[str, Any], prefix: str, *, mode: str, weighting: str
    ) -> PenaltyState:
        """Read and check what `to_dict` returned; other keys than the prefix's are not looked at.

        Args:
            state_dict: The dictionary, perhaps of a larger module.
            prefix: What the keys begin with.
            mode: The mode that is expected.
            weighting: The weighting that is expected.

        Raises:
            SnapshotError: If anything is missing, left over, damaged or of another penalty.
        """
        state = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        header = snapshot.read_header(state, FORMAT)
        for option, expected in (("mode", mode), ("weighting", weighting)):
            if header.get(option) != expected:
                raise SnapshotError(
                    f"snapshot is of a penalty with {option} {header.get(option)!r}; expected "
                    f"{expected!r}, the {option} of this one"
                )
        try:
            weights = [as_non_negative_number("weights", w) for w in header["weights"]]
            num_tasks, last_examples = int(header["num_tasks"]), int(header["last_examples"])
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"snapshot key {HEADER!r} is incomplete: {error}") from None
        known = {f"{index}/" for index in range(len(weights))}
        for key in state:
            if key != HEADER and key[: key.find("/") + 1] not in known:
                raise SnapshotError(f"snapshot has the unexpected key {key!r}")
        terms = tuple(Term.from_state(state, f"{i}/", w) for i, w in enumerate(weights))
        return cls(mode, weighting, terms, num_tasks, last_examples)
