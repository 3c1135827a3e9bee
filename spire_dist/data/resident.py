"""Whether all images of a store fit into memory, of the GPU or of this node, and having them there.

Called by `training.train`. They are kept as they are stored, so that a batch has the same bits as one that was streamed.
Ranks of one node keep no copies of their own: what they stream is in the system's cache of files, once for all of them.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from spire_dist.data.loader import refuse_not_finite
from spire_dist.data.store import ParticleStore
from spire_dist.machine import local_ranks
from spire_dist.progress import progress

SHARE = 0.25
"""Of the memory that is free: what training itself needs is not known here, and files read twice are in memory anyway."""
PIECE_BYTES = 2**26


def resident_images(
    store: ParticleStore, wanted: Literal["auto", "never", "always"], device: torch.device
) -> NDArray[Any] | Tensor | None:
    """All images [N, D, D] as stored: on the GPU, else in the memory of a node with one rank, where they take little of it.

    None where they do not. `always` keeps them in memory whatever they take, a copy for each rank. Raises StoreError as
    reading does.
    """
    size = store.count * store.box**2 * store.images.dtype.itemsize
    if wanted == "never":
        return None
    if device.type == "cuda" and size <= SHARE * torch.cuda.mem_get_info(device)[0]:
        return _read_all(store, device)
    if wanted == "always" or (local_ranks() == 1 and size <= SHARE * free_memory()):
        return _read_all(store, torch.device("cpu")).numpy()
    return None


def _read_all(store: ParticleStore, device: torch.device) -> Tensor:
    kind = torch.from_numpy(np.empty(0, store.images.dtype)).dtype
    images = torch.empty((store.count, store.box, store.box), dtype=kind, device=device)
    step = max(1, PIECE_BYTES // (images[0].numel() * images.element_size()))
    for first in progress(range(0, store.count, step), "images into memory", unit="piece"):
        rows = np.arange(first, min(first + step, store.count))
        piece = torch.from_numpy(store.stored(rows))
        if device.type != "cpu":  # those of the CPU are looked at batch by batch
            refuse_not_finite(store, piece, rows)
        images[first : first + len(rows)] = piece
    return images


def free_memory() -> int:
    """Bytes this process may still take: the machine's, or what a batch system's control group leaves of them."""
    limits = [psutil.virtual_memory().available]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        v2 = not controllers
        if v2 or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup") if v2 else Path("/sys/fs/cgroup/memory")
            here = root / path.lstrip("/")
            limits += [free for folder in (here, *here.parents) if (free := _left_in_group(folder, v2)) is not None]
    return max(0, min(limits))


def _left_in_group(folder: Path, v2: bool) -> int | None:
    """What a control group leaves, not counting files that are only cached; None where it has no limit."""
    names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    cached = int(stat.get("inactive_file" if v2 else "total_inactive_file", 0))
    return None if limit == "max" else int(limit) - int(used) + cached
