"""Damage to the bytes of a snapshot file, wherever it can be."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any, Final

import torch

Mutation = Callable[[random.Random, bytes], bytes]

_SIZES: Final = (
    0,
    1,
    2,
    3,
    7,
    2**20,
    2**31,
    2**32,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_DTYPES: Final = (
    *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64"),
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64", "", "X" * 5000, "f32"),
)


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Damage a file once, or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(MUTATIONS)(rng, content)
    return content


def header_end(content: bytes) -> int:
    """Return where the header of a safetensors file ends, whatever the file is."""
    return 8 + min(int.from_bytes(content[:8], "little"), max(len(content) - 8, 0))


def with_header(content: bytes, header: bytes) -> bytes:
    """Return a file with another header, which is as long as the file says."""
    return len(header).to_bytes(8, "little") + header + content[header_end(content) :]


def _place(rng: random.Random, content: bytes) -> int:
    """Choose a byte: in the length, the header, the tensors, or at one of their ends."""
    end, size = header_end(content), len(content)
    places = (
        rng.randrange(8),
        rng.randrange(8, end + 1) if end >= 8 else 0,
        rng.randrange(end, size + 1) if end <= size else 0,
        rng.choice((0, 7, 8, 9, end - 1, end, end + 1, size - 1)),
    )
    return max(0, min(rng.choice(places), size - 1))


def _stretch(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = _place(rng, content)
    return start, start + rng.choice((1, 2, 8, 100, 1000))


def truncated(rng: random.Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        if changed:
            changed[_place(rng, content)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, content: bytes) -> bytes:
    start, end = _stretch(rng, content)
    count = min(end, len(content)) - start
    new = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count), b"9" * count))
    return content[:start] + new + content[start + count :]


def inserted(rng: random.Random, content: bytes) -> bytes:
    start, end = _stretch(rng, content)
    return content[:start] + rng.choice((bytes, rng.randbytes))(end - start) + content[start:]


def deleted(rng: random.Random, content: bytes) -> bytes:
    start, end = _stretch(rng, content)
    return content[:start] + content[end:]


def appended(rng: random.Random, content: bytes) -> bytes:
    count = rng.choice((1, 8, 4096))
    return content + rng.choice((bytes(count), rng.randbytes(count), content))


def swapped(rng: random.Random, content: bytes) -> bytes:
    """Exchange two pieces of the same length."""
    (a, end), b = _stretch(rng, content), _place(rng, content)
    count = min(end - a, abs(a - b), len(content) - max(a, b))
    a, b = sorted((a, b))
    return (
        content[:a]
        + content[b : b + count]
        + content[a + count : b]
        + content[a : a + count]
        + content[b + count :]
    )


def relabelled_length(rng: random.Random, content: bytes) -> bytes:
    """Declare another length of the header."""
    length = header_end(content) - 8
    declared = rng.choice(
        (*_SIZES, length - 1, length + 1, length // 2, 2 * length, 10**8, 10**8 + 1)
    )
    return max(declared, 0).to_bytes(8, "little") + content[8:]


def edited_header(rng: random.Random, content: bytes) -> bytes:
    """Let the header describe the tensors wrongly, or in other words."""
    try:
        header: Any = json.loads(content[8 : header_end(content)])
    except (ValueError, RecursionError):
        return content
    if not isinstance(header, dict) or not header:
        return content
    key = rng.choice(list(header))
    other = rng.choice(list(header))
    described = header[key]
    if not isinstance(described, dict):
        return content
    match rng.randrange(12):
        case 0:
            described["shape"] = [rng.choice(_SIZES) for _ in range(rng.randrange(5))]
        case 1 if isinstance(described.get("shape"), list) and described["shape"]:
            place = rng.randrange(len(described["shape"]))
            described["shape"][place] = rng.choice((*_SIZES, -1, 1.5, None, "1", 10**30))
        case 2:
            described["dtype"] = rng.choice(_DTYPES)
        case 3:
            described["data_offsets"] = [rng.choice((*_SIZES, -1)), rng.choice(_SIZES)]
        case 4:
            header[key], header[other] = header[other], header[key]
        case 5:
            del header[key]
        case 6:
            header[rng.choice(("header", "__metadata__", "", "x\ny", "é", "k" * 5000))] = (
                header.pop(key)
            )
        case 7:
            described["shape"] = [1] * rng.choice((30, 70, 1000)) + list(described.get("shape", []))
        case 8:
            metadata = header.setdefault("__metadata__", {})
            if isinstance(metadata, dict):
                name = rng.choice(("header", "digest", "more"))
                metadata[name] = rng.choice(
                    ("", "null", "[]", "{}", "[" * 10**5, "x\n" * 9999, 1, None)
                )
        case 9:
            described["shape"] = rng.choice(([2**40, 0, 0], [0], [2**62, 0, 2**62], [2**63, 0]))
            described["data_offsets"] = [0, 0]
        case 10:
            header = dict(rng.sample(list(header.items()), len(header)))
        case _:
            header = rng.choice(([header], None, {}, {"__metadata__": header.get("__metadata__")}))
    return with_header(content, json.dumps(header).encode())


def edited_text(rng: random.Random, content: bytes) -> bytes:
    """Write the header as no library would: nested, repeated or padded."""
    text = content[8 : header_end(content)]
    depth = rng.choice((10, 120, 500, 990, 10**5))
    repeated = text[:-1].rstrip(b" }") + b"}," + text[1:]
    choices = (
        text + b" " * rng.choice((1, 7, 4096)),
        b" " + text,
        text + text,
        repeated,
        b'{"__metadata__":{"header":"{}"},' + text[1:],
        b"[" * depth,
        b'{"a":' * depth,
        b'{"a":' + b"[" * depth + b"]" * depth + b"," + text[1:],
        text.replace(b'\\"', b"\\u0022"),
        text.replace(b"weight", b"\\ud800", rng.choice((1, -1))),
        text.replace(b"weight", b"wei\\nght", rng.choice((1, -1))),
        text.replace(b"[", b"[" * 50, 1),
        text.replace(b"weight", b"\xff\xfe", 1),
        text.decode("utf-8", "replace").encode("utf-16"),
    )
    return with_header(content, rng.choice(choices))


def foreign(rng: random.Random, content: bytes) -> bytes:
    """Put another file in its place."""
    torch_file, zip_file = io.BytesIO(), io.BytesIO()
    torch.save({"header": "{}"}, torch_file)
    with zipfile.ZipFile(zip_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header", bytes(10**6))
    return rng.choice(
        (
            b"",
            bytes(8),
            bytes(len(content)),
            b"hello",
            rng.randbytes(rng.choice((1, 8, 9, 1000))),
            pickle.dumps({"header": "{}"}),
            torch_file.getvalue(),
            zip_file.getvalue(),
            b'{"header": {}}',
            (2).to_bytes(8, "little") + b"{}",
            content[header_end(content) :],
            content[8:],
        )
    )


class Executed:
    """Something that leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.mark,)


MUTATIONS: Final[tuple[Mutation, ...]] = (
    truncated,
    flipped,
    flipped,
    overwritten,
    inserted,
    deleted,
    appended,
    swapped,
    relabelled_length,
    edited_header,
    edited_header,
    edited_text,
    foreign,
)
