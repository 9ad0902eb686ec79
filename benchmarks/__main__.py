"""All benchmarks: ``python -m benchmarks COMMAND``; without a command it lists them."""

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

PROGRAM = "python -m benchmarks"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
SO_WIDE_THAT_NOTHING_IS_BROKEN = 100_000  # columns

# What tyro and Python say of a wrong value, and what we say instead.
PLAINER = {
    r"^Error parsing ([A-Z]\w*[a-z]\w*: )?": "",
    r"no type matching .*>: ": "",
    r"invalid literal for int\(\) with base 10: ": "expected a whole number, got ",
    r"could not convert string to float: ": "expected a number, got ",
}


class Command(NamedTuple):
    """Where a command is: a module with a class of options and a function ``run`` of them.

    Attributes:
        module: Its dotted name. Imports of PyTorch and Avalanche are inside its functions.
        options: Name of the class, a frozen dataclass.
        summary: One line about it.
    """

    module: str
    options: str
    summary: str


COMMANDS = {
    "permuted-mnist": Command(
        "benchmarks.permuted_mnist", "Options", "a few methods on permuted MNIST, with given λ"
    ),
    "run": Command("benchmarks.suite.run", "Options", "search λ of every method, and test them"),
    "compare": Command("benchmarks.suite.show", "Compare", "print tables of what runs reached"),
    "plot": Command("benchmarks.suite.show", "Plot", "draw what runs reached"),
    "report": Command("benchmarks.suite.show", "Report", "tables and figures on one page"),
    "speed": Command("benchmarks.speed.command", "Options", "time and memory of snapshots"),
    "speed-penalty": Command(
        "benchmarks.speed.penalty_command", "Options", "what a penalty adds to a training step"
    ),
    "peers": Command(
        "benchmarks.peers.command", "Options", "exactness, compared with other libraries"
    ),
    "study-calibrate": Command(
        "benchmarks.studies.calibrate", "Options", "λ from the first two tasks alone"
    ),
    "study-causes": Command(
        "benchmarks.studies.causes", "Options", "why long streams of tasks lose accuracy"
    ),
    "study-constant-cost": Command(
        "benchmarks.studies.constant_cost", "Options", "what a penalty costs after many tasks"
    ),
    "study-storage": Command(
        "benchmarks.studies.storage", "Options", "snapshots in files: bytes, time and accuracy"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return 0; 1 after a failure, 2 after wrong words, 130 if interrupted."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _complain("", f"expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", 2)
    return _run(name, words)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listed = (f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [OPTIONS]\n",
            *listed,
            f"\n{PROGRAM} COMMAND --help tells more.",
        )
    )


def _run(name: str, words: Sequence[str]) -> int:
    """Read the options of a command and run it."""
    try:
        from benchmarks.command import CommandError

        module = importlib.import_module(COMMANDS[name].module)
        options = _parse(name, getattr(module, COMMANDS[name].options), words)
        try:
            code: int = module.run(options)
        except CommandError as error:
            return _complain(name, str(error), EXIT_FAILED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "rotate_ewc"):
            raise
        problem = f"{error.name} is missing; it comes with: pip install '.[bench]'"
        return _complain(name, problem, EXIT_FAILED)
    except KeyboardInterrupt:
        print("\nInterrupted; the records of finished runs are kept.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _complain(name: str, problem: str, code: int) -> int:
    """Say in one line what is wrong, and return the exit code for it."""
    print(f"{PROGRAM} {name}".rstrip() + f": error: {problem}", file=sys.stderr)
    return code


def _parse(name: str, options: type[Any], words: Sequence[str]) -> Any:
    """Turn words into options, or leave with a message in one line."""
    import tyro

    def read() -> Any:
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
        return tyro.cli(options, prog=f"{PROGRAM} {name}", args=words, config=config)

    if {"-h", "--help"} & {*words}:
        return read()
    messages = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(SO_WIDE_THAT_NOTHING_IS_BROKEN)
    try:
        with contextlib.redirect_stderr(messages):
            return read()
    except SystemExit:
        sys.exit(_complain(name, _one_line(messages.getvalue()), EXIT_USAGE))
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _one_line(box: str) -> str:
    """The message in one of tyro's boxes, without what ``--help`` says as well.

    Below its title a box says what is wrong. After a rule comes a suggestion, if there is any.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╰╯]", "", box)  # on a terminal it has colours
    below_title = " ".join(line.strip() for line in plain.splitlines()[1:])
    parts: list[str] = [part.strip() for part in re.split("[─-]{9,}", below_title)]
    message, *others = filter(None, parts)
    for words, plainer in PLAINER.items():
        message = re.sub(words, plainer, message)
    suggested = [found[1] for other in others if (found := re.match(r"Perhaps .*?(--\S+)", other))]
    return message + (f" (did you mean {suggested[0]}?)" if suggested else "")


if __name__ == "__main__":
    sys.exit(main())
