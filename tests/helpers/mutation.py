"""Mutation testing: mutmut, made to change decorated functions too. See docs/mutation.md.

A script of its own and not a module of the tests, since what is tested is a copy of them:

    python tests/helpers/mutation.py run        # what `mutmut run` does; likewise `results`, `show`
    python tests/helpers/mutation.py table      # what came out, file by file
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import libcst as cst
from mutmut.__main__ import cli
from mutmut.mutation import file_mutation, trampoline
from mutmut.runners.harness import PytestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code

# mutmut leaves functions with decorators out: a mutant is a copy of its function, decorators and
# all, which may register it twice, or make a property that cannot be called. These decorators do no
# harm as long as they are put around the choice between the copies, and not around the copies.
DECORATORS = {
    "contextmanager",
    "forwards_keywords(EstimationSettings)",
    "full_precision",
    "property",
    "torch.no_grad()",
    "wraps(function)",
}

# What torch imports only when it is needed would otherwise be imported again for every mutant.
NEEDING_LATE_IMPORTS = (
    "tests/penalty/test_penalty_arguments.py::test_one_task_by_the_formula",
    "tests/penalty/test_protection.py::test_spread_parameters_are_gathered_where_they_are_protected",
    "tests/penalty/test_protection.py::test_what_need_not_be_there_is_not_named_beside_an_error",
    "tests/linalg/test_quadratic.py::test_torch_func",
    "tests/linalg/test_quadratic.py::test_two_products_for_the_value_and_two_for_the_gradient",
)


def is_wrapped(function: cst.FunctionDef) -> bool:
    """Whether a function has decorators, and only such as can be put around it."""
    code = cst.Module([]).code_for_node
    names = {code(decorator.decorator) for decorator in function.decorators}
    return bool(names) and names <= DECORATORS


def change_decorated_functions() -> None:
    """Make mutmut change wrapped functions as it does others, without wrapping the copies."""
    skip = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement

    def skip_others(visitor: Any, node: cst.CSTNode) -> bool:
        wrapped = isinstance(node, cst.FunctionDef) and is_wrapped(node)
        return not wrapped and skip(visitor, node)

    def arrange_bare(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
        declared, functions, assigned, names = arrange(function, mutants, class_name)
        if is_wrapped(function):
            chooser, *copies = functions
            functions = [chooser, *(copy.with_changes(decorators=[]) for copy in copies)]
        return declared, functions, assigned, names

    file_mutation.MutationVisitor._skip_node_and_children = skip_others
    file_mutation.function_trampoline_arrangement = arrange_bare


def begin_with_quick_tests() -> None:
    """Run the tests of a mutant in the order of their durations: most mutants fail the first."""
    arguments = PytestRunner._pytest_args_regular_run

    def in_order(runner: PytestRunner, tests: Iterable[str]) -> Any:
        durations = state().duration_by_test
        return arguments(runner, sorted(tests, key=lambda test: (durations.get(test, 0.0), test)))

    PytestRunner._pytest_args_regular_run = in_order


def import_beforehand() -> None:
    """Let the process that is forked for every mutant run a few tests itself."""
    warm_up = PytestRunner.warm_up

    def warm_up_with_tests(runner: PytestRunner) -> None:
        warm_up(runner)
        runner.run_tests(mutant_name=None, tests=NEEDING_LATE_IMPORTS)

    PytestRunner.warm_up = warm_up_with_tests


def hide_the_choice() -> None:
    """Make what chooses between the copies look like a part of the package.

    Warnings point at the first line outside of the package, which would be one of mutmut.
    """
    file = str(Path("mutants/rotate_ewc/mutants.py").absolute())

    def moved(code: CodeType) -> CodeType:
        constants = (moved(c) if isinstance(c, CodeType) else c for c in code.co_consts)
        return code.replace(co_filename=file, co_consts=tuple(constants))

    choose = trampoline.wrap_in_trampoline
    choose.__code__ = moved(choose.__code__)


def table(results: Path = Path("mutants")) -> str:
    """Write the outcomes of the last run as a table."""
    columns = ("killed", "survived", "timeout", "no tests")
    lines = [f"| file | mutants | {' | '.join(columns)} | killed, % |", "|---" * 7 + "|"]
    sums: Counter[str] = Counter()
    for path in sorted(results.glob("rotate_ewc/**/*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"].values()
        counts = Counter(status_by_exit_code[code] for code in codes)
        if counts:
            sums += counts
            lines.append(_row(path.stem, counts, columns))
    return "\n".join([*lines, _row("all", sums, columns)])


def _row(name: str, counts: Counter[str], columns: Sequence[str]) -> str:
    # A mutant that never ends is noticed as well.
    share = (counts["killed"] + counts["timeout"]) / counts.total()
    cells = [f"`{name}`", counts.total(), *(counts[c] for c in columns), f"{100 * share:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())  # noqa: T201
    else:
        change_decorated_functions()
        begin_with_quick_tests()
        import_beforehand()
        hide_the_choice()
        cli()
