"""The methods that can be compared, by name: `methods.toml`."""

import json
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spire_dist.config import RunConfig, load_config
from spire_dist.errors import ConfigError


@dataclass(frozen=True)
class RivalProgram:
    """A program to compare with."""

    label: str
    packages: str
    """What pip installs, with the versions that were tried."""
    runs_on: str
    """The package that does its arithmetic."""

    @property
    def install(self) -> str:
        """What to do where it is missing."""
        return f"make an environment with it: python3 -m venv PEER && PEER/bin/pip install {self.packages}, then give"


RIVALS = {
    "cryodrgn": RivalProgram("cryoDRGN", "cryodrgn==4.3.1 torch==2.13.0", "torch"),
    "recovar": RivalProgram("RECOVAR", "recovar==0.4.5 torch==2.13.0", "jax"),
}
"""By the name of their console script."""


@dataclass(frozen=True)
class Own:
    """One of ours: `starting` settings that --set may change, `fixed` ones that make the method."""

    name: str
    label: str
    starting: list[str]
    fixed: list[str]

    def config(self, store: Path, preset: str, settings: Sequence[str], seed: int) -> RunConfig:
        """The settings of a run on `store`. Raises ConfigError."""
        where = [f"data.store={json.dumps(str(store.resolve()))}", f"seed={seed}"]
        return load_config(preset=preset, overrides=[*self.starting, *settings, *self.fixed, *where])


@dataclass(frozen=True)
class Rival:
    """A program of `RIVALS` with these options of its training."""

    name: str
    label: str
    program: str
    options: list[str]


Method = Own | Rival


def read_methods() -> dict[str, Method]:
    """All methods in the order in which tables show them, ours first."""
    tables = tomllib.loads(files("spire_dist").joinpath("comparison/methods.toml").read_text())
    own = [
        Own(name, row["label"], list(overrides(row.get("starting", {}))), list(overrides(row.get("fixed", {}))))
        for name, row in tables["own"].items()
    ]
    rivals = [Rival(name, row["label"], row["program"], row["options"]) for name, row in tables["rival"].items()]
    return {method.name: method for method in (*own, *rivals)}


def choose_methods(names: Sequence[str] | None, programs: Collection[str]) -> list[Method]:
    """The methods of these names; of none given all of ours, and the rivals of `programs`, which can run.

    Raises ConfigError for a name that is not known, or for a rival that cannot run.
    """
    known = read_methods()
    if names is None:
        return [method for method in known.values() if isinstance(method, Own) or method.program in programs]
    for name in names:
        if name not in known:
            raise ConfigError(f"--methods {name}: no such method; choose among {','.join(known)}")
        method = known[name]
        if isinstance(method, Rival) and method.program not in programs:
            option = f"--{method.program}"
            raise ConfigError(
                f"--methods {name}: without {option}; {RIVALS[method.program].install} {option} PEER/bin/python"
            )
    return [known[name] for name in dict.fromkeys(names)]


def read_seeds(text: str) -> list[int]:
    """0,1,2 as numbers. Raises ConfigError."""
    try:
        seeds = [int(item) for item in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: not whole numbers from 0, separated by commas, for example 0,1,2")
    return list(dict.fromkeys(seeds))


def overrides(table: dict[str, Any], above: str = "") -> Iterator[str]:
    """A table of settings as `section.key=value`."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from overrides(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value)}"
