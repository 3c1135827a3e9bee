"""The CryoBench benchmark's sets as settings of `simulate`; `recipes.toml` has them. Called by `spire-dist simulate --recipe`.

simulate(out, model=pdb_1hzh, **recipe("igg-1d", scale=0.1))
"""

import tomllib
from importlib.resources import files
from typing import Any

from spire_dist.errors import ConfigError


def recipe(name: str, scale: float = 1.0, models: int = 1) -> dict[str, Any]:
    """Arguments of `simulate` for a benchmark set with `scale` (0 to 1) of its images; its states stay.

    `models` is the number of atomic models at hand, which a mixture's images are counted by. Raises ConfigError.
    """
    tables = tomllib.loads(files("spire_dist").joinpath("simulation/recipes.toml").read_text())
    common = tables.pop("common")
    if name not in tables:
        raise ConfigError(f"recipe: {name!r} does not exist; choose one of {', '.join(tables)}")
    if not 0 < scale <= 1:
        raise ConfigError(f"scale: {scale}; give a share of the images above 0, at most 1")
    settings = common | tables[name]
    if models == 0:
        raise ConfigError(f"recipe {name}: no model given; name {settings['needs']} with --model")
    del settings["needs"]
    full = settings.pop("images", 0) or settings.pop("images_per_model") * models
    groups = settings.pop("groups", {})
    if "lacks" in settings:
        settings["omit"] = [",".join(groups[group] for group in state) for state in settings.pop("lacks")]
    return settings | {"particles": max(1, round(scale * full)), "recipe": name, "scale": scale}
