"""Factors for which a process has no memory: named with their size, and what is advised works."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

SIZE = 3000

# In a process of its own, whose memory ends a few matrices above what it takes by then.
SCRIPT = f"""
import re, resource, torch
from torch import nn
from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty

def consolidate(model, exclude=(), rank="full"):
    x = torch.eye(8, 16, dtype=model[0].weight.dtype)
    penalty = exact_penalty(exclude=exclude, rank=rank)
    penalty.consolidate(model, nn.CrossEntropyLoss(), [(x, torch.arange(8) % 2)])
    return penalty

def of_size(size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, size, bias=False), nn.Linear(size, 2))

consolidate(of_size(200))
consolidate(of_size(200).double())
consolidate(of_size(200).double(), rank="auto")
model = of_size({SIZE}).double()
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
limit = taken + int(6.5 * 4 * {SIZE}**2)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    consolidate(model)
except MemoryError as error:
    message = str(error)
print(message)
penalty = consolidate(model, exclude=eval(re.search(r"exclude=(\\[.*?\\])", message)[1]))
print(list(penalty.terms[0].anchor))
rank = re.search(r"rank='(.*?)'", message)[1]
print(list(consolidate(of_size({SIZE}).double(), rank=rank).terms[0].anchor))
penalty = consolidate(eval(re.search(r"float32 \\((model.*?\\))\\)", message)[1]))
print(list(penalty.terms[0].anchor))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_factors_that_are_too_large() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    message, excluded, thin, in_float32 = run.stdout.strip().splitlines()
    assert re.match(
        rf"out of memory in the decomposition of the (gradient factor of '0\.weight'|activation "
        rf"factor of '1\.weight'), a matrix \[{SIZE}, {SIZE}\] of {8 * SIZE**2:,} bytes \(",
        message,
    )
    assert "exclude=['0.weight', '1.weight']" in message
    assert excluded == "['1.bias']"
    assert thin == in_float32 == "['0.weight', '1.weight', '1.bias']"
