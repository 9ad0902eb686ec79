"""Where the tensors of a forward pass come from: parameters, constants, or data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from rotate_ewc._utils.tree import tensors_in, version_of


@dataclass(frozen=True)
class Computed:
    """A tensor computed from parameters and constants alone, such as a reparametrised weight.

    Attributes:
        tensor: The tensor, attached to the autograd graph.
        sources: Names of the parameters that it was computed from.
        version: How often it had been modified in place when it was computed.
        repeated: Whether something was expanded or repeated on the way: it may vary with the
            examples.
    """

    tensor: Tensor
    sources: frozenset[str]
    version: int = 0
    repeated: bool = False

    def pull_back(self, gradients: Tensor, parameter: Tensor) -> Tensor:
        """Turn per-example gradients of the tensor into those of a parameter it comes from.

        Args:
            gradients: `[n, *tensor.shape]`.
            parameter: One of the sources.

        Returns:
            `[n, *parameter.shape]`, in the gradients' dtype.
        """
        # One by one, because not every operation can be vectorised over examples.
        pulled = [
            torch.autograd.grad(
                self.tensor,
                parameter,
                gradient.to(self.tensor.dtype),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )[0]
            for gradient in gradients
        ]
        return torch.stack(pulled).detach().to(gradients.dtype)


@dataclass(frozen=True)
class Constants:
    """Tensors of modules that do not depend on the data.

    Attributes:
        shared: Those that are the same for all examples.
        blank: Those that hold examples all the same where a layer takes them as its input, as the
            state of a recurrent layer that the model has kept.
        others_are_shared: Whether whatever does not come from the inputs, and needs no gradient, is
            the same for all examples too: ids that the model makes of plain numbers, which a layer
            else takes for examples that came as lists; and what a function keeps in a variable or a
            cache, which may else be data.
    """

    shared: Sequence[Tensor] = ()
    blank: Sequence[Tensor] = ()
    others_are_shared: bool = False

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Constants:
        """Return the buffers, parameters, and tensor attributes of modules, without submodules'."""
        each = list(dict.fromkeys(modules))
        plain = [
            tensor
            for module in each
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers")
            for tensor in _held_by(value)
            if not tensor.requires_grad
        ]
        registered = [
            tensor
            for module in each
            for tensor in (*module.buffers(recurse=False), *module.parameters(recurse=False))
        ]
        return cls(
            [*registered, *(tensor for tensor in plain if not _is_real(tensor))],
            [tensor for tensor in plain if _is_real(tensor)],
        )

    def without(self, value: Any) -> Constants:
        """Return those that are not among the tensors in a nested value."""
        given = {id(tensor) for tensor in tensors_in(value)}
        shared, blank = (
            [t for t in some if id(t) not in given] for some in (self.shared, self.blank)
        )
        return Constants(shared, blank, self.others_are_shared)


NO_CONSTANTS: Final = Constants()


def _held_by(attribute: object) -> Iterator[Tensor]:
    """Yield the tensors in an attribute, which may be a collection that holds itself."""
    waiting, seen = [attribute], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, tuple, list)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the data, as it was at one time."""

    tensor: Tensor
    version: int
    blank: bool


class Origins:
    """What is known of tensors, by identity. Each is held, so that no other can get its identity.

    Attributes:
        computed: Tensors computed from parameters and constants alone, by key.
        others_are_shared: Whether what does not come from the inputs is the same for all examples.
    """

    def __init__(self, parameters: Mapping[str, Tensor], constants: Constants) -> None:
        """Begin with the tensors that are known beforehand.

        Args:
            parameters: The tensors to look for, by name.
            constants: Tensors that do not depend on the data.
        """
        self.computed: dict[str, Computed] = {}
        self.others_are_shared = constants.others_are_shared
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._constants: dict[int, _Constant] = {}
        self._expanded: dict[int, Tensor] = {}
        self._from_inputs: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        for tensor in constants.blank:
            self.hold_constant(tensor, blank=True)
        for tensor in constants.shared:
            self.hold_constant(tensor)

    def name(self, value: object) -> str | None:
        """Return the name of a parameter, or the key of a tensor computed from some."""
        name = self._names.get(id(value))
        if name is not None and (computed := self.computed.get(name)) is not None:
            # Written into since, it may hold data.
            return name if computed.version == version_of(computed.tensor) else None
        return name

    def sources(self, *values: object) -> frozenset[str]:
        """Return the names of the parameters that some values are, or were computed from."""
        found: set[str] = set()
        for name in map(self.name, values):
            if name is not None:
                computed = self.computed.get(name)
                found |= {name} if computed is None else computed.sources
        return frozenset(found)

    def is_parameter(self, value: object) -> bool:
        """Whether a value is a tracked parameter, or computed from some."""
        return self.name(value) is not None

    def is_repeated(self, value: object) -> bool:
        """Whether a value is computed from parameters, and may vary with the examples."""
        computed = self.computed.get(self._names.get(id(value), ""))
        return computed is not None and computed.repeated and self.is_parameter(value)

    def is_shared(self, value: object) -> bool:
        """Whether a value is a parameter, or computed from some, and the same for all examples."""
        return self.is_parameter(value) and not self.is_repeated(value)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor does not depend on the data."""
        if isinstance(tensor, nn.Parameter):
            return True
        constant = self._constants.get(id(tensor))
        if constant is not None and constant.version == version_of(tensor):
            return True
        known = constant is not None or self._from_inputs.get(id(tensor)) is tensor
        return self.others_are_shared and not known and not tensor.requires_grad

    def is_blank(self, tensor: Tensor) -> bool:
        """Whether a constant holds examples where a layer takes it as its input."""
        constant = self._constants.get(id(tensor))
        return constant is not None and constant.blank

    def may_vary(self, tensor: Tensor) -> bool:
        """Whether a tensor may hold data, or something for each example."""
        if self.is_parameter(tensor):
            return False
        return not self.is_constant(tensor) or self.is_blank(tensor)

    def note_data(self, tensors: Iterable[Tensor]) -> None:
        """Note that tensors, if they are not known, come from the inputs."""
        if self.others_are_shared:
            self._from_inputs.update((id(tensor), tensor) for tensor in tensors)

    def hold_constant(self, tensor: Tensor, *, blank: bool = False) -> None:
        """Note that a tensor does not depend on the data."""
        self._constants[id(tensor)] = _Constant(tensor, version_of(tensor), blank)

    def hold_computed(
        self, tensor: Tensor, sources: frozenset[str], *, repeated: bool = False
    ) -> None:
        """Note that a tensor comes from parameters and constants alone."""
        if not self.is_parameter(tensor):
            key = f"{' and '.join(sorted(sources))} (computed, {len(self.computed)})"
            self.computed[key] = Computed(tensor, sources, version_of(tensor), repeated)
            self._names[id(tensor)] = key

    def hold_changed(self, base: Tensor, sources: frozenset[str]) -> None:
        """Note that parameters and constants were written into a view of a computed tensor."""
        before = self.computed.get(self._names.get(id(base), ""))
        if before is not None:
            self.hold_computed(base, before.sources | sources, repeated=before.repeated)

    def hold_expanded(self, tensor: Tensor, parameter: Tensor) -> None:
        """Note that a tensor, computed from a parameter, is that parameter broadcast."""
        if tensor is not parameter and _broadcasts(parameter.shape, tensor.shape):
            self._expanded[id(tensor)] = self._expanded.get(id(parameter), parameter)

    def is_expanded(self, value: object) -> bool:
        """Whether a value is a parameter broadcast to another shape."""
        return id(value) in self._expanded and self.is_parameter(value)

    def unexpanded(self, value: Any, *, kept: int | None) -> Any:
        """Return the parameter that was broadcast to a tensor, or else the tensor itself.

        Args:
            value: The tensor; anything else is returned as it is.
            kept: How many of the last axes must be the same; None for all.
        """
        parameter = self._expanded.get(id(value))
        if parameter is None or kept is None or not self.is_parameter(value):
            return value
        own, original = value.shape, parameter.shape
        return parameter if own[len(own) - kept :] == original[-kept or len(original) :] else value

    def one_copy(self, tensor: Tensor) -> Tensor:
        """Return what was broadcast to a computed tensor, if anything was."""
        parameter: Tensor = self.unexpanded(tensor, kept=0)
        if parameter is not tensor or not self.is_repeated(tensor):
            return parameter
        # Views of what was expanded show it by their strides.
        places = zip(tensor.stride(), tensor.shape, strict=True)
        copied = [stride == 0 and size > 1 for stride, size in places]
        if not any(copied):
            return tensor
        one = tensor[tuple(slice(0, 1) if axis else slice(None) for axis in copied)]
        self.hold_computed(one, self.sources(tensor))
        return one


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape can be broadcast to another one."""
    own = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(own) == len(to) and all(a in (1, b) for a, b in zip(own, to, strict=True))
