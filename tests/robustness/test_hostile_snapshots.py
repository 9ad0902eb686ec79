"""Snapshots that would run code, or take memory or time without end."""

from __future__ import annotations

import json
import pickle
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SnapshotError
from rotate_ewc.io import files
from rotate_ewc.io.header import header_text
from rotate_ewc.io.layout import OPERATOR
from rotate_ewc.provenance import Provenance
from tests.helpers.honest_snapshots import (
    contents_of,
    digest_of,
    operator,
    penalty,
    random_block,
)
from tests.helpers.memory import peak_bytes
from tests.helpers.mutated_bytes import Executed, header_end, with_header

PROVENANCE = Provenance("MSELoss", "mean", "type2", 10, 20.0)
VALUES, ANCHOR = "0.weight/eigenvalues", "0/anchor/0.weight"

# --------------------------------------------------------------------------- other files


@pytest.mark.parametrize("kind", [EKFACLinearOperator, EKFACPenalty])
def test_what_is_no_file(kind: Any, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "none", tmp_path / "nul\0"):
        with pytest.raises(FileNotFoundError, match="there is no snapshot file"):
            kind.load(path)


def test_nothing_is_run(tmp_path: Path) -> None:
    """A pickle in the place of a file, of the header, of a tensor, and behind the end."""
    mark = tmp_path / "mark"
    payload = pickle.dumps(Executed(str(mark)))
    pickle.loads(payload)
    mark.rmdir()
    operator().save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    torch.save({"header": Executed(str(mark))}, tmp_path / "torch")
    for bad in (
        payload,
        content + payload,
        with_header(content, payload),
        content[: -len(payload)] + payload,
        (tmp_path / "torch").read_bytes(),
    ):
        (tmp_path / "file").write_bytes(bad)
        for kind in (EKFACLinearOperator, EKFACPenalty):
            with pytest.raises(SnapshotError):
                kind.load(tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "torch", weights_only=True)
    assert not mark.exists()


def test_states_of_strange_things() -> None:
    """What unpickling with `weights_only` lets through beside plain tensors."""
    state = operator().state_dict()
    learned = contents_of(penalty("separate"))
    tensor = state[VALUES]
    with warnings.catch_warnings():
        # Prototypes, and what is to go.
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([tensor[0], tensor[0]])
        quantized = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    strange = {
        "sparse": tensor.to_sparse(),
        "on no device": tensor.to("meta"),
        "nested": nested,
        "quantized": quantized,
        "number": 1.0,
        "bytes": b"x",
        "none": None,
        "list": [tensor],
    }
    for name, value in strange.items():
        for keys, whole in ((VALUES, state), (ANCHOR, learned)):
            bad = {**whole, keys: value}
            receiver: Any = operator(50) if whole is state else penalty("separate")
            before = digest_of(receiver)
            with pytest.raises(SnapshotError, match=f"'{keys}'"):
                receiver.load_state_dict(bad)
            assert digest_of(receiver) == before, name
    for key in (1, None, b"x", ("a",), 1.5):
        for receiver, whole in ((operator(50), state), (penalty("separate"), learned)):
            with pytest.raises(SnapshotError, match="key"):
                receiver.load_state_dict({**whole, key: tensor})


@pytest.mark.parametrize("size", [3, 2**20])
def test_expanded_tensors(size: int) -> None:
    """One number in memory can claim to be terabytes; looking at it would allocate some."""
    layout = {
        "parameters": ["w"],
        "transposed": False,
        "shape": [1, size, size],
        "dtype": "float32",
        "bases": [],
        "ranks": [size, size],
    }
    header = {
        "format": OPERATOR,
        "library": "",
        "parameters": {"w": [size, size]},
        "blocks": [layout],
        "provenance": msgspec.to_builtins(PROVENANCE),
    }
    expanded = torch.zeros(1).expand(1, size, size)

    def refuse() -> None:
        with pytest.raises(SnapshotError, match="'w/eigenvalues' has fewer numbers than its shape"):
            EKFACLinearOperator.from_state_dict(
                {"header": json.dumps(header), "w/eigenvalues": expanded}
            )

    assert peak_bytes(refuse) < 2**20


def test_parameters_and_subclasses_are_tensors() -> None:
    """As in the state of a module; what is loaded is detached."""
    state = operator().state_dict()
    whole = {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()}
    loaded = EKFACLinearOperator.from_state_dict(whole)
    assert digest_of(loaded) == digest_of(operator())
    assert not any(t.requires_grad for b in loaded.blocks for t in b.tensors.values())


# --------------------------------------------------------------------------- memory and time


def large(seed: int) -> EKFACLinearOperator:
    """Some 4 MB."""
    block = random_block(("w",), (1, 512, 512), seed=seed)
    return EKFACLinearOperator.from_blocks([block], {"w": (512, 512)}, PROVENANCE)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_for_damaged_files(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Never more than for the honest file, whatever a file declares."""
    path = tmp_path / "file"
    large(0).save(path, storage_dtype=dtype)
    content = path.read_bytes()
    honest_peak = peak_bytes(lambda: EKFACLinearOperator.load(path))
    header = json.loads(content[8 : header_end(content)])
    values = header["w/eigenvalues"]
    bads = [content[:-1], content[: len(content) // 2], content + bytes(100)]
    for shape in ([1, 2**20, 2**20], [2**31, 2**31], [2**62], [2**40, 0, 0], [1, 512, 2**30]):
        changed = {**header, "w/eigenvalues": {**values, "shape": shape}}
        bads.append(with_header(content, json.dumps(changed).encode()))
    bads.append((2**62).to_bytes(8, "little") + content[8:])
    flipped = bytearray(content)
    flipped[-5] ^= 1
    bads.append(bytes(flipped))

    def refuse() -> None:
        with pytest.raises(SnapshotError):
            EKFACLinearOperator.load(path)

    for bad in bads:
        path.write_bytes(bad)
        assert peak_bytes(refuse) <= honest_peak


@pytest.mark.parametrize("shape", [(2**40, 0, 0), (0, 2**40, 2**40), (2**40, 0, 3), (2**26, 0, 0)])
def test_memory_for_tensors_without_entries(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """They take no room in a file, so that their sizes can be anything."""
    groups, d_out, _ = shape
    header = {
        "format": OPERATOR,
        "library": "",
        "parameters": {"w": list(shape)},
        "blocks": [
            {
                "parameters": ["w"],
                "transposed": False,
                "shape": list(shape),
                "dtype": "float32",
                "bases": ["gradient_basis"],
                "ranks": list(shape[1:]),
            }
        ],
        "provenance": msgspec.to_builtins(PROVENANCE),
    }
    try:
        state = {
            "header": json.dumps(header),
            "w/eigenvalues": torch.zeros(shape),
            "w/gradient_basis": torch.zeros(groups, d_out, d_out),
        }
    except RuntimeError:
        # Strides that do not fit 64 bits; a file can still have these sizes.
        state = {"header": json.dumps(header)}

    def load() -> None:
        with suppress(SnapshotError):
            EKFACLinearOperator.from_state_dict(state)

    assert peak_bytes(load) < 2**20


FIELDS = ["blocks", "format", "settings", "dtype", "terms", "options", "strength", "mode", "weight"]


@pytest.mark.parametrize("field", FIELDS)
def test_nested_headers(field: str) -> None:
    """Of every depth: what can just be parsed can be too deep for the message about it."""
    state = penalty("separate").state_dict()
    receiver = penalty("separate")
    text = json.dumps(json.loads(header_text(state)))
    for depth in (*range(1, 800, 13), *range(800, 1000), 10**5):
        nest = "[" * depth + "]" * depth
        deep = text.replace(f'"{field}": ', f'"{field}": {nest}, "{field} before": ')
        assert deep != text
        with suppress(SnapshotError):
            receiver.load_state_dict({**state, "header": deep})
            # A penalty that has options of its own does not look at those in the snapshot.
            assert (field, depth) == ("strength", 1)


@pytest.mark.parametrize("text", ["", "{", "nan", "\ud800", '{"\\ud800": 1}', "\0"])
def test_headers_that_are_not_json(text: str) -> None:
    """Also half of a character that takes two, which no encoding has."""
    with pytest.raises(SnapshotError, match="'header' is not JSON"):
        EKFACLinearOperator.from_state_dict({**operator().state_dict(), "header": text})


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"', "{}"])
def test_headers_that_are_other_json(text: str) -> None:
    with pytest.raises(SnapshotError, match=r"'header'.*: (Expected `object`|Object missing)"):
        EKFACLinearOperator.from_state_dict({**operator().state_dict(), "header": text})


def test_repeated_names() -> None:
    """The last one counts, and every one is checked."""
    state = operator().state_dict()

    def repeated(first: int) -> dict[str, Any]:
        header = header_text(state).replace('"num_data":50', f'"num_data":{first},"num_data":50')
        assert header != header_text(state)
        return {**state, "header": header}

    assert EKFACLinearOperator.from_state_dict(repeated(40)).num_data == 50
    with pytest.raises(SnapshotError, match=r"at 'provenance.num_data': Expected `int` >= 1"):
        EKFACLinearOperator.from_state_dict(repeated(0))


def test_time_for_long_headers() -> None:
    """Products of very many sizes would take hours."""
    state = operator().state_dict()
    sizes = [9] * 10**6
    header = json.loads(header_text(state))
    header["parameters"]["scale"] = sizes
    started = time.perf_counter()
    with pytest.raises(SnapshotError, match=r"parameters\['scale'\]"):
        EKFACLinearOperator.from_state_dict({**state, "header": json.dumps(header)})
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("size", [300, 1200])
def test_bases_of_few_bits_are_looked_at(size: int, tmp_path: Path) -> None:
    """What bfloat16 may be off must not be more than what a blank or a wrong basis is off."""
    made = EKFACLinearOperator.from_blocks(
        [random_block(("w",), (1, size, 1), seed=1, bases="g")], {"w": (size, 1)}, PROVENANCE
    )
    path, key = tmp_path / "file", "w/gradient_basis"
    made.save(path, storage_dtype=torch.bfloat16)
    EKFACLinearOperator.load(path)
    with files.loaded(path) as state:
        for wrong in (
            torch.zeros_like(state[key]),
            state[key] * 1.3,
            state[key] * 0.5,
            state[key].roll(1, 1).tril(),
        ):
            with pytest.raises(SnapshotError, match="is not orthonormal"):
                EKFACLinearOperator.from_state_dict({**state, key: wrong})
