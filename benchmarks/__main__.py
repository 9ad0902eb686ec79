"""All benchmarks: ``python -m benchmarks COMMAND``; without a command it lists them."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

PROGRAM = "python -m benchmarks"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Command(NamedTuple):
    """Where a command is, and one line about it.

    The module, below ``benchmarks``, has a frozen dataclass ``Options`` and a function ``run`` of
    them; it imports PyTorch and Avalanche inside functions alone.
    """

    module: str
    summary: str

    def load(self) -> tuple[Any, Any]:
        """Import the module; return the class of options and ``run``."""
        module = importlib.import_module(f"benchmarks.{self.module}")
        return module.Options, module.run


COMMANDS = {
    "permuted-mnist": Command("permuted_mnist", "a few methods on permuted MNIST, with given λ"),
    "run": Command("suite.run", "search λ of every method, and test them"),
    "report": Command("report.page", "tables and figures of what runs reached"),
    "speed": Command("speed.command", "time and memory of snapshots"),
    "speed-penalty": Command("speed.penalty_command", "what a penalty adds to a training step"),
    "peers": Command("peers.command", "exactness, compared with other libraries"),
    "text": Command("fine_tuning.text", "a pretrained network on one set of texts after another"),
    "text-language": Command(
        "fine_tuning.language", "a small language model on prose and then code"
    ),
    "text-pretraining": Command(
        "fine_tuning.pretraining", "what fine-tuning takes from pretraining"
    ),
    "images": Command("fine_tuning.images", "a pretrained network on some classes after others"),
    "study-storage": Command("studies.storage", "snapshots in files: bytes, time and accuracy"),
    "study-rank": Command("studies.rank", "thin bases of wide layers: bytes, time and memory"),
    "study-scale": Command("studies.scale", "what decoders of billions of parameters would take"),
    "study-drift": Command("studies.drift", "how far old answers move unseen by a penalty"),
    "study-processes": Command("studies.processes", "estimating in several processes"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return 0, 1 after a failure, 2 after wrong words, 130 if interrupted."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [OPTIONS]\n")
        for known, command in COMMANDS.items():
            print(f"  {known:{max(map(len, COMMANDS))}}  {command.summary}")
        print(f"\n{PROGRAM} COMMAND --help tells more.")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _complain(
            "", f"expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", EXIT_USAGE
        )
    try:
        return _run(name, words)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "rotate_ewc"):
            raise
        problem = f"{error.name} is missing; it comes with: pip install '.[bench]'"
        return _complain(name, problem, EXIT_FAILED)
    except KeyboardInterrupt:
        print("\nInterrupted; the records of finished runs are kept.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(name: str, words: Sequence[str]) -> int:
    """Read the options of a command and run it."""
    import tyro

    from benchmarks.command import CommandError

    options, run = COMMANDS[name].load()
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
    try:
        code: int = run(tyro.cli(options, prog=f"{PROGRAM} {name}", args=words, config=config))
    except CommandError as error:
        return _complain(name, str(error), EXIT_FAILED)
    return code


def _complain(name: str, problem: str, code: int) -> int:
    """Say in one line what is wrong, and return the exit code for it."""
    print(f"{PROGRAM} {name}".rstrip() + f": error: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
