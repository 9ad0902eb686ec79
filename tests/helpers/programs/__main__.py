"""Judge a range of programs: `python -m tests.helpers.programs 0 1000`."""

import collections
import sys
import time

from tests.helpers.programs.judge import judge
from tests.helpers.programs.program import draw

first, last = map(int, sys.argv[1:3])
quiet = len(sys.argv) > 3
began, counts = time.perf_counter(), collections.Counter()
for seed in range(first, last):
    try:
        program = draw(seed)
    except Exception as e:
        print("DRAW", seed, type(e).__name__, str(e)[:200]); counts["draw"] += 1
        continue
    try:
        verdict = judge(program)
    except Exception as e:
        print("JUDGE", seed, type(e).__name__, str(e)[:200]); counts["judge"] += 1
        continue
    sep = "separate" if verdict.separate else "mixing"
    counts[sep, verdict.outcome] += 1
    bad = verdict.outcome in ("wrong", "crashed") or (verdict.outcome == "refused" and verdict.separate)
    if bad:
        print(seed, sep, verdict.outcome, verdict.message[:160].replace("\n", " "), sorted(program.kinds), program.options["unsupported"])
print(counts, f"{time.perf_counter() - began:.1f} s")
