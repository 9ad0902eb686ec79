"""Check what is in a wheel and a source distribution: all that is in the repository, and no more.

The expectation comes from git, so that a package or a document which the metadata forget is missed,
and a file which only lies about is noticed.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "rotate_ewc"
GENERATED = {"PKG-INFO", "setup.cfg"}  # and the egg-info, by setuptools


def repository() -> set[str]:
    """Every file that git tracks, or would on `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.splitlines() if Path(name).exists()}


def in_wheel(path: Path) -> set[str]:
    """The files of a wheel, without those that describe it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}


def in_source(path: Path) -> set[str]:
    """The files of a source distribution, without those that setuptools makes."""
    with tarfile.open(path) as archive:
        members = [PurePosixPath(entry.name) for entry in archive if entry.isfile()]
    names = {str(PurePosixPath(*member.parts[1:])) for member in members}
    return {n for n in names - GENERATED if not n.startswith(f"{PACKAGE}.egg-info/")}


def differences(path: Path, found: set[str], expected: set[str]) -> list[str]:
    """One line for each file that is missing or should not be there."""
    missing = [f"{path.name} lacks {name}" for name in sorted(expected - found)]
    return missing + [f"{path.name} should not hold {name}" for name in sorted(found - expected)]


def main(folder: Path) -> int:
    """Compare the one wheel and the one source distribution in a folder with the repository."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    files = repository()
    wrong = differences(wheel, in_wheel(wheel), {n for n in files if n.startswith(f"{PACKAGE}/")})
    wrong += differences(source, in_source(source), files - {".gitignore"})
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
