"""Checkpoints that any number of ranks can read: a folder per save, complete or absent, `latest` moved after it.

checkpoints/step-00001234/.metadata, __*_*.distcp     tensors, written by all ranks (torch.distributed.checkpoint)
checkpoints/step-00001234/facts.json                  numbers, strings and lists
checkpoints/step-00001234/COMMIT                      written last, before the folder gets its name
latest                                                the name of the newest folder

A tensor that is divided among ranks is saved as one (`Rows`): which ranks held which rows is not part of the file.
"""

import io
import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard

from spire_dist.distributed.holder import life, refuse_superseded
from spire_dist.distributed.mesh import Mesh
from spire_dist.errors import RunError
from spire_dist.files import flush, remove, write_durably

COMMIT, FACTS = "COMMIT", "facts.json"
ALONE = Mesh()
Axis: TypeAlias = Literal["gauss", "world"]


@dataclass(frozen=True)
class Rows:
    """The rows that a rank has of a tensor of `count`, which the ranks along `axis` share as `torch.chunk` would divide it."""

    own: Tensor
    count: int
    axis: Axis


Tensors = dict[str, Tensor | Rows]


def save_checkpoint(
    run: Path, step: int, tensors: Tensors, facts: dict[str, Any], keep: int, mesh: Mesh = ALONE
) -> Path:
    """Write the checkpoint of `step`, all ranks together, and drop all but the newest `keep`.

    Killed at any moment, the run still has its previous checkpoint. Raises RunError, and saves nothing, where a newer life of
    this Slurm job has taken the run. One that is there already is of the same state (a run
    that goes on at the end of a stage saves its step again) and stays.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    # Two lives of a Slurm job, one of them on nodes that were given up, may be at the same step.
    partial = folder.with_name(f".{folder.name}{f'-{life()}' if life() else ''}.partial")
    there = torch.tensor([int((folder / COMMIT).exists())])
    if mesh.rank == 0:
        refuse_superseded(run)
    if mesh.rank == 0 and not there:
        remove(folder)
        remove(partial)
        partial.mkdir(parents=True)
    if mesh.axes is not None:  # the first rank decides for all; nobody writes before the folder is there
        dist.broadcast(there, group_src=0)
    if not there:
        divided = {name: _whole(part, mesh) for name, part in tensors.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled"
            )  # no process group is wanted by one alone
            dcp.save(divided, checkpoint_id=partial, no_dist=mesh.axes is None)  # pyright: ignore[reportPrivateImportUsage]
    if mesh.rank == 0:
        if not there:
            axes = {name: part.axis for name, part in tensors.items() if isinstance(part, Rows)}
            write_durably(partial / FACTS, json.dumps({"rows": axes, "facts": facts}))
            write_durably(partial / COMMIT, f"{step}\n")
            refuse_superseded(run)
            partial.rename(folder)
            flush(folder.parent)
        write_durably(run / "latest", f"{folder.name}\n")
        _drop_old(run, folder, keep)
    return folder


def read_facts(run: Path) -> dict[str, Any] | None:
    """What the checkpoint `latest` names says beside its tensors. Raises RunError where it is not complete."""
    if not (run / "latest").exists():
        return None
    return json.loads((_newest(run) / FACTS).read_text())["facts"]


def load_checkpoint(run: Path, mesh: Mesh = ALONE) -> tuple[Tensors, dict[str, Any]] | None:
    """Tensors and facts of the checkpoint `latest` names, on the CPU, each rank with its rows; None where there is none.

    One process alone gets every tensor whole. Raises RunError for a damaged one. Only numbers are read back: a checkpoint
    from elsewhere cannot run code.
    """
    if not (run / "latest").exists():
        return None
    folder = _newest(run)
    try:
        described = json.loads((folder / FACTS).read_text())
        reader = _Reader(folder)
        room: Tensors = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            axis = described["rows"].get(name) if mesh.axes is not None else None
            room[name] = _room(tuple(entry.size), entry.properties.dtype, axis, mesh)
        wanted = {name: _whole(part, mesh) for name, part in room.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=mesh.axes is None)  # pyright: ignore[reportPrivateImportUsage]
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        AssertionError,
        pickle.UnpicklingError,
        dcp.CheckpointException,  # pyright: ignore[reportPrivateImportUsage]
    ) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(
            f"{folder}: cannot be read ({reason}); remove the folder, write the name of an older one into "
            f"{run / 'latest'} and run again"
        ) from error
    return room, described["facts"]


def _newest(run: Path) -> Path:
    pointer = run / "latest"
    folder = run / "checkpoints" / pointer.read_text().strip()
    if not (folder / COMMIT).exists():
        raise RunError(
            f"{pointer}: names {folder.name}, which is not a complete checkpoint; name another of {run}/checkpoints"
        )
    return folder


def _whole(part: Tensor | Rows, mesh: Mesh) -> Tensor:
    """What torch.distributed.checkpoint is to see: of divided tensors the whole one, of which this rank has a share."""
    if isinstance(part, Tensor):
        return part
    if mesh.axes is None:
        return part.own
    shape = torch.Size([part.count, *part.own.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part.own, mesh.line(part.axis), [Shard(0)], run_check=False, shape=shape, stride=stride)


def _room(shape: tuple[int, ...], dtype: torch.dtype, axis: Axis | None, mesh: Mesh) -> Tensor | Rows:
    if axis is None:
        return torch.empty(shape, dtype=dtype)
    part, parts = (mesh.gauss_rank, mesh.gauss) if axis == "gauss" else (mesh.rank, mesh.world)
    size = -(-shape[0] // parts)
    own = max(0, min(size, shape[0] - part * size))
    return Rows(torch.empty((own, *shape[1:]), dtype=dtype), shape[0], axis)


def _drop_old(run: Path, newest: Path, keep: int) -> None:
    folders = sorted((run / "checkpoints").glob("step-*"))
    complete = [old for old in folders if (old / COMMIT).exists()]
    for old in [*folders, *(run / "checkpoints").glob(".step-*.partial")]:
        if old != newest and old not in complete[-keep:]:
            shutil.rmtree(old)


class _Metadata(pickle.Unpickler):
    """The description of a checkpoint is a pickle; this one makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = module.startswith("torch.distributed.checkpoint.") or (module, name) in {
            ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("torch", "memory_format"),
        } or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))  # fmt: skip
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not describe tensors")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):  # pyright: ignore[reportPrivateImportUsage]
    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """As torch does, but without running what a pickle may say."""
        metadata = _Metadata(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
