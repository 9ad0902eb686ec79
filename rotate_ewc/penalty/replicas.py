"""Penalties that each process has consolidated by itself, and that should be equal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.distributed.notes import Notes
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.terms import Term

_NUMBERS: Final = count()


class Replicas:
    """What the default group's processes tell each other of what they consolidated by themselves.

    Replicas of a model that are trained with different penalties are different models soon, and
    nothing would say so. So each process leaves a digest of its blocks where all can read it, and
    when the penalty is first used, and all have done so, they are compared. No process waits for
    another one.
    """

    def __init__(self, blocks: Iterable[Block], notes: Notes) -> None:
        """Tell the others of blocks."""
        self._own = {block.label: _digest(block.tensors) for block in blocks}
        self._notes = notes
        self._number = next(_NUMBERS)
        self._notes.leave(self._key(notes.rank), json.dumps(self._own))

    @classmethod
    def of(cls, blocks: Iterable[Block], ranks: Ranks) -> Replicas | None:
        """Tell the others of what was consolidated without them; None if there is no need to."""
        notes = None if ranks.size > 1 else Notes.of_default_group()
        return None if notes is None else cls(blocks, notes)

    def are_compared(self) -> bool:
        """Compare, and warn of a difference; return whether that is done, as all are there."""
        keys = [self._key(rank) for rank in range(self._notes.size)]
        if not self._notes.has(keys):
            return False
        for rank, key in enumerate(keys):
            other: Mapping[str, Any] = json.loads(self._notes.read(key))
            labels = [n for n in {**self._own, **other} if self._own.get(n) != other.get(n)]
            if labels:
                warn_user(
                    f"the penalty was consolidated by each process for itself, and the Fisher "
                    f"matrix of {labels[0]!r} is not the same on rank {rank} as on rank "
                    f"{self._notes.rank}: replicas of a model that is trained with it will drift "
                    f"apart. Pass group='auto' to consolidate (or, in the plugin, to its "
                    f"constructor), to consolidate the data of all processes in all of them",
                    RuntimeWarning,
                )
                break
        return True

    def _key(self, rank: int) -> str:
        return f"rotate_ewc/replicas/{self._number}/{rank}"


def digests_of(terms: Iterable[Term]) -> dict[str, str]:
    """Return, by names for messages, what tells the snapshots of a process from others."""
    return {
        f"the digest of {block.label!r} in term {number}": _digest(
            {**block.tensors, **{name: term.anchor[name] for name in block.parameters}}
        )
        for number, term in enumerate(terms)
        for block in term.operator.blocks
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return what tells tensors from others."""
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
