"""The microscope of each particle: rows of a real data set's table, or drawn from ranges. Called by `simulate.simulate`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import ConfigError, SourceError
from spire_dist.schema import CTF_COLUMNS

CRYODRGN_CTF_COLUMNS = 9
"""Box (px), pixel size (Å), then the first seven of `schema.CTF_COLUMNS`."""


def ctfs_from_table(
    counts: NDArray[np.int64], path: Path, voltage_kv: float | None, per_state: bool, seed: int
) -> NDArray[np.float32]:
    """Rows [N, 9] of `schema.CTF_COLUMNS` for the particles of all states, without replacement where there are enough.

    The whole set is drawn at once, or each state from the whole table again (`per_state`). `voltage_kv` takes the place of
    the table's.
    """
    table = _read_table(path)
    rng = np.random.default_rng([seed, 2])
    draws = counts.tolist() if per_state else [int(counts.sum())]
    rows = np.concatenate([rng.choice(len(table), count, replace=count > len(table)) for count in draws])
    ctf = _blank(len(rows))
    ctf[:, :7] = table[rows, 2:]
    if voltage_kv is not None:
        ctf[:, CTF_COLUMNS.index("voltage_kv")] = voltage_kv
    return ctf


def ctfs_from_ranges(
    count: int,
    defocus_a: tuple[float, float],
    astigmatism_a: float,
    optics: tuple[float, float, float],
    seed: int,
) -> NDArray[np.float32]:
    """Rows [count, 9]: defocus uniform in a range, U and V `astigmatism_a` apart (Å); optics: kV, Cs in mm, contrast."""
    rng = np.random.default_rng([seed, 2])
    low, high = defocus_a
    if not 0 <= low <= high:
        raise ConfigError(f"defocus_a: {low} to {high} Å; give the smaller one first, both positive (underfocus)")
    ctf = _blank(count)
    mean = rng.uniform(low, high, count)
    ctf[:, 0], ctf[:, 1] = mean + astigmatism_a / 2, mean - astigmatism_a / 2
    ctf[:, 2] = rng.uniform(0, 180, count)
    ctf[:, 3:6] = optics
    return ctf


def with_envelope(ctf: NDArray[np.float32], b_factor: float) -> NDArray[np.float32]:
    """The rows with this B-factor, Å², instead of their own."""
    ctf = ctf.copy()
    ctf[:, CTF_COLUMNS.index("b_factor_a2")] = b_factor
    return ctf


def _blank(count: int) -> NDArray[np.float32]:
    """No envelope, scale 1."""
    ctf = np.zeros((count, len(CTF_COLUMNS)), dtype=np.float32)
    ctf[:, 8] = 1.0
    return ctf


def _read_table(path: Path) -> NDArray[np.float32]:
    if not path.is_file():
        raise SourceError(f"ctf_table: {path}: no such file; give a .npy of cryoDRGN's nine CTF columns")
    try:
        table = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise SourceError(f"ctf_table: {path}: not a plain .npy array ({error})") from error
    if table.ndim != 2 or table.shape[1] != CRYODRGN_CTF_COLUMNS or not np.isfinite(table).all():
        raise SourceError(f"ctf_table: {path}: shape {table.shape}; give finite numbers [rows, {CRYODRGN_CTF_COLUMNS}]")
    return table.astype(np.float32)
