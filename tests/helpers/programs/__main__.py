"""Judge some programs, and show those of which something is to be said.

`python -m tests.helpers.programs 17 18` shows the program of seed 17.
"""

import argparse
import sys
import time
import warnings
from collections import Counter

from tests.helpers.programs.judge import judge
from tests.helpers.programs.program import draw


def main() -> None:
    """Judge the programs of a range of seeds."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.programs")
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int, help="the seed after the last one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began, outcomes = time.process_time(), Counter[str]()
    seeds = range(arguments.first, arguments.end)
    for seed in seeds:
        program = draw(seed)
        verdict = judge(program)
        outcome = f"{'separate' if verdict.separate else 'mixing'}, {verdict.outcome}"
        outcomes[outcome] += 1
        if len(seeds) == 1:
            sys.stdout.write(f"{program.text}\n{program}\n")
        if verdict.outcome != "right" and outcome != "mixing, refused":
            message = verdict.message.replace("\n", " ")[:200]
            sys.stdout.write(f"{seed}: {outcome}: {message} {sorted(program.kinds)}\n")
            sys.stdout.flush()
    seconds = time.process_time() - began
    sys.stdout.write(f"{dict(outcomes)}, {seconds:.0f} s of CPU\n")


if __name__ == "__main__":
    main()
