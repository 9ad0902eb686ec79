"""The penalty in the checkpoint folders of `Trainer`."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.errors import SnapshotError
from rotate_ewc.penalty.attachment import Attachment
from rotate_ewc.penalty.penalty import EKFACPenalty

PENALTY_FILE: Final = "penalty.safetensors"
ATTACHMENT_FILE: Final = "penalty_attachment.pt"


def folder_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint at this step."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    output = Path(args.output_dir or ".")
    # In a search of hyper-parameters, every trial has a folder of its own.
    trials = sorted(output.glob(f"run-*/{name}"), key=os.path.getmtime)
    return trials[-1] if trials and state.is_hyper_param_search else output / name


def checkpoint_to_resume(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder from which a run is resumed.

    Raises:
        FileNotFoundError: If it has no penalty.
    """
    given = args.resume_from_checkpoint
    folders = [Path(given)] if isinstance(given, str) and os.path.isdir(given) else []
    folders.append(folder_of(args, state))
    # Trainer does not tell its callbacks which folder it has read; the logs in it do.
    folder = next((folder for folder in folders if _is_of(folder, state)), None)
    if folder is None:
        raise FileNotFoundError(
            f"the run is resumed at step {state.global_step}, but not from "
            f"{' or '.join(map(repr, map(str, folders)))}; expected a checkpoint there, or "
            f"TrainingArguments(resume_from_checkpoint=...) with the folder of the checkpoint"
        )
    if not (folder / PENALTY_FILE).is_file():
        raise FileNotFoundError(
            f"the run is resumed at step {state.global_step}, but there is no {PENALTY_FILE!r} in "
            f"{str(folder)!r}; expected a checkpoint of a run with this callback. To continue "
            f"from this one with the penalty as it is now, save the penalty there: "
            f"penalty.save({str(folder / PENALTY_FILE)!r})"
        )
    return folder


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Return whether a checkpoint is that from which a state was read."""
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return False
    saved = TrainerState.load_from_json(str(path))
    return bool(saved.global_step == state.global_step and saved.log_history == state.log_history)


def save_both(attachment: Attachment[EKFACPenalty], folder: Path) -> None:
    """Write a penalty, and its part in an optimizer's steps, to a folder."""
    attachment.penalty.save(folder / PENALTY_FILE)
    unfinished = folder / f"{ATTACHMENT_FILE}.unfinished"
    torch.save(attachment.state_dict(), unfinished)
    os.replace(unfinished, folder / ATTACHMENT_FILE)


def load_penalty(penalty: EKFACPenalty, folder: Path) -> None:
    """Let a penalty continue from the files in a folder.

    Raises:
        SnapshotError: If it is damaged, or of other tasks, mode or weighting; the penalty is then
            as it was.
    """
    penalty.load_state_dict(EKFACPenalty.load(folder / PENALTY_FILE).state_dict())


def load_attachment(attachment: Attachment[EKFACPenalty], folder: Path) -> None:
    """Let a handle continue from the file in a folder; warn if there is none.

    Raises:
        SnapshotError: If the file is damaged, or is not of this handle, naming it.
    """
    path = folder / ATTACHMENT_FILE
    if not path.is_file():
        warn_user(
            f"there is no {ATTACHMENT_FILE!r} in {str(folder)!r}: training goes on, but not to the "
            f"same bits, and a strength that is being found is looked for from here on"
        )
        return
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        attachment.load_state_dict(state)
    except (EOFError, KeyError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise SnapshotError(
            f"{str(path)!r} cannot be used ({told}); expected the file as this callback wrote it: "
            f"resume from another checkpoint, or delete this file to go on without it (up to "
            f"rounding the same, but a strength that is being found may come out smaller)"
        ) from error
