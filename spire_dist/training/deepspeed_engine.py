"""DeepSpeed as the engine of a run: the same steps, with optimiser, gradients or parameters divided among ranks (ZeRO).

With Gaussians shared over a group (gauss > 1) it has what every rank holds alike, networks and anchors; a rank's Gaussians,
which already are divided, keep an Adam of their own.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spire_dist.config import ParallelConfig
from spire_dist.data.loader import Batch
from spire_dist.errors import ConfigError
from spire_dist.model.sharing import reduce_shared
from spire_dist.training.objective import Objective
from spire_dist.training.optimiser import adam, adam_memory, remember_adam, set_rates, split


class _Held(nn.Module):
    """What DeepSpeed is to hold, and no more.

    Of a rank's own Gaussians it must not know: it gives all ranks the first one's parameters, and adds up all gradients.
    """

    def __init__(self, objective: Objective, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_held = nn.ParameterList(parameters)
        self._objective = (objective,)  # in a tuple it is no part of this module

    def forward(
        self,
        batch: Batch,
        latents: Tensor | None,
        warm: bool,
        corrections: Tensor | None = None,
        tried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._objective[0](batch, latents, warm, corrections, tried)


class DeepSpeed:
    """DeepSpeed's engine, configured from ours and saved through ours: its own files fit only as many ranks as wrote them."""

    def __init__(self, objective: Objective, config: ParallelConfig) -> None:
        deepspeed = _import_deepspeed()
        mesh = self.mesh = objective.mesh
        stage, shared = objective.stage, mesh.gauss > 1
        if shared and stage.clip_norm is not None:
            raise ConfigError("clip_norm with parallel.engine = deepspeed and parallel.gauss > 1: DeepSpeed sees only the norm "
                              "of what it holds; use engine ddp or gauss 1")  # fmt: skip
        if shared and config.zero == 3:
            raise ConfigError("parallel.zero = 3 with parallel.gauss > 1: what is left to divide are networks, which every "
                              "step needs whole; use zero 0, 1 or 2")  # fmt: skip
        self.objective, self.zero = objective, config.zero
        named = dict(objective.named_parameters())
        self.own, _ = split(named) if shared else ({}, {})
        self.named = {name: parameter for name, parameter in named.items() if name not in self.own}
        self.own_optimiser = adam(self.own, stage.rates) if self.own else None
        settings = {
            "train_micro_batch_size_per_gpu": stage.batch // mesh.world,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": stage.clip_norm or 0.0,
            "steps_per_print": 2**31,
            "zero_optimization": {
                "stage": config.zero,
                "reduce_bucket_size": max(2**16, sum(p.numel() for p in self.named.values())),  # it allocates one
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        }
        held = _Held(objective, self.named.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(model=held, optimizer=adam(self.named, stage.rates), config=settings)
        if config.zero in (1, 2):
            # It learns at the first step of the first group of parameters where all groups' state lies: it must be there then.
            optimiser = self.engine.optimizer.optimizer
            for flat in (flat for group in optimiser.param_groups for flat in group["params"]):
                means = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
                optimiser.state[flat] = {"step": torch.zeros((), device=flat.device)} | means
        if config.zero == 3:  # it brings together what a module uses where it is told
            for parameter in self.named.values():
                deepspeed.zero.register_external_parameter(held, parameter)

    def __call__(
        self,
        batch: Batch,
        latents: Tensor | None,
        warm: bool,
        corrections: Tensor | None = None,
        tried: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Engine."""
        return self.engine(batch, latents, warm, corrections, tried)

    def descend(self, objective: Tensor, factor: float) -> None:
        """See Engine."""
        for parameter in self.own.values():
            parameter.grad = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of collectives that torch renamed
            self.engine.backward(objective)
            set_rates(self.engine.optimizer, factor)
            self.engine.step()
        if self.own_optimiser is not None:
            reduce_shared(self.own.values(), self.mesh)
            set_rates(self.own_optimiser, factor)
            self.own_optimiser.step()

    def parameters(self) -> dict[str, Tensor]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param if self.zero == 3 else Tensor.detach
        theirs: dict[str, Any] = {name: whole(parameter) for name, parameter in self.named.items()}
        return theirs | {name: parameter.detach() for name, parameter in self.own.items()}

    def memory(self) -> dict[str, Tensor]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_optimizer_state

        own = adam_memory(self.own_optimiser, self.own) if self.own_optimiser is not None else {}
        if self.zero == 0:
            return adam_memory(self.engine.optimizer, self.named) | own
        means: dict[str, Any] = {f"{name}/{key}": safe_get_full_optimizer_state(parameter, key)
                 for name, parameter in self.named.items() for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
        steps = {f"{name}/step": self._steps()[0].clone() for name in self.named}
        return means | steps | own

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """See Engine."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.own_optimiser is not None:
            remember_adam(self.own_optimiser, self.own, memory)
        if self.zero == 0:
            remember_adam(self.engine.optimizer, self.named, memory)
            return
        self._make_room()
        for name, parameter in self.named.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = memory[f"{name}/{key}"].to(self.engine.device)
                if self.zero == 3:  # its setting of the full one fails where ranks do not divide the numbers
                    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                    padded = torch.nn.functional.pad(value.flatten(), (0, size * self.mesh.world - value.numel()))
                    safe_set_local_optimizer_state(parameter, padded[size * self.mesh.rank :][:size], key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        for step in self._steps():
            step.fill_(memory[f"{next(iter(self.named))}/step"].item())

    def _make_room(self) -> None:
        """A step of size zero on no image, after which DeepSpeed's optimiser has a state that can be overwritten."""
        objective, *_ = self.engine(*self.objective.nothing(self.engine.device))
        self.engine.backward(objective)
        set_rates(self.engine.optimizer, 0.0)
        self.engine.step()

    def _steps(self) -> list[Tensor]:
        """Adam's counts of steps, of the flat tensors that DeepSpeed made of the parameters."""
        return [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]


def _import_deepspeed() -> Any:
    """DeepSpeed, told not to compile anything: of its operators it would build one that only inference uses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            "parallel.engine = deepspeed: it is not installed here; pip install 'spire-dist[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
