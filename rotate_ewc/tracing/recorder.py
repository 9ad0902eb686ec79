"""See every operation of a forward pass that uses parameters, and keep edges to its outputs.

Not by module hooks: a `TorchFunctionMode` sees the operations themselves, so it is right where
hooks are not (padding modes, in-place activations, layers that run twice, functional use). A use
for which there is no rule is seen too, and refused by name instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from rotate_ewc._utils.tree import map_tensors, tensors_in, version_of
from rotate_ewc.layers import (
    BROADCASTING,
    COMPOSITIONS,
    LAYERS,
    RULES,
    LayerCall,
    broadcast,
    broadcast_shape,
    stretched,
    token,
)
from rotate_ewc.tracing.block_plan import UseForms
from rotate_ewc.tracing.operations import (
    BLANK,
    CONSTANT,
    COPYING,
    JOINING,
    LIKE,
    SAME,
    can_broadcast,
    is_checkpointed,
    is_composite,
    is_in_place,
    opened,
    written,
)
from rotate_ewc.tracing.origins import Computed, Constants, Origins
from rotate_ewc.tracing.program import Program

_NESTED: Final = (
    "the layer's input is a nested tensor; pad it, with torch.nested.to_padded_tensor(x, 0.0), and "
    "mask what was added"
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

    def forms(self, output_size: int) -> UseForms:
        """Return what the plan of the blocks depends on.

        Args:
            output_size: Number of entries of the output, with as many rows for every example.
        """
        return UseForms(
            self.weight,
            self.bias,
            self.call.weight_form,
            self.call.bias_form,
            self.call.joins_bias,
            output_size,
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


class Recorder(TorchFunctionMode):
    """Sees every call of a torch function, and keeps those that use a tracked parameter.

    Attributes:
        uses: Uses by operations that have a rule, in order.
        edges: An edge to the output of every use.
        refusals: Uses by operations that have no rule.
        impossible: Parameters that were used in a way that no setting allows, by the reason.
        hidden: Names of parameters that were used while gradients were off.
        data_nodes: For the autograd node of every operation that used parameters and data, whether
            it has a rule or not, the nodes that its data came from.
        program: What was called.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], constants: Constants, inputs: Any = None
    ) -> None:
        """Look for parameters.

        Args:
            parameters: The tensors to look for, by name.
            constants: Tensors that do not depend on the data.
            inputs: The data.
        """
        super().__init__()
        self.uses: list[Use] = []
        self.edges: list[GradientEdge] = []
        self.refusals: list[Refusal] = []
        self.impossible: dict[str, set[str]] = {}
        self.hidden: set[str] = set()
        self.data_nodes: dict[Any, list[Any]] = {}
        known = (*tensors_in(inputs), *parameters.values(), *constants.shared, *constants.blank)
        self.program = Program(known)
        self._origins = Origins(parameters, constants)
        self._origins.note_data(tensors_in(inputs))

    @property
    def computed(self) -> Mapping[str, Computed]:
        """Tensors computed from tracked parameters and constants alone, by key."""
        return self._origins.computed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note what it did with parameters, and what it has made."""
        result = self._seen(func, args, kwargs or {})
        results = written(func, args, result)
        self._origins.note_data(results)
        self.program.note_results(func, args, results)
        return result

    def _seen(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run an operation, and note what it did with parameters."""
        known = self._origins
        tensors = list(tensors_in((args[:1] or kwargs) if func in LIKE else (args, kwargs)))
        parameters = {id(t): t for t in tensors if known.is_parameter(t)}
        varying = [t for t in tensors if known.may_vary(t)]
        self.program.note(func, args, kwargs, tensors, varying)
        fixed = all(map(known.is_constant, varying))
        if not parameters:
            into = args[0] if args and is_in_place(func) else None
            base = into._base if isinstance(into, Tensor) else None
            changed = [] if base is None or not known.is_constant(base) else [base]
            result = func(*args, **kwargs)
            if fixed and (tensors or func in CONSTANT or func in BLANK):
                self._note_constants(func, tensors, [*written(func, args, result), *changed])
            return result
        # Before it runs: what is written into is no parameter any more.
        sources = known.sources(*parameters.values())
        seen = fixed and not any(map(known.is_repeated, tensors))
        if func not in RULES and not seen and is_composite(func):
            with self:
                return opened(func)(*args, **kwargs)
        call = None if fixed and func not in LAYERS else self._call(func, args, kwargs, fixed)
        if self.impossible and kwargs.get("max_norm") is not None:
            # What has been refused is not to rescale its weights any more.
            kwargs = {**kwargs, "max_norm": None}
        if fixed and call is None:
            result = self._compute(func, args, kwargs, tensors, sources)
        elif call is None and func in COMPOSITIONS and not (is_checkpointed() or "out" in kwargs):
            with self:
                return COMPOSITIONS[func](*args, **kwargs)
        else:
            edge, result = self._run(func, args, kwargs, tensors, parameters, call)
            if edge is not None:
                operation = resolve_name(func) or getattr(func, "__name__", repr(func))
                self.refusals.append(Refusal(sources, f"the operation {operation}", edge))
        if not torch.is_grad_enabled() and any(True for _ in tensors_in(result)):
            self.hidden |= sources
        return result

    def changed(self, use: Use) -> Iterable[str]:
        """Return the sources of a use's computed parameters, if they have changed since."""
        used = [self.computed.get(name or "") for name in (use.weight, use.bias)]
        return {n for c in used if c and version_of(c.tensor) != c.version for n in c.sources}

    def note_outputs(self, outputs: Any) -> Any:
        """Return the model's outputs, and note the use of parameters of which they are copies."""
        if not self._origins.is_parameter(outputs):
            return outputs
        return self._copy(outputs, outputs.shape, broadcasting=False)

    def _call(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], fixed: bool
    ) -> LayerCall | None:
        """Return the layer call that a rule finds in an operation; None if no rule knows it."""
        rule, known = RULES.get(func), self._origins
        # What is written into a view gets a new history, in which the view's own is not.
        if rule is None or (is_in_place(func) and args[0]._base is not None):
            return None
        # A layer's input that was expanded holds examples, also where it is all parameters.
        is_parameter = known.is_shared if fixed else known.is_parameter
        plain = [known.unexpanded(value, kept=BROADCASTING.get(func)) for value in args]
        try:
            call = rule(is_parameter, *plain, **kwargs)
        except ValueError as error:
            # Others may follow that are refused for the same reason.
            self._refuse(str(error), args, kwargs)
            return None
        except TypeError:  # arguments that the rule does not know
            return None
        if call is None or is_parameter(call.input):
            return None
        if call.input.is_nested:
            self._refuse(_NESTED, args, kwargs)
            return None
        if fixed and not (known.is_blank(call.input) or known.is_repeated(call.input)):
            return None
        own = [t for t in (call.weight, call.bias) if known.is_parameter(t)]
        # What was expanded may vary along the axis of the examples.
        if not own or (0 not in call.batch_axes and any(map(known.is_repeated, own))):
            return None
        return call

    def _refuse(self, reason: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note that an operation uses parameters in a way that no setting allows."""
        names = self._origins.sources(*tensors_in((args, kwargs)))
        self.impossible.setdefault(reason, set()).update(names)

    def _run(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        parameters: Mapping[int, Tensor],
        call: LayerCall | None,
    ) -> tuple[GradientEdge | None, Any]:
        """Run an operation on parameters and data, and note how it uses the parameters.

        Returns:
            An edge to its output if there is no rule for it, and its result.
        """
        nodes = [t.grad_fn for t in tensors if not self._origins.is_parameter(t)]
        own = () if call is None else (id(call.weight), id(call.bias))
        others = [t for key, t in parameters.items() if key not in own]
        if others:
            kept, known = BROADCASTING.get(func), self._origins
            others = [t for t in others if id(known.unexpanded(t, kept=kept)) not in own]
        copies = self._copies(func, args, kwargs, others) if others else {}
        # Before it runs, since what is refused may change what it uses.
        use = None if call is None or copies is None else self._as_use(call)
        if copies:
            args, kwargs = map_tensors(lambda t: copies.get(id(t), t), (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in written(func, args, result) if t.requires_grad and not t.is_leaf]
        if use is not None and outputs and not _is_regular(outputs[0], use.call.input):
            use = None
        if not outputs or (copies and use is None):
            return None, result
        edge = _output_edge(func, outputs[0])
        if use is None:
            self._note_data(edge, nodes)
            return edge, result
        self._note_use(use, outputs[0].shape, edge, nodes)
        return None, result

    def _copies(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        parameters: Sequence[Tensor],
    ) -> dict[int, Tensor] | None:
        """Return copies with which an operation can use parameters, so that it uses data alone.

        Their gradients tell those of the parameters, whatever the operation does with them: where
        it broadcasts all it is given to one shape, or where they were expanded over the examples.

        Returns:
            The copies by the identity of the parameters; None if there are none of some.
        """
        if not torch.is_grad_enabled():
            return {}
        if is_in_place(func) and self._origins.is_parameter(args[0]):
            return None
        shape = None if is_checkpointed() else broadcast_shape(func, args, kwargs)
        copies = {}
        for parameter in parameters:
            broadcasts = shape is not None and can_broadcast(parameter, shape, args)
            if not broadcasts and not self._origins.is_repeated(parameter):
                return None
            to = shape if broadcasts and shape is not None else parameter.shape
            copies[id(parameter)] = self._copy(parameter, to, broadcasting=broadcasts)
        return copies

    def _copy(self, parameter: Tensor, shape: Sequence[int], *, broadcasting: bool) -> Tensor:
        """Copy a parameter to the shape of data, and note that as a use of it."""
        known = self._origins
        one = known.one_copy(parameter)
        if broadcasting:
            call = broadcast(one, shape, shared=known.is_shared(one))
        else:
            call = token(one, shape)
        copy = stretched(parameter, shape)
        self._note_use(self._as_use(call), copy.shape, get_gradient_edge(copy), ())
        return copy

    def _note_use(
        self, use: Use, output_shape: torch.Size, edge: GradientEdge, nodes: Sequence[Any]
    ) -> None:
        """Note a use, an edge to its output, and the autograd nodes that its data came from."""
        self.uses.append(replace(use, output_shape=output_shape))
        self.edges.append(edge)
        self._note_data(edge, nodes)

    def _note_data(self, edge: GradientEdge, nodes: Sequence[Any]) -> None:
        self.data_nodes[edge.node] = [node for node in nodes if node is not None]

    def _as_use(self, call: LayerCall) -> Use:
        name = self._origins.name
        layer_input = call.input.detach()
        if layer_input.layout is not torch.strided:
            layer_input = layer_input.to_dense()
        call = replace(call, input=layer_input)
        return Use(name(call.weight), name(call.bias), call, version_of(layer_input))

    def _compute(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        sources: frozenset[str],
    ) -> Any:
        """Run an operation on parameters and constants alone, and note what it computes."""
        known = self._origins
        copying = func in COPYING or (func in SAME and known.is_expanded(args[0]))
        again = func in JOINING and len({*map(id, tensors)}) < max(2, len(tensors))
        blank = any(map(known.is_blank, tensors))
        repeated = copying or again or blank or any(map(known.is_repeated, tensors))
        result = func(*args, **kwargs)
        for tensor in written(func, args, result):
            if tensor.requires_grad and not tensor.is_leaf:
                if is_in_place(func) and tensor._base is not None:
                    known.hold_changed(tensor._base, sources)
                known.hold_computed(tensor, sources, repeated=repeated)
                if copying and args:
                    known.hold_expanded(tensor, args[0])
            elif not tensor.requires_grad:
                known.hold_constant(tensor, blank=blank)
        return result

    def _note_constants(
        self, func: Callable[..., Any], tensors: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        """Note what an operation on constants alone has computed, or written into."""
        shared = self._origins.others_are_shared
        blank = (func in BLANK and not shared) or any(map(self._origins.is_blank, tensors))
        for tensor in results:
            repeated = func in COPYING and not tensor.is_floating_point()
            one_row = shared and tensor.shape[:1].numel() == 1  # as of the prompts of PEFT
            self._origins.hold_constant(tensor, blank=(blank or repeated) and not one_row)


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
