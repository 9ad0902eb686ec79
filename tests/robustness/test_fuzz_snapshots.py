"""Thousands of mutated snapshots: each is loaded right, or refused and nothing else happens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from rotate_ewc import EKFACLinearOperator, SnapshotError
from rotate_ewc.io import files
from rotate_ewc.io.header import header_text
from tests.helpers.exact import exact_penalty
from tests.helpers.honest_snapshots import (
    Honest,
    check_consistent,
    digest_of,
    honest_snapshots,
    read,
)
from tests.helpers.mutated_bytes import header_end, mutated_bytes
from tests.helpers.mutated_states import MUTATIONS

ROOT = Path(__file__).parents[2]

# --------------------------------------------------------------------------- thousands of them


def fuzz(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Load mutated snapshots in a process of their own."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.helpers.snapshot_fuzzer"]
    done = subprocess.run(
        [*command, str(folder), str(first), str(count)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def check_fuzzed(found: dict[str, Any], count: int) -> None:
    assert found["failures"] == []
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == count
    # Else the mutations would all be coarse, or none would matter.
    assert outcomes["refused"] > count / 2
    assert outcomes["same"] > count / 100
    assert outcomes["consistent"] > count / 100
    # Honest files have some kilobytes; the constant is for the allocator, and for long headers.
    assert found["grown_kib"] * 1024 < 2 * found["honest_bytes"] + 64 * 2**20


def test_some_mutated_snapshots(tmp_path: Path) -> None:
    check_fuzzed(fuzz(tmp_path, 0, 250), 250)


@pytest.mark.slow
def test_thousands_of_mutated_snapshots(tmp_path: Path) -> None:
    check_fuzzed(fuzz(tmp_path, 10_000, 3_000), 3_000)


def message_of(load: Callable[[], Any]) -> str | None:
    """Return with what message something is refused; None if it is not."""
    try:
        load()
    except SnapshotError as error:
        return str(error)
    return None


class Composed(RuleBasedStateMachine):
    """Mutations one after the other, with a look after each; failures shrink to the fewest."""

    honest: Honest
    header: dict[str, Any]
    tensors: dict[str, Any]

    @initialize(name=st.sampled_from(["operator", "merged penalty", "separate penalty bfloat16"]))
    def begin(self, name: str) -> None:
        self.honest = honest_snapshots(os.environ["FUZZ_FOLDER"])[name]
        self.tensors = dict(self.honest.state)
        self.header = json.loads(header_text(self.tensors))
        del self.tensors["header"]

    @rule(mutation=st.sampled_from(MUTATIONS), seed=st.integers(0, 2**16))
    def change(self, mutation: Callable[..., None], seed: int) -> None:
        mutation(random.Random(seed), self.header, self.tensors)
        path = Path(os.environ["FUZZ_FOLDER"]) / "composed"
        try:
            files.save({"header": json.dumps(self.header), **self.tensors}, path)
        except UnicodeEncodeError:
            return
        self.look(path)

    @rule(seed=st.integers(0, 2**16))
    def damage(self, seed: int) -> None:
        path = Path(os.environ["FUZZ_FOLDER"]) / "composed"
        path.write_bytes(mutated_bytes(random.Random(seed), self.honest.content))
        self.look(path)

    def look(self, path: Path) -> None:
        loaded: list[Any] = []
        told = message_of(lambda: loaded.append(read(self.honest.kind, path)))
        if told is None:
            check_consistent(loaded[0])
        else:
            assert told.startswith(repr(str(path)))


def test_composed_mutations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))
    machine = Composed.TestCase
    machine.settings = settings(
        max_examples=25,
        stateful_step_count=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    machine("runTest").runTest()


# --------------------------------------------------------------------------- every place


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Honest]:
    return honest_snapshots(str(tmp_path_factory.mktemp("honest")))


NAMES = ["operator", "operator bfloat16", "merged penalty", "separate penalty"]


@pytest.mark.parametrize("name", NAMES)
def test_truncated_anywhere(honest: dict[str, Honest], name: str, tmp_path: Path) -> None:
    """At every byte of what says where things are, and at some of the tensors'."""
    content = honest[name].content
    end = header_end(content)
    path = tmp_path / "file"
    for size in [
        *range(20),
        *range(20, end, 37),
        *range(end - 5, end + 5),
        *range(end, len(content), 97),
    ]:
        path.write_bytes(content[:size])
        with pytest.raises(SnapshotError, match="this is not a snapshot file"):
            read(honest[name].kind, path)


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_under_the_digest(
    honest: dict[str, Honest], name: str, tmp_path: Path
) -> None:
    """One flipped bit in any byte, up to what only says the same in other words."""
    rng, content, path = random.Random(1), honest[name].content, tmp_path / "file"
    same = 0
    for place in sorted(rng.sample(range(len(content)), 400)):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            assert digest_of(read(honest[name].kind, path)) == honest[name].digest
            same += 1
        except SnapshotError:
            pass
    # A space of the padding may become another white one.
    assert same <= 2


def header_places(state: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of everything in a header."""
    found: list[tuple[str, ...]] = []

    def walk(node: Any, path: tuple[str, ...]) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((*path, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key], (*path, key))

    walk(json.loads(header_text(state)), ())
    return found


@pytest.mark.parametrize("name", ["operator", "separate penalty"])
@pytest.mark.parametrize(
    "wrong",
    ["missing", None, -1, 10**400, 1e400, "x", [], {"x": 1}, [[[2**40]]]],
    ids=["missing", "null", "-1", "long", "infinite", "text", "empty", "dictionary", "nested"],
)
def test_every_field_of_the_header(honest: dict[str, Honest], name: str, wrong: Any) -> None:
    """No field may be missing or of another kind, save those that say nothing about numbers."""
    state, kind = honest[name].state, honest[name].kind
    for path in header_places(state):
        header = json.loads(header_text(state))
        node = header
        for key in path[:-1]:
            node = node[key]
        if wrong == "missing":
            del node[path[-1]]
        else:
            node[path[-1]] = wrong
        bad, loaded = {**state, "header": json.dumps(header)}, []

        def load(bad: Any = bad, loaded: list[Any] = loaded) -> None:
            if kind is EKFACLinearOperator:
                loaded.append(EKFACLinearOperator.from_state_dict(bad))
            else:
                loaded.append(exact_penalty(mode="separate"))
                loaded[0].load_state_dict(bad)

        told = message_of(load)
        if told is None:
            free = path[0] in ("library", "options") or "settings" in path
            named = wrong == "x" and path[-1] in ("loss", "fisher_type")
            scalar = wrong == [] and path in (("parameters", "scale"), ("blocks", 4, "bases"))
            assert free or named or scalar, f"{path} may be {wrong!r:.50}"
            check_consistent(loaded[0])
        else:
            assert len(told) < 600
            assert told.isprintable()
