"""Adam with a step size for every kind of parameter, and its state by the parameters' names."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spire_dist.config import RatesConfig

BETAS = (0.9, 0.99)
KIND = {"offsets": "centres_px", "anchor_centres": "centres_px", "log_widths": "widths", "amplitudes": "amplitudes",
        "features": "features", "anchor_features": "features"}  # fmt: skip
"""Which step size moves a parameter, by the end of its name; all others are weights of networks."""
Named = dict[str, nn.Parameter]


def split(named: Named) -> tuple[Named, Named]:
    """(a rank's Gaussians, what every rank has)."""
    own = {name: parameter for name, parameter in named.items() if ".gaussians." in name}
    return own, {name: parameter for name, parameter in named.items() if name not in own}


def adam(named: Named, rates: RatesConfig) -> torch.optim.Adam:
    """Adam with one step size per kind of parameter."""
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        kinds.setdefault(KIND.get(name.split(".")[-1], "networks"), []).append(parameter)
    groups = [{"params": members, "lr": getattr(rates, kind)} for kind, members in kinds.items()]
    optimiser = torch.optim.Adam(groups, betas=BETAS, fused=True)
    for group in optimiser.param_groups:
        group["peak"] = group["lr"]
    return optimiser


def set_rates(optimiser: Any, factor: float) -> None:
    """Step sizes at a share of their peak."""
    for group in optimiser.param_groups:
        group["lr"] = factor * group["peak"]


def adam_memory(optimiser: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """State by name; nothing before the first step."""
    return {f"{name}/{key}": value for name, p in named.items() for key, value in optimiser.state.get(p, {}).items()}


def remember_adam(optimiser: torch.optim.Optimizer, named: Named, memory: Mapping[str, Tensor]) -> None:
    """Put state back; torch's own loading knows where each number must lie."""
    if not memory:
        return
    numbers = {id(p): number for number, p in enumerate(_members(optimiser))}
    keys = ("step", "exp_avg", "exp_avg_sq")
    state = {numbers[id(p)]: {key: memory[f"{name}/{key}"] for key in keys} for name, p in named.items()}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _members(optimiser: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimiser.param_groups for parameter in group["params"])
