"""What happens where optional packages are not installed."""

from __future__ import annotations

import subprocess
import sys

EXTRAS = ("avalanche", "transformers", "peft", "lightning")
HIDING = """
import importlib, sys

class Hidden:
    tried = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            self.tried.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import rotate_ewc
print(Hidden.tried)
for extra in {extras!r}:
    try:
        importlib.import_module("rotate_ewc.integrations." + extra)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_nothing_is_imported_and_the_extra_is_named() -> None:
    """In one process, since each imports torch."""
    program = HIDING.format(names={*EXTRAS, "accelerate", "rich"}, extras=EXTRAS)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    tried, *told = found.stdout.strip().splitlines()
    assert tried == "[]", "importing rotate_ewc imports what is optional"
    assert len(told) == len(EXTRAS), found.stderr
    for extra, message in zip(EXTRAS, told, strict=True):
        assert message.startswith(f"rotate_ewc.integrations.{extra} needs ")
        assert f"pip install 'rotate-ewc[{extra}]'" in message
