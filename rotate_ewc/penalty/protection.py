"""What a penalty protects of a model: found by name, and warned of where it has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rotate_ewc._utils.messages import parameters_are, parameters_have
from rotate_ewc._utils.parameters import fits, misfits, protected_slice
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.distributed.sharding import gathered, is_sharded
from rotate_ewc.penalty.terms import Stack


class Protection:
    """Finds what is protected, and remembers what it has warned of."""

    def __init__(self) -> None:
        """Begin without a warning."""
        self._left_out: set[str] = set()
        self._grown: set[tuple[str, torch.Size]] = set()

    def find(
        self, stacks: Sequence[Stack], parameters: Mapping[str, Tensor], *, strict: bool
    ) -> dict[str, Tensor]:
        """Return what is protected of each parameter, by the stacks' own names for parameters.

        Args:
            stacks: What is protected.
            parameters: The model's, by name. Of those that are spread over processes, all numbers
                are gathered.
            strict: Whether all must be there; else those that are missing are left out.

        Raises:
            ValueError: If one is missing, or smaller than it was.
        """
        parameters = _gathered(stacks, parameters)
        found: dict[str, Tensor] = {}
        grown: dict[str, tuple[Tensor, Tensor]] = {}
        left_out: set[str] = set()
        try:
            for stack in stacks:
                for key, name, anchor in stack.members:
                    if not strict and not fits(name, parameters, anchor[0]):
                        left_out.add(name)
                        continue
                    found[key] = part = protected_slice(name, parameters, anchor[0])
                    whole = parameters[name]
                    if part is not whole and (name, whole.shape) not in self._grown:
                        grown[name] = part, anchor[-1]
        except ValueError:
            raise ValueError(misfits(_wanted(stacks, parameters, strict), parameters)) from None
        if new := sorted(left_out - self._left_out):
            self._left_out.update(new)
            warn_user(
                f"{parameters_are(new)} missing in the model, or smaller than when "
                f"consolidated, and not protected any more (strict=False)"
            )
        if grown:
            self._warn_of_replaced(parameters, grown)
        return found

    def _warn_of_replaced(
        self, parameters: Mapping[str, Tensor], grown: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Warn, once for each size, of larger layers that do not begin with their anchors.

        Two unrelated tensors are at a squared distance of the sum of their squared norms. One that
        was copied, and trained for a while, is much nearer.

        Args:
            parameters: The model's parameters.
            grown: What is protected of each one that has grown, and its latest anchor.
        """
        layers: dict[str, list[str]] = {}
        for name, (found, _) in grown.items():
            if not torch._C._functorch.is_batchedtensor(found):  # which has no single value
                self._grown.add((name, parameters[name].shape))
                layers.setdefault(name.rpartition(".")[0], []).append(name)
        for names in layers.values():
            pairs = [[t.detach().double() for t in grown[name]] for name in names]
            size = sum(float(f.square().sum() + a.square().sum()) for f, a in pairs)
            if sum(float((f - a).square().sum()) for f, a in pairs) > 0.5 * size:
                warn_user(
                    f"{parameters_have(names)} grown, but not from the values that were "
                    f"consolidated, as if a new layer had taken the name; the penalty pulls that "
                    f"part to the old values. Copy these into it, as Avalanche's "
                    f"IncrementalClassifier does, or give the new layer another name (and "
                    f"strict=False, which leaves out the old one)"
                )


def _gathered(stacks: Sequence[Stack], parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return parameters with those whole that are protected."""
    names = (name for stack in stacks for name in stack.names)
    spread = [name for name in dict.fromkeys(names) if is_sharded(parameters.get(name))]
    return {**parameters, **{n: gathered(parameters[n]) for n in spread}} if spread else parameters


def _wanted(
    stacks: Sequence[Stack], parameters: Mapping[str, Tensor], strict: bool
) -> dict[str, Tensor]:
    """Return the anchors of the parameters that must be there."""
    return {
        name: anchor[0]
        for stack in stacks
        for _, name, anchor in stack.members
        if strict or fits(name, parameters, anchor[0])
    }
