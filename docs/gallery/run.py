"""Run the examples and keep what they print and draw: `python docs/gallery/run.py [NAME ...]`.

The site shows it below each program. `tests/project/test_examples.py` compares it with what the
examples print now.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# Examples that are launched by another program.
LAUNCHERS = {
    "accelerate_loop": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "distributed": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
# What frameworks print, and not the example.
CHATTER = re.compile(r"^(-- >> |-> |Computed |Start of |End of |\{|\s*$)")


def start(name: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start an example in a folder, without a network."""
    script = ROOT / "examples" / f"{name}.py"
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *LAUNCHERS.get(name, []), str(script), *arguments],
        cwd=folder,
        env={**os.environ, **variables, "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(name: str, folder: Path, *arguments: str) -> list[str]:
    """Run an example to its end, and return the lines that are its own."""
    process = start(name, folder, *arguments)
    output, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"examples/{name}.py failed:\n{errors}")
    return [line.rstrip() for line in output.splitlines() if not CHATTER.match(line)]


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in (ROOT / "examples").glob("*.py")):
        with tempfile.TemporaryDirectory() as folder:
            lines = run(name, Path(folder))
            (FOLDER / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
            if (drawn := Path(folder, f"{name}.png")).exists():
                shutil.copy(drawn, FOLDER)
