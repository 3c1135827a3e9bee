"""A latent table on several ranks: each row lives at home and travels to the rank that reads its particle.

Rows and the memory of their optimiser are divided in equal runs of the store, a run for each rank: their home. The order of
training (`data.order`) gives every rank other particles in every block, and is known everywhere. So at a block's begin each
row moves from its home to its reader, and back at the end, in one exchange each way; between them a row is on one rank
alone and its updates need no other. What moves is 12 bytes per number of a latent, once for each particle and epoch and
direction.
"""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from spire_dist.distributed.mesh import Mesh

COLUMNS = ("value", "exp_avg", "exp_avg_sq")
"""Of a row: the latent itself, and the two means that Adam keeps of its gradients."""


class TravellingTable(nn.Module):
    """The rows [N, L] of all ranks together; this one holds its home's, and for a block those of the particles it reads."""

    def __init__(self, values: Tensor, mesh: Mesh, at_most: int) -> None:
        """`values` [N, L] to start with, the same on every rank; `at_most` rows are here for a block."""
        super().__init__()
        self.count, self.mesh = len(values), mesh
        self.run = -(-self.count // mesh.world)
        own = values[mesh.rank * self.run : (mesh.rank + 1) * self.run]
        self.home = torch.stack([own, torch.zeros_like(own), torch.zeros_like(own)], dim=1)
        self.rows = nn.Embedding(at_most, values.shape[1], sparse=True)
        self.readers: list[NDArray[np.int64]] = []
        """Rows of the store, ascending, that each rank has for the present block; none between blocks."""

    def place(self, rows: Tensor) -> Tensor:
        """Where the rows [B] of the store are among those that are here."""
        mine = torch.from_numpy(self.readers[self.mesh.rank]).to(rows.device)
        return torch.searchsorted(mine, rows)

    def forward(self, rows: Tensor, images: Tensor, ctf: Tensor, rotations: Tensor, shifts_px: Tensor) -> Tensor:
        """Latents [B, L] of particles `rows` [B], which this rank reads in the present block."""
        return self.rows(self.place(rows))

    def set_out(self, optimiser: torch.optim.SparseAdam, readers: list[NDArray[np.int64]]) -> None:
        """Begin a block for which rank r reads the particles `readers[r]`; all ranks call this together."""
        assert not self.readers, "the last block's rows have not come home"
        self.readers = [np.sort(rows) for rows in readers]
        arrived = self._exchange(self.home[self._leaving()], self._leaving_counts(), self._arriving_counts())
        with torch.no_grad():
            for column, part in zip(
                self._columns(optimiser), arrived.to(self.rows.weight.device).unbind(1), strict=True
            ):
                column[: len(part)] = part

    def come_home(self, optimiser: torch.optim.SparseAdam) -> None:
        """End the block: every row and its optimiser's memory goes back; nothing between blocks. All ranks together."""
        if not self.readers:
            return
        here = len(self.readers[self.mesh.rank])
        with torch.no_grad():
            leaving = torch.stack([column[:here] for column in self._columns(optimiser)], dim=1).cpu()
        self.home[self._leaving()] = self._exchange(leaving, self._arriving_counts(), self._leaving_counts())
        self.readers = []

    def _columns(self, optimiser: torch.optim.SparseAdam) -> list[Tensor]:
        """The working copies of `COLUMNS`, [at_most, L] each."""
        weight = self.rows.weight
        state = optimiser.state[weight]
        if not state:  # as SparseAdam itself begins
            state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        return [weight, state["exp_avg"], state["exp_avg_sq"]]

    def _leaving(self) -> NDArray[np.int64]:
        """Places at home of the rows that are wanted, reader by reader."""
        first = self.mesh.rank * self.run
        return np.concatenate([rows[_within(rows, first, first + self.run)] - first for rows in self.readers])

    def _leaving_counts(self) -> list[int]:
        first = self.mesh.rank * self.run
        return [int(_within(rows, first, first + self.run).sum()) for rows in self.readers]

    def _arriving_counts(self) -> list[int]:
        """From each home; being ascending, the rows here lie home by home."""
        homes = self.readers[self.mesh.rank] // self.run
        return np.bincount(homes, minlength=self.mesh.world).tolist()

    def _exchange(self, leaving: Tensor, leaving_counts: list[int], arriving_counts: list[int]) -> Tensor:
        if self.mesh.world == 1:
            return leaving
        arrived = leaving.new_empty(sum(arriving_counts), *leaving.shape[1:])
        dist.all_to_all_single(
            arrived, leaving.contiguous(), arriving_counts, leaving_counts, group=self.mesh.world_group
        )
        return arrived


def _within(rows: NDArray[np.int64], first: int, end: int) -> NDArray[np.bool_]:
    return (rows >= first) & (rows < end)
