"""Who adds up the ranks' gradients and makes the steps: our own data parallelism here, or DeepSpeed (`deepspeed_engine.py`).

Both have one interface: call it for the objective, `descend` from it, `memory` and `remember` for checkpoints, in which neither
how many ranks there were nor which engine shows.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from spire_dist.data.loader import Batch
from spire_dist.model.sharing import gradient_norm, reduce_common, reduce_shared
from spire_dist.training.objective import Objective
from spire_dist.training.optimiser import adam, adam_memory, remember_adam, set_rates, split


class Engine(Protocol):
    """What the train loop needs of it."""

    def __call__(
        self,
        batch: Batch,
        latents: Tensor | None,
        warm: bool,
        corrections: Tensor | None = None,
        tried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective of a rank's batch, and squared residuals, as `Objective.forward` has them."""
        ...

    def descend(self, objective: Tensor, factor: float) -> None:
        """Gradients of the objective's mean over ranks, and a step at `factor` times the peak step sizes."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by name; of Gaussians those of this rank. All ranks together."""
        ...

    def memory(self) -> dict[str, Tensor]:
        """The optimiser's state as `NAME/exp_avg`, `/exp_avg_sq` and `/step`, of the same parameters."""
        ...

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take over such a state."""
        ...


class DataParallel:
    """Every rank has all of its parameters' state; gradients are added up in two messages, the Gaussians' and the others'.

    (torch's DistributedDataParallel knows only one group of ranks for all that it wraps. What it would gain, sending while the
    backward pass still runs, is little here: the networks' gradients are complete only at its end, and are small.)
    """

    def __init__(self, objective: Objective) -> None:
        self.objective, self.mesh = objective, objective.mesh
        self.named = dict(objective.named_parameters())
        self.gaussians, self.common = split(self.named)
        self.optimiser = adam(self.named, objective.stage.rates)

    def __call__(
        self,
        batch: Batch,
        latents: Tensor | None,
        warm: bool,
        corrections: Tensor | None = None,
        tried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Engine."""
        return self.objective(batch, latents, warm, corrections, tried)

    def descend(self, objective: Tensor, factor: float) -> None:
        """See Engine."""
        self.optimiser.zero_grad()
        objective.backward()
        reduce_shared(self.gaussians.values(), self.mesh)
        reduce_common(self.common.values(), self.mesh)
        longest = self.objective.stage.clip_norm
        if longest is not None:
            norm = gradient_norm(self.gaussians.values(), self.common.values(), self.mesh)
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad *= (longest / (norm + 1e-6)).clamp(max=1.0)
        set_rates(self.optimiser, factor)
        self.optimiser.step()

    def parameters(self) -> dict[str, Tensor]:
        """See Engine."""
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def memory(self) -> dict[str, Tensor]:
        """See Engine."""
        return adam_memory(self.optimiser, self.named)

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """See Engine."""
        remember_adam(self.optimiser, self.named, memory)
