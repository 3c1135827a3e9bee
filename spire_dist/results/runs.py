"""Small helpers around a finished run, shared by evaluate, export and report."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spire_dist.data.store import ParticleStore
from spire_dist.errors import RunError
from spire_dist.training.run import FinishedRun

Floats = NDArray[np.float32]


def decode_in_batches(run: FinishedRun, z: Floats, batch: int = 16) -> tuple[Floats, Floats]:
    """`run.decode` for any number of latents [B, L]: centres [B, G, 3] in Å, amplitudes [B, G]."""
    pieces = [run.decode(z[start : start + batch]) for start in range(0, len(z), batch)]
    return np.concatenate([centres for centres, _ in pieces]), np.concatenate([amplitudes for _, amplitudes in pieces])


def input_rows(store: ParticleStore, rows: NDArray[np.int64]) -> list[list[int]]:
    """Where particles of a store come from: [row of the input, from 0]; of several files [file, from 1, row]."""
    columns = [store.source[rows] + 1, store.source_index[rows]]
    return np.stack(columns if len(store.sources) > 1 else columns[1:], axis=1).tolist()


def read_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, none if the file is absent; a last line cut short by a crash is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{path}: line {number} is not JSON; remove the line") from error
    return records


def read_json(path: Path) -> dict:
    """A JSON file of the run directory, empty if it is absent or damaged (these files only inform)."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
