"""Find in the autograd graph the uses of parameters that were not seen, or that have no rule.

Here are only the nodes of the graph and the names of parameters, none of a batch's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from rotate_ewc._utils.messages import left_out, listed, parameters_are
from rotate_ewc.layers import SUPPORTED
from rotate_ewc.options import Unsupported
from rotate_ewc.tracing.recorder import Refusal


def reachable_nodes(start: Any, instead: Mapping[Any, Sequence[Any]] | None = None) -> set[Any]:
    """Return the nodes of an autograd graph that can be reached from one of them.

    Args:
        start: The node, such as the `grad_fn` of a model's outputs; None for no graph.
        instead: Where to go on from some nodes, instead of to all that they depend on.
    """
    nodes: set[Any] = set()
    pending = [start] if start is not None else []
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if instead is not None and node in instead:
            pending.extend(instead[node])
        else:
            pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return nodes


def unsupported_parameters(
    start: Any,
    nodes: set[Any],
    parameters: Mapping[str, Tensor],
    refusals: Iterable[Refusal],
    data_nodes: Mapping[Any, Sequence[Any]],
    used_without_gradients: Iterable[str],
    unsupported: Unsupported,
) -> frozenset[str]:
    """Return the parameters that the outputs depend on through uses without a rule.

    A use that was not seen is found in the graph: from the outputs, past every operation that was
    seen only to the data it used, no parameter can be reached but through such a use.

    Args:
        start: The node of the outputs.
        nodes: All nodes that can be reached from it.
        parameters: The tracked parameters, by name.
        refusals: The uses that were seen, but have no rule.
        data_nodes: For the node of every operation that was seen, those that its data came from.
        used_without_gradients: Names of parameters that were used while gradients were off.
        unsupported: Which of them are an error.

    Raises:
        ValueError: If there are such parameters, and `unsupported` does not allow them.
    """
    hidden = _hidden(used_without_gradients, parameters, nodes)
    if hidden and unsupported is not Unsupported.SKIP:
        raise ValueError(_hidden_message(hidden))
    refused = {r.names: r.operation for r in refusals if r.edge.node in nodes}
    unseen = _reached(parameters, reachable_nodes(start, data_nodes))
    unseen -= {name for names in refused for name in names}
    if unseen:
        refused[frozenset(unseen)] = (
            "an operation that cannot be observed, such as scripted code or an autograd.Function "
            "of its own"
        )
    if refused and unsupported is Unsupported.ERROR:
        raise ValueError(_refusal_message(refused))
    return frozenset(name for names in refused for name in names) | hidden


def _hidden(
    used: Iterable[str], parameters: Mapping[str, Tensor], nodes: set[Any]
) -> frozenset[str]:
    """Return the parameters that the outputs may depend on without autograd knowing it.

    The forward pass of an `autograd.Function` runs without gradients, and its backward pass may
    find gradients of parameters that are not its arguments, as reentrant checkpoints do.
    """
    if not any(isinstance(node, BackwardCFunction) for node in nodes):
        return frozenset()
    return frozenset(used) & parameters.keys() - _reached(parameters, nodes)


def _reached(parameters: Mapping[str, Tensor], nodes: set[Any]) -> set[str]:
    """Return the names of the parameters to which nodes of an autograd graph lead."""
    variables = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    return {name for name, tensor in parameters.items() if id(tensor) in variables}


def _hidden_message(names: frozenset[str]) -> str:
    return (
        f"{parameters_are(sorted(names))} used while gradients are off, perhaps by an "
        f"autograd.Function that finds its gradient by itself, as torch.utils.checkpoint does "
        f"with use_reentrant=True; pass use_reentrant=False there. Where no other parameter comes "
        f"before them, pass unsupported='skip' to protect only the others, or "
        f"{left_out(sorted(names))}"
    )


# What else to do about an operation, part of whose name is the key.
_ADVICE: Final = {
    "grouped_mm": "; experts of transformers have rules after "
    "model.set_experts_implementation('batched_mm')",
}


def _refusal_message(refused: Mapping[frozenset[str], str]) -> str:
    """Say of all parameters without a rule what uses them."""
    users: dict[str, set[str]] = {}
    for names, operation in refused.items():
        users.setdefault(operation, set()).update(names)
    told = [f"{parameters_are(sorted(names))} used by {user}" for user, names in users.items()]
    every = sorted(set().union(*refused))
    advice = next(
        (text for part, text in _ADVICE.items() if any(part in user for user in users)), ""
    )
    return (
        f"{listed(told)}, for which there is no rule; supported are {SUPPORTED}. Pass "
        f"unsupported='diagonal' for an exact diagonal of such parameters (which is slow), "
        f"unsupported='skip' to protect only the others, or {left_out(every)}{advice}"
    )
