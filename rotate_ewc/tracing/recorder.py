"""Record every operation of a forward pass that uses parameters, and find the gradients there.

Not by module hooks: a `TorchFunctionMode` sees the operations themselves, so it is right where
hooks are not (padding modes, in-place activations, layers that run twice, functional use). A use
for which there is no rule is seen too, and refused by name instead of being silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from rotate_ewc._utils.numerics import without_autocast
from rotate_ewc._utils.tree import tensors_in, version_of
from rotate_ewc.layers import BROADCASTING, RULES, LayerCall
from rotate_ewc.tracing.block_plan import UseForms

# What these make depends on no data. But of the second kind may also be the first state of a
# recurrent layer, and of the third the positions of every example's tokens: a layer's input.
_CONSTANT: Final = frozenset({torch.arange, torch.eye})
_BLANK: Final = frozenset(
    {torch.zeros, torch.ones, torch.full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
)
_EXPANDING: Final = frozenset({Tensor.expand, Tensor.expand_as, torch.broadcast_to})
_REPEATING: Final = frozenset({Tensor.expand, Tensor.repeat, torch.broadcast_to})

_NESTED: Final = (
    "the layer's input is a nested tensor; pad it, with torch.nested.to_padded_tensor(x, 0.0), and "
    "mask what was added"
)

# How functions of torch.nn.functional ask whether somebody wants to see them called.
_DISPATCH_CHECKS: Final = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


@dataclass(frozen=True)
class Use:
    """One use of parameters by an operation that has a rule.

    Attributes:
        weight: Name of the weight (or key of a computed one), None if it is not tracked.
        bias: Name of the bias, likewise.
        call: The operation's arguments, its input detached from the autograd graph.
        input_version: How often the input had been modified in place when it was used.
        output_shape: Shape of the operation's output.
    """

    weight: str | None
    bias: str | None
    call: LayerCall
    input_version: int
    output_shape: tuple[int, ...] = ()

    @property
    def forms(self) -> UseForms:
        """What the plan of the blocks depends on."""
        return UseForms(
            self.weight,
            self.bias,
            self.call.weight_form,
            self.call.bias_form,
            self.call.joins_bias,
            math.prod(self.output_shape),
        )

    @property
    def unmodified(self) -> bool:
        """Whether the input still is what the layer saw."""
        return version_of(self.call.input) == self.input_version

    @property
    def name(self) -> str:
        """A name for messages: that of the weight, or else of the bias."""
        return self.weight or self.bias or "?"


@dataclass(frozen=True)
class Computed:
    """A tensor computed from parameters and constants alone, such as a reparametrised weight.

    Attributes:
        tensor: The tensor, attached to the autograd graph.
        sources: Names of the parameters that it was computed from.
    """

    tensor: Tensor
    sources: frozenset[str]

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
class Refusal:
    """A use of parameters that has no rule.

    Attributes:
        names: The parameters.
        operation: What used them.
        edge: Its (first) output.
    """

    names: frozenset[str]
    operation: str
    edge: GradientEdge


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the data, as it was at one time."""

    tensor: Tensor
    version: int
    blank: bool


@dataclass(frozen=True)
class ForwardPass:
    """The uses of parameters that the outputs depend on, and the gradients at their outputs.

    Attributes:
        outputs: The model's outputs, attached to the autograd graph.
        uses: Every use of a tracked parameter, in the order in which they ran.
        edges: An edge to the output of every use.
        computed: The tensors computed from parameters that uses may name instead of them.
        unsupported: Parameters that have some use without a rule.
    """

    outputs: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    computed: Mapping[str, Computed]
    unsupported: frozenset[str]

    def gradients(self, vector: Tensor, *, last: bool) -> list[Tensor]:
        """Back-propagate one output vector.

        Args:
            vector: Of the outputs' shape.
            last: Whether the graph can be freed.

        Returns:
            For every use, the gradient at its output; zeros where the outputs do not depend on it.
        """
        gradients = back_propagate(self.outputs, self.edges, vector, retain_graph=not last)
        return [
            self.outputs.detach().new_zeros(use.output_shape)
            if gradient is None
            else gradient.reshape(use.output_shape)
            for gradient, use in zip(gradients, self.uses, strict=True)
        ]


class Recorder(TorchFunctionMode):
    """Sees every call of a torch function, and keeps those that use a tracked parameter.

    Attributes:
        uses: Uses by operations that have a rule, in order.
        edges: An edge to the output of every use.
        computed: Tensors computed from tracked parameters and constants alone, by key.
        refusals: Uses by operations that have no rule.
        impossible: Parameters that were used in a way that no setting allows, by the reason.
        hidden: Names of parameters that were used while gradients were off.
        data_nodes: For the autograd node of every operation that used parameters and data, whether
            it has a rule or not, the nodes that its data came from.
    """

    def __init__(self, parameters: Mapping[str, Tensor], constants: Iterable[Tensor] = ()) -> None:
        """Look for parameters.

        Args:
            parameters: The tensors to look for, by name.
            constants: Tensors that do not depend on the data, such as buffers.
        """
        super().__init__()
        self.uses: list[Use] = []
        self.edges: list[GradientEdge] = []
        self.computed: dict[str, Computed] = {}
        self.refusals: list[Refusal] = []
        self.impossible: dict[str, set[str]] = {}
        self.hidden: set[str] = set()
        self.data_nodes: dict[Any, list[Any]] = {}
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._sources = {id(tensor): frozenset({name}) for name, tensor in parameters.items()}
        # Held, so that no later tensor can get the identity of one of them.
        self._constants: dict[int, _Constant] = {}
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in constants:
            self._hold_constant(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note what it did with parameters."""
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        sources = frozenset[str]().union(*(self._sources.get(id(t), ()) for t in tensors))
        fixed = all(self._is_parameter(t) or self._is_constant(t) for t in tensors)
        if sources and not fixed and func not in RULES and _is_composite(func):
            with self:
                return _opened(func)(*args, **kwargs)
        takes_input = func in RULES and func not in BROADCASTING
        holds_examples = takes_input and any(self._is_blank(tensor) for tensor in tensors)
        expanding = func in _EXPANDING and self._is_parameter(args[0])
        computing = expanding or (fixed and not holds_examples)
        data_nodes = [t.grad_fn for t in tensors if not self._is_parameter(t)]
        # Before it runs, since what is refused may change what it uses.
        use = None if computing or not sources else self._read(func, args, kwargs, sources)
        if self.impossible and kwargs.get("max_norm") is not None:
            # What has been refused is not to rescale its weights any more.
            kwargs = {**kwargs, "max_norm": None}
        result = func(*args, **kwargs)
        if expanding:
            self._expanded[id(result)] = (result, args[0])
        if fixed and (tensors or func in _CONSTANT or func in _BLANK):
            self._note_constants(func, tensors, sources, result)
        results = list(tensors_in(result))
        outputs = [t for t in results if t.requires_grad and not t.is_leaf]
        if results and not torch.is_grad_enabled():
            self.hidden |= sources
        if not sources or not outputs:
            return result
        if computing:
            self._note_computed(outputs, sources)
            return result
        if use is not None and not _is_regular(outputs[0], use.call.input):
            use = None
        edge = _output_edge(func, outputs[0])
        self.data_nodes[edge.node] = [node for node in data_nodes if node is not None]
        if use is None:
            operation = resolve_name(func) or getattr(func, "__name__", repr(func))
            self.refusals.append(Refusal(sources, f"the operation {operation}", edge))
        else:
            self.uses.append(replace(use, output_shape=outputs[0].shape))
            self.edges.append(edge)
        return result

    def _is_parameter(self, value: object) -> bool:
        """Whether a value is a tracked parameter, or computed from some."""
        return id(value) in self._sources

    def _is_constant(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        # Written into since, it may hold data.
        constant = self._constants.get(id(tensor))
        return constant is not None and constant.version == version_of(tensor)

    def _is_blank(self, tensor: Tensor) -> bool:
        constant = self._constants.get(id(tensor))
        return constant is not None and constant.blank

    def _hold_constant(self, tensor: Tensor, *, blank: bool = False) -> None:
        self._constants[id(tensor)] = _Constant(tensor, version_of(tensor), blank)

    def _note_computed(self, outputs: Sequence[Tensor], sources: frozenset[str]) -> None:
        for tensor in outputs:
            if not self._is_parameter(tensor):
                key = f"{' and '.join(sorted(sources))} (computed, {len(self.computed)})"
                self.computed[key] = Computed(tensor, sources)
                self._names[id(tensor)], self._sources[id(tensor)] = key, sources

    def _note_constants(
        self,
        func: Callable[..., Any],
        tensors: Sequence[Tensor],
        sources: frozenset[str],
        result: Any,
    ) -> None:
        blank = func in _BLANK or any(self._is_blank(tensor) for tensor in tensors)
        for tensor in tensors_in(result):
            if not sources or not tensor.requires_grad:
                repeated = func in _REPEATING and not tensor.is_floating_point()
                self._hold_constant(tensor, blank=blank or repeated)

    def _read(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        sources: frozenset[str],
    ) -> Use | None:
        """Return the use that an operation makes of parameters, or None if no rule knows it."""
        rule = RULES.get(func)
        if func in BROADCASTING:
            args = [self._expanded.get(id(value), (value, value))[1] for value in args]
        try:
            call = None if rule is None else rule(self._is_parameter, *args, **kwargs)
        except ValueError as error:
            # Others may follow that are refused for the same reason.
            self.impossible.setdefault(str(error), set()).update(sources)
            call = None
        except TypeError:  # arguments that the rule does not know
            call = None
        if call is None or self._is_parameter(call.input):
            return None
        weight, bias = self._names.get(id(call.weight)), self._names.get(id(call.bias))
        known = [self._sources[id(t)] for t in (call.weight, call.bias) if id(t) in self._sources]
        if frozenset[str]().union(*known) != sources:
            return None
        layer_input = call.input.detach()
        if layer_input.is_nested:
            self.impossible.setdefault(_NESTED, set()).update(sources)
            return None
        if layer_input.layout is not torch.strided:
            layer_input = layer_input.to_dense()
        return Use(weight, bias, replace(call, input=layer_input), version_of(layer_input))


def back_propagate(
    outputs: Tensor,
    to: Sequence[Tensor] | Sequence[GradientEdge],
    vector: Tensor,
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Return the gradients of `outputs · vector` at tensors or edges; None where none gets there.

    Args:
        outputs: The model's outputs, attached to the autograd graph.
        to: Where gradients are wanted.
        vector: Of the outputs' shape.
        retain_graph: Whether another vector will follow.
    """
    if not to:
        return []
    # A backward pass computes in the dtypes of its forward pass; autocast would lower them.
    with without_autocast(outputs.device):
        gradients = torch.autograd.grad(
            outputs,
            to,
            grad_outputs=vector.to(outputs.dtype),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return [None if gradient is None else gradient.detach() for gradient in gradients]


def _is_regular(output: Tensor, layer_input: Tensor) -> bool:
    """Whether rules know such tensors; those of complex numbers would need conjugates."""
    is_complex = output.is_complex() or layer_input.is_complex()
    return output.layout is torch.strided and not is_complex


def _output_edge(func: Callable[..., Any], output: Tensor) -> GradientEdge:
    """Return an edge at which an operation's output gradient can be asked for.

    Some operations return a view of what they computed (`instance_norm`). An in-place operation on
    a view gives it a new history, and leaves what was there before without successors; not so with
    the tensor that it is a view of.
    """
    base = output._base
    in_place = func.__name__.endswith("_")
    if base is None or in_place or not base.requires_grad or base.numel() != output.numel():
        return get_gradient_edge(output)
    whole = base.is_contiguous() and output.is_contiguous()
    return get_gradient_edge(base if whole else output)


def _is_composite(func: Callable[..., Any]) -> TypeGuard[FunctionType]:
    """Whether a function is written in Python, of operations that can be seen themselves."""
    return isinstance(func, FunctionType) and func.__module__ == nn.functional.__name__


def _opened(func: FunctionType) -> Callable[..., Any]:
    """Return a function of torch that does not show itself as a whole, but what it is made of."""
    unseen = dict.fromkeys(_DISPATCH_CHECKS, lambda *_: False)
    copy = FunctionType(
        func.__code__,
        {**func.__globals__, **unseen},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
