"""Free vectors per particle, latents or corrections of poses: a table whose rows live at home and travel to their reader.

Rows and the memory of their optimiser are divided in equal runs of the store, a run for each rank: their home. The order of
training (`data.order`) gives every rank other particles in every block, and is known everywhere. So at a block's begin each
row moves from its home to its reader, and back at the end, in one exchange each way; between them a row is on one rank
alone and its updates need no other. What moves is 12 bytes per number of a latent, once for each particle and epoch and
direction. One process alone does the same, with itself.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spire_dist.data.order import NOTHING, Order
from spire_dist.distributed.collectives import exchange
from spire_dist.distributed.mesh import Mesh

BETAS = (0.9, 0.99)


def at_home(values: Tensor) -> Tensor:
    """Rows [N, 3, L] to start a table with, from latents [N, L]: themselves, and the two means that Adam keeps."""
    return torch.stack([values, torch.zeros_like(values), torch.zeros_like(values)], dim=1)


class LatentTable(nn.Module):
    """The paper's auto-decoder: a latent per particle, of which only those of the step's particles move.

    `home` [n, 3, L] are the rows of this rank's run; `rows` those of the particles it reads in the present block.
    """

    def __init__(
        self,
        home: Tensor,
        order: Order,
        mesh: Mesh,
        device: torch.device,
        steps: int = 0,
        betas: tuple[float, float] = BETAS,
    ) -> None:
        """`steps` were made before, as Adam must know, whose decays per visit are `betas`."""
        super().__init__()
        self.home, self.order, self.mesh = home, order, mesh
        self.run = -(-order.count // mesh.world)
        self.block: int | None = None
        """The block whose rows are here; None between blocks, when all are at home."""
        self.readers: list[NDArray[np.int64]] = []
        """Rows of the store, ascending, that each rank has for the present block."""
        at_most = min(order.count, order.block_images // mesh.world)
        self.rows = nn.Embedding(at_most, home.shape[2], sparse=True, device=device)
        self.here = torch.empty(0, dtype=torch.long, device=device)
        """Of `readers`, those of this rank: what lies in `rows`."""
        weight = self.rows.weight
        self.optimiser = torch.optim.SparseAdam(
            [weight], betas=betas
        )  # a dense Adam would move absent particles' rows on
        zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        self.optimiser.state[weight] = {"step": steps} | zeros  # as SparseAdam itself begins

    @property
    def steps(self) -> int:
        """How many were made."""
        return self.optimiser.state[self.rows.weight]["step"]

    def forward(self, rows: Tensor) -> Tensor:
        """Latents [B, L] of particles `rows` [B], which this rank reads in the present block."""
        return self.rows(torch.searchsorted(self.here, rows))

    def descend(self, rate: float, visits: int | None = None) -> None:
        """One step of Adam, of the rows that have a gradient: of the mean over ranks, each of which alone has its rows.

        Adam begins with means of zero and allows for that by the number of steps, though a row has had only its `visits` of
        them: where that is given (this one counted), it is taken instead.
        """
        gradient = self.rows.weight.grad
        if gradient is not None and self.mesh.world > 1:
            gradient /= self.mesh.world
        if visits is not None:
            self.optimiser.state[self.rows.weight]["step"] = visits - 1
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def replace(self, rows: Tensor, taken: Tensor, others: Tensor) -> None:
        """Give those of the particles `rows` [B] that are `taken` [B] other latents [B, L], of which Adam knows nothing yet."""
        places = torch.searchsorted(self.here, rows)
        weight, *means = self._columns()
        weight[places] = torch.where(taken[:, None], others, weight[places])
        for mean in means:
            mean[places] *= ~taken[:, None]

    @torch.no_grad()
    def visit(self, step: int) -> None:
        """Have the rows of a step's block here. All ranks call this together."""
        block = self.order.block_of(step)
        if block == self.block:
            return
        self.come_home()
        everyones = np.split(self.order.portion(block).rows, self.mesh.world, axis=1)
        self.readers = [np.sort(rows[rows != NOTHING]) for rows in everyones]
        self.here = torch.from_numpy(self.readers[self.mesh.rank]).to(self.here.device)
        arrived = exchange(
            self.home[self._leaving()], self._leaving_counts(), self._arriving_counts(), self.mesh.world_group
        ).to(self.here.device)
        for column, part in zip(self._columns(), arrived.unbind(1), strict=True):
            column[: len(part)] = part
        self.block = block

    @torch.no_grad()
    def come_home(self) -> None:
        """Have every row at its home, what Adam keeps of it too. All ranks call this together."""
        if self.block is None:
            return
        leaving = torch.stack([column[: len(self.here)] for column in self._columns()], dim=1).cpu()
        self.home[self._leaving()] = exchange(
            leaving, self._arriving_counts(), self._leaving_counts(), self.mesh.world_group
        )
        self.block = None

    def _columns(self) -> list[Tensor]:
        state = self.optimiser.state[self.rows.weight]
        return [self.rows.weight, state["exp_avg"], state["exp_avg_sq"]]

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


def _within(rows: NDArray[np.int64], first: int, end: int) -> NDArray[np.bool_]:
    return (rows >= first) & (rows < end)
