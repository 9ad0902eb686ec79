"""What takes turns in a case: training steps, penalties, and the peers' quadratic forms."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.speed.cases import Problem
from benchmarks.speed.penalty import names, peers, steps
from benchmarks.speed.penalty.history import History
from benchmarks.speed.results import MISSING, REFUSED, WRONG
from rotate_ewc import EKFACPenalty

# Nngeometry takes weight and bias in one block, and has other sampled labels.
LARGEST_FACTORS = {names.PEERS[0]: 10.0, names.PEERS[1]: 1.01}


@dataclass
class Field:
    """Who takes part in a case.

    Attributes:
        works: Functions that do the work once, or as many times as there are steps in a call.
        calls: Steps in a call, where there are several.
        remarks: What is wrong with a contender or why it is absent, by status and then message.
        values: What the penalty and its peers found, for the same displacement.
    """

    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)


def enter(case: str, history: History) -> Field:
    """Make all contenders of a case.

    Args:
        case: Its name.
        history: The penalties.

    Returns:
        The contenders, those that are compared as neighbours.
    """
    found = Field()
    found.works[names.STEP] = steps.plain_step(history.problem)
    for tasks, penalty in history.merged.items():
        found.works[names.step_after(tasks)] = steps.plain_step(history.problem, penalty)
    _enter_other_steps(found, case, history)
    for tasks, penalty in history.merged.items():
        found.works[names.penalty_after(tasks)] = _penalty(history.problem, penalty)
    ours = names.ours_beside_peers(case)
    if ours == names.KNOWN:
        found.works[ours] = _penalty(history.problem, history.known, of_known_layers=True)
    for peer in names.PEERS:
        _enter_peer(found, peer, ours, history)
    if history.separate is not None:
        _enter_separate(found, history, history.separate)
    return found


def _enter_other_steps(found: Field, case: str, history: History) -> None:
    """Add steps that do not have the whole penalty in the loss, after the most tasks."""
    penalty = history.merged[max(history.merged)]
    problem = history.problem
    found.works[names.TANGENT] = steps.tangent_steps(problem, penalty)
    if case in names.PERCEPTRONS:
        found.works[names.PROXIMAL] = steps.proximal_steps(problem, penalty)
        found.works[names.ROTATED] = steps.rotated_step(problem, penalty)
    found.calls |= names.CALLS


def _penalty(
    problem: Problem, penalty: EKFACPenalty, *, of_known_layers: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    """The penalty forward and backward."""
    model, parameters = _copy(problem, of_known_layers=of_known_layers)
    return lambda: torch.autograd.grad(penalty(model), parameters)


def _copy(problem: Problem, *, of_known_layers: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the model and the parameters that have gradients."""
    own = replace(problem, model=copy.deepcopy(problem.model))
    return own.model, own.known_parameters if of_known_layers else list(own.model.parameters())


def _enter_separate(found: Field, history: History, penalty: EKFACPenalty) -> None:
    """Add the penalty with separate tasks, and as many penalties one by one."""
    model, parameters = _copy(history.problem, of_known_layers=False)
    single, tasks = history.single, len(history.single)

    def one_by_one() -> tuple[Tensor, ...]:
        value = single[0](model)
        for other in single[1:]:
            value = value + other(model)
        return torch.autograd.grad(value, parameters)

    found.works[names.separate(tasks)] = _penalty(history.problem, penalty)
    found.works[names.one_by_one(tasks)] = one_by_one


def _enter_peer(found: Field, peer: str, ours: str, history: History) -> None:
    """Add a peer, if it is there, knows the case and finds what it should."""
    if not peers.installed(peer):
        found.remarks[peer] = MISSING, ""
        return
    try:
        anchored = replace(history.first, model=copy.deepcopy(history.first.model))
        form = peers.FORMS[peer](anchored)
        anchors = [parameter.detach().clone() for parameter in anchored.known_parameters]
        _, parameters = _copy(history.problem, of_known_layers=True)

        def value() -> Tensor:
            return form([p - a for p, a in zip(parameters, anchors, strict=True)])

        found.values[ours] = float(history.known(history.problem.model).detach())
        found.values[peer] = float(value().detach())
        gradients = torch.autograd.grad(value(), parameters)
    # Packages refuse what they do not know in ways of their own.
    except Exception as error:
        found.remarks[peer] = REFUSED, f"{type(error).__name__}: {error}"
        return
    found.works[peer] = lambda: torch.autograd.grad(value(), parameters)
    _judge(found, peer, ours, finite=all(bool(g.isfinite().all()) for g in gradients))


def _judge(found: Field, peer: str, ours: str, *, finite: bool) -> None:
    """Mark a peer whose value is another one."""
    factor = found.values[peer] / found.values[ours] if found.values[ours] else 0.0
    if not finite:
        found.remarks[peer] = WRONG, "wrong: the gradient is not finite"
    elif not 1 / LARGEST_FACTORS[peer] <= factor <= LARGEST_FACTORS[peer]:
        found.remarks[peer] = WRONG, f"wrong ×{factor:.4g}"
