"""What happens where an optional framework is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run(code: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    program = HIDE.format(names=set(hidden)) + code
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("avalanche", "avalanche"),
        ("transformers", "transformers"),
        ("peft", "peft"),
        ("lightning", "lightning"),
    ],
)
def test_the_extra_is_named(extra: str, package: str) -> None:
    found = run(f"import rotate_ewc.integrations.{extra}", package)
    assert found.returncode != 0
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: rotate_ewc.integrations.{extra} needs ")
    assert f"pip install 'rotate-ewc[{extra}]'" in last


def test_the_package_imports_none_of_them() -> None:
    frameworks = {"avalanche", "transformers", "peft", "lightning", "accelerate"}
    code = f"import rotate_ewc; print(sorted({frameworks!r} & set(sys.modules)))"
    found = run(code)
    assert found.stdout.strip() == "[]", found.stderr
    assert run("import rotate_ewc", *frameworks).returncode == 0
