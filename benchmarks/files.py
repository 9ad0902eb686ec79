"""How results are written: never by halves."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes | str) -> Path:
    """Write bytes or UTF-8 to a file that is, at every moment, the old one or the new one."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # A rename is atomic only within one file system, hence the temporary file next to the target.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, as :func:`replace_file` does; ``ValueError`` if a number is not finite."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, f"{text}\n")
