"""Checkpoints: a folder per save, committed by a marker, `latest` moved only after the data is on the disk.

checkpoints/step-00001234/state.pt
checkpoints/step-00001234/COMMIT      written last; a folder without it is ignored and cleaned up
latest                                the name of the newest committed folder
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from spire_dist.errors import RunError
from spire_dist.files import replacing, write_durably

COMMIT = "COMMIT"


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (tensors, numbers, strings, nested) as the checkpoint of `step` and drop all but the newest `keep`.

    Killed at any moment, the run still has its previous checkpoint.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    # A run that goes on at the end of a stage saves its step again: the old state stays until the new one is whole.
    with replacing(folder / "state.pt", flushed=True) as partial:
        torch.save(state, partial)
    write_durably(folder / COMMIT, f"{step}\n")
    write_durably(run / "latest", f"{folder.name}\n")
    folders = sorted((run / "checkpoints").glob("step-*"))
    complete = [old for old in folders if (old / COMMIT).exists()]
    for old in folders:
        if old != folder and old not in complete[-keep:]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """The state of the checkpoint `latest` names, None where there is none. Raises RunError for a damaged one.

    Only tensors and plain containers are read back: a checkpoint from elsewhere cannot run code.
    """
    pointer = run / "latest"
    if not pointer.exists():
        return None
    folder = run / "checkpoints" / pointer.read_text().strip()
    if not (folder / COMMIT).exists():
        raise RunError(
            f"{pointer}: names {folder.name}, which is not a complete checkpoint; name another of {run}/checkpoints"
        )
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(
            f"{folder}/state.pt: cannot be read ({reason}); remove the folder, write the "
            f"name of an older one into {pointer} and run again"
        ) from error
