"""Asking one package about one row, so that nothing it does reaches the next."""

import math
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.adapters.adapter import Adapter, Mode
from benchmarks.peers.exact import exact_matrix
from benchmarks.peers.problem import Problem
from benchmarks.peers.row import Row
from benchmarks.peers.verdict import (
    NotOffered,
    Outcome,
    Status,
    Structure,
    judge,
    outcome_of_exception,
)


@dataclass(frozen=True)
class Record:
    """One measurement, as it is kept in the JSON file.

    Attributes:
        row: Name of the row.
        problem: Label of the problem, empty where the row has one only.
        package: Name of the distribution.
        mode: How the package was asked.
        fallback: Whether the mode counts only where the package's other modes are not right.
        status: See :class:`benchmarks.peers.verdict.Status`.
        trace_ratio: Estimated over exact trace; None where there was nothing to compare.
        error: Largest deviation of an eigenvalue or diagonal entry, relative to the largest.
        message: What the package said, or what else is worth knowing.
    """

    row: str
    problem: str
    package: str
    mode: str
    fallback: bool
    status: str
    trace_ratio: float | None
    error: float | None
    message: str


def measure(row: Row, adapter: Adapter) -> list[Record]:
    """Measure every problem of a row in every mode of a package."""
    if not adapter.installed():
        missing = Outcome(Status.NOT_INSTALLED)
        return [_record(row, row.problems[0], adapter, adapter.modes[0], missing)]
    modes = adapter.modes if row.question == "matrix" else adapter.modes[:1]
    return [
        _record(row, problem, adapter, mode, _isolated(row, problem, adapter, mode))
        for problem in row.problems
        for mode in modes
    ]


def _record(row: Row, problem: Problem, adapter: Adapter, mode: Mode, outcome: Outcome) -> Record:
    """Put a measurement into a record; JSON has no infinities."""
    finite = [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in (outcome.trace_ratio, outcome.error)
    ]
    return Record(
        row=row.name,
        problem=problem.label,
        package=adapter.package,
        mode=mode.label if row.question == "matrix" else "",
        fallback=mode.fallback,
        status=outcome.status.value,
        trace_ratio=finite[0],
        error=finite[1],
        message=outcome.message,
    )


def _isolated(row: Row, problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Ask, and turn whatever is raised into an outcome."""
    ask = QUESTIONS[row.question]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return ask(problem, adapter, mode)
        # A package may raise anything at all, and the table must go on.
        except Exception as error:
            return outcome_of_exception(error, adapter.raisers)


def _matrix(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Is the matrix right?"""
    if mode.structure is Structure.KRON:
        problem = problem.for_kronecker()
    exact = exact_matrix(problem, mode.fisher)
    model = problem.model().train(problem.training)
    outcome = judge(exact, mode.structure, adapter.estimate(problem, mode, model))
    if mode.structure is Structure.KRON and not problem.separable:
        # Two factors are an approximation here, and nothing says how good it ought to be.
        return Outcome(Status.APPROXIMATE, outcome.trace_ratio, outcome.error)
    return outcome


def _pickle(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Can the state be saved and read without pickle?"""
    with tempfile.TemporaryDirectory() as folder:
        return adapter.round_trip(problem, Path(folder)).outcome(about_weights=False)


def _weights(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Does loading leave the model's weights alone?"""
    with tempfile.TemporaryDirectory() as folder:
        return adapter.round_trip(problem, Path(folder)).outcome(about_weights=True)


def _reduction(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Is a loss that cannot be used refused in words that name its reduction?"""
    if not adapter.takes_loss:
        raise NotOffered("it is not given a loss object")
    try:
        adapter.estimate(problem, mode, problem.model())
    # The question is what is raised.
    except Exception as error:
        outcome = outcome_of_exception(error, adapter.raisers)
        if outcome.status is Status.REFUSED and "reduction" in outcome.message:
            return Outcome(Status.RIGHT, message=outcome.message)
        return Outcome(Status.FAILS, message=outcome.message)
    return Outcome(Status.WRONG, message="accepts it")


def _as_found(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Is the model, partly in training and with gradients, the same before and after?"""
    model = problem.model().train()
    modules, parameters = list(model.modules()), list(model.parameters())
    modules[-1].eval()
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number))

    def aspects() -> dict[str, Any]:
        return {
            "module classes": [type(module).__name__ for module in model.modules()],
            "modes": [module.training for module in modules],
            "`requires_grad`": [p.requires_grad for p in parameters],
            "`.grad`": [None if p.grad is None else p.grad.clone() for p in parameters],
            "weights": [p.detach().clone() for p in parameters],
            "attributes": [sorted(vars(module)) for module in modules],
            "hooks": [len(module._forward_hooks) for module in modules],
        }

    before = aspects()
    adapter.estimate(problem, mode, model)
    after = aspects()
    changed = [aspect for aspect in before if not _same(before[aspect], after[aspect])]
    if changed:
        return Outcome(Status.WRONG, message="changes " + ", ".join(changed))
    return Outcome(Status.RIGHT)


def _same(left: Any, right: Any) -> bool:
    """Compare nested lists, dictionaries and tensors."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        both = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
        return both and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


QUESTIONS: dict[str, Callable[[Problem, Adapter, Mode], Outcome]] = {
    "matrix": _matrix,
    "pickle": _pickle,
    "weights": _weights,
    "as found": _as_found,
    "reduction": _reduction,
}
