"""Warnings that point at the user's own line, and notes on errors that are not ours."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType
from typing import Final

import torch

# Modules are called, and gradients are switched off, through frames of torch.
_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__))
_NOT_THE_USERS: Final = (_PACKAGE + os.sep, os.path.dirname(torch.__file__) + os.sep)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as of the line outside of the package, and of torch, from which it was called."""
    level, frame = 2, sys._getframe(1)
    above: FrameType | None = frame
    while above is not None and above.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, above = level + 1, above.f_back
    warnings.warn(message, category, stacklevel=level)


def add_note(error: BaseException, note: str) -> None:
    """Add a line to what an error shows, where Python can (from 3.11 on); its type stays."""
    if hasattr(error, "add_note"):
        error.add_note(note)
