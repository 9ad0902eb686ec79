"""Asking one package about one row, so that nothing it does reaches the next."""

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.adapters.adapter import Adapter, Mode
from benchmarks.peers.exact import exact_matrix
from benchmarks.peers.problem import Problem
from benchmarks.peers.problems import PROBLEMS
from benchmarks.peers.row import Row
from benchmarks.peers.verdict import NotOffered, Outcome, Status, Structure, judge, name_exception


@dataclass(frozen=True, kw_only=True)
class Record(Outcome):
    """One measurement, as it is kept in the JSON file."""

    row: str  # name of the row
    problem: str  # label of the problem, empty where the row has one only
    package: str  # name of the distribution
    mode: str  # how the package was asked
    fallback: bool  # whether the mode counts only where the package's other modes are not right


def measure(row: Row, adapter: Adapter, problems: Sequence[Problem] | None = None) -> list[Record]:
    """Measure problems, those of the row unless others are given, in every mode of a package."""
    problems = PROBLEMS[row.name] if problems is None else problems
    if not adapter.installed():
        missing = Outcome(Status.NOT_INSTALLED)
        return [_record(row, problems[0], adapter, adapter.modes[0], missing)]
    modes = adapter.modes if row.question == "matrix" else adapter.modes[:1]
    return [
        _record(row, problem, adapter, mode, _isolated(row, problem, adapter, mode))
        for problem in problems
        for mode in modes
    ]


def _record(row: Row, problem: Problem, adapter: Adapter, mode: Mode, outcome: Outcome) -> Record:
    """Put a measurement into a record."""
    return Record(
        outcome.status,
        _finite(outcome.trace_ratio),
        _finite(outcome.error),
        outcome.message,
        row=row.name,
        problem=problem.label,
        package=adapter.package,
        mode=mode.label if row.question == "matrix" else "",
        fallback=mode.fallback,
    )


def _finite(value: float | None) -> float | None:
    """Six digits; JSON has no infinities."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _isolated(row: Row, problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Ask, and turn whatever is raised into an outcome."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return QUESTIONS[row.question](problem, adapter, mode)
        # A package may raise anything at all, and the table must go on.
        except Exception as error:
            return name_exception(error, adapter.raisers)


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
    without_pickle, same, _ = _round_trip(problem, adapter)
    return _yes_or(
        same and without_pickle, "needs pickle" if same else "does not come back the same"
    )


def _weights(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Does loading leave the model's weights alone?"""
    *_, weights_kept = _round_trip(problem, adapter)
    return _yes_or(weights_kept, "overwrites the weights")


def _yes_or(good: bool, complaint: str) -> Outcome:
    return Outcome(Status.RIGHT) if good else Outcome(Status.WRONG, message=complaint)


def _round_trip(problem: Problem, adapter: Adapter) -> tuple[bool, bool, bool]:
    """Save a state, and load it into a program whose model has moved on.

    Returns whether it can be read without running pickled code, whether the loaded estimate is the
    saved one, and whether the model's weights are as they were before loading.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = adapter.save(problem, folder)
        model = problem.model()
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        before = [parameter.detach().clone() for parameter in parameters]
        loaded = adapter.load(problem, folder, model)
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        without_pickle = all(map(_readable_without_pickle, files))
    # Rounding depends on how matrices are stored.
    same = len(saved) == len(loaded) and all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12 * float(a.abs().max()))
        for a, b in zip(saved, loaded, strict=True)
    )
    return without_pickle, same, all(map(torch.equal, before, parameters))


def _readable_without_pickle(path: Path) -> bool:
    """Whether a file is of safetensors, or read by ``torch.load`` without running code in it."""
    if path.suffix == ".safetensors":
        return True
    try:
        torch.load(path, weights_only=True)
    # Whatever is raised, the file could not be read.
    except Exception:
        return False
    return True


def _reduction(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Is a loss that cannot be used refused in words that name its reduction?"""
    if not adapter.takes_loss:
        raise NotOffered("it is not given a loss object")
    try:
        adapter.estimate(problem, mode, problem.model())
    # The question is what is raised.
    except Exception as error:
        outcome = name_exception(error, adapter.raisers)
        named = outcome.status is Status.REFUSED and "reduction" in outcome.message
        return Outcome(Status.RIGHT if named else Status.FAILS, message=outcome.message)
    return Outcome(Status.WRONG, message="accepts it")


def _as_found(problem: Problem, adapter: Adapter, mode: Mode) -> Outcome:
    """Is the model, partly in training and with gradients, the same before and after?"""
    model = problem.model().train()
    modules, parameters = list(model.modules()), list(model.parameters())
    modules[-1].eval()
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number))
    before = _aspects(model, modules, parameters)
    adapter.estimate(problem, mode, model)
    after = _aspects(model, modules, parameters)
    changed = [aspect for aspect in before if before[aspect] != after[aspect]]
    return _yes_or(not changed, "changes " + ", ".join(changed))


def _aspects(
    model: nn.Module, modules: list[nn.Module], parameters: list[nn.Parameter]
) -> dict[str, Any]:
    """What can be seen of a model, as values that can be compared."""
    return {
        "module classes": [type(module).__name__ for module in model.modules()],
        "modes": [module.training for module in modules],
        "`requires_grad`": [p.requires_grad for p in parameters],
        "`.grad`": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "weights": [p.tolist() for p in parameters],
        "attributes": [sorted(vars(module)) for module in modules],
        "hooks": [len(module._forward_hooks) for module in modules],
    }


QUESTIONS: dict[str, Callable[[Problem, Adapter, Mode], Outcome]] = {
    "matrix": _matrix,
    "pickle": _pickle,
    "weights": _weights,
    "as found": _as_found,
    "reduction": _reduction,
}
