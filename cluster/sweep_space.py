"""The file that `spire-dist sweep` reads: a configuration, the fields that vary, and how they are searched.

    base = "my.toml"            # or a table [base], or neither: the defaults; preset = "demo" goes underneath
    [sweep]                     # SweepConfig
    [space]                     # field = {log = [a, b]}, {range = [a, b]}, {int = [a, b]} or {choice = [...]}

All configurations are drawn, and checked, before anything starts. Called by `sweep.py`; knows nothing of Ray.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field, ValidationError

from cluster.sweep_files import VIEW
from spire_dist.config import RunConfig, Section, dump_config, load_config, read_preset, validate, with_absolute_paths
from spire_dist.errors import ConfigError

Kind = Literal["log", "range", "int", "choice"]
Settings = dict[str, Any]
"""Field of the configuration ("stage1.rates.latents") -> value."""

MAY_CHANGE_IN_TRAINING = ("latent.weight", "stage2.feature_weight", "stage1.rates", "stage2.rates", "stage1.clip_norm",
                          "stage2.clip_norm", "stage1.final_rate", "stage2.final_rate")  # fmt: skip
"""What population-based search may vary: neither shapes nor the meaning of what is learnt nor the number of steps."""
PERTURBATION = 1.25
"""Factor, or its inverse, by which population-based search changes a number; of a range, this share less one."""
REDRAWN = 0.25
"""Probability with which it draws a new one instead."""
LAST_RUNG = 0.95
"""Share of the training after which nothing is decided any more: to end it costs little."""


class SweepConfig(Section):
    """How a space is searched."""

    trials: int = Field(default=16, ge=2)
    """Configurations."""
    search: Literal["asha", "pbt", "random"] = "asha"
    """`asha`: trials that are behind stop early; `pbt`: a population, whose worst go on from the best with changed settings;
    `random`: each to its end."""
    metric: Literal["loss", "auc"] = "loss"
    """`loss` of particles that were kept from training, to be small; `auc` of the FSC against known maps, to be large."""
    truth: Path | None = None
    """Folder of the true maps, as `spire-dist evaluate` takes it; for `auc`."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of the particles that no trial trains on; for `loss`."""
    grace: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training before which asha stops no trial."""
    reduction: float = Field(default=3.0, ge=1.5)
    """Of so many trials that reach a rung asha lets one go on; the rungs are at grace, grace × reduction, ..."""
    interval: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training between two exchanges of pbt."""
    budget: float | None = Field(default=None, gt=0)
    """Whole trainings' worth of steps after which no further trial begins."""
    ranks: int = Field(default=1, ge=1)
    """Processes of one trial, all on one node."""
    cpus: int = Field(default=1, ge=1)
    """Cores of each."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of each."""
    at_once: int | None = Field(default=None, ge=1)
    """Trials at the same time; by default as many as there is room for."""
    seed: int = Field(default=0, ge=0)
    """Decides what is drawn."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which values of the metric are good."""
        return "min" if self.metric == "loss" else "max"

    @property
    def worst(self) -> float:
        """What a trial that fails is taken to have reached."""
        return math.inf if self.metric == "loss" else -math.inf

    def shares(self) -> list[float]:
        """At which shares of the training a trial reports; the last is 1."""
        if self.search == "random":
            return [1.0]
        if self.search == "pbt":
            return [*(n * self.interval for n in range(1, math.ceil(LAST_RUNG / self.interval))), 1.0]
        rungs = [self.grace]
        while rungs[-1] * self.reduction <= LAST_RUNG:
            rungs.append(rungs[-1] * self.reduction)
        return [*rungs, 1.0]


@dataclass(frozen=True)
class Varied:
    """One field and where its values come from."""

    field: str
    kind: Kind
    values: tuple[Any, ...]
    """Both ends, or the choices."""

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value: uniform, or uniform in the logarithm."""
        if self.kind == "choice":
            return self.values[rng.integers(len(self.values))]
        low, high = self.values
        if self.kind == "int":
            return int(rng.integers(low, high + 1))
        if self.kind == "log":
            return float(min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high))
        return float(rng.uniform(low, high))

    def perturb(self, value: Any, rng: np.random.Generator) -> Any:
        """A value near another one, within the space: the next choice, or a quarter more or less."""
        up = bool(rng.integers(2))
        if rng.random() < REDRAWN:
            return self.draw(rng)
        if self.kind == "choice":
            place = self.values.index(value) + (1 if up else -1)
            return self.values[min(max(place, 0), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "log":
            value = value * PERTURBATION if up else value / PERTURBATION
        elif self.kind == "range":
            value += (high - low) * (PERTURBATION - 1) * (1 if up else -1)
        else:
            value += max(1, round(value * (PERTURBATION - 1))) * (1 if up else -1)
        return min(max(value, low), high)


@dataclass(frozen=True)
class Space:
    """A whole file, checked."""

    sweep: SweepConfig
    base: RunConfig
    varied: tuple[Varied, ...]
    path: Path

    def config(self, settings: Settings) -> RunConfig:
        """The base with some fields changed. Raises ConfigError for a value that a field does not take."""
        values = self.base.model_dump()
        for field, value in settings.items():
            *sections, key = field.split(".")
            section = values
            for name in sections:
                section = section[name]
            section[key] = value
        return validate(values, f"{self.path}: space")

    def draws(self) -> list[Settings]:
        """The configurations of all trials; of more trials the first are the same."""
        rng = np.random.default_rng(self.sweep.seed)
        return [{one.field: one.draw(rng) for one in self.varied} for _ in range(self.sweep.trials)]

    def perturbed(self, settings: Settings, number: int) -> Settings:
        """Settings near others; `number` counts the calls of a sweep."""
        rng = np.random.default_rng((self.sweep.seed, number))
        return {one.field: one.perturb(settings[one.field], rng) for one in self.varied}

    def trial_config(self, out: Path, settings: Settings) -> RunConfig:
        """What a trial is trained with: in the sweep's folder `out`, on its share of the machine."""
        config, sweep = self.config(settings), self.sweep
        store = out / VIEW if sweep.metric == "loss" else config.data.store
        data: dict[str, Any] = {"store": store}
        if sweep.gpus == 0 and config.data.resident == "auto":
            data["resident"] = "never"  # the system's cache of files holds the images, once for all trials
        changes: dict[str, Any] = {"data": config.data.model_copy(update=data), "threads": sweep.cpus}
        if sweep.gpus == 0 and config.device == "auto":
            changes["device"] = "cpu"
        return config.model_copy(update=changes)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "sweep": self.sweep.model_dump(mode="json"),
            "base": self.base.model_dump(mode="json"),
            "space": {one.field: {one.kind: list(one.values)} for one in self.varied},
            "path": str(self.path),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Space":
        """What `as_dict` gave."""
        varied = [
            Varied(name, kind, tuple(values))
            for name, about in found["space"].items()
            for kind, values in about.items()
        ]
        base, sweep = RunConfig.model_validate(found["base"]), SweepConfig.model_validate(found["sweep"])
        return cls(sweep, base, tuple(varied), Path(found["path"]))


def load_space(path: Path) -> Space:
    """Read and check a sweep's file. Raises ConfigError, one line, for the first thing wrong with it.

    Paths in it start from the present folder, as those of a configuration do; that of `base` from the file's.
    """
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing TOML file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    known = ("base", "preset", "sweep", "space")
    for key in found:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}'; valid here: {', '.join(known)}")
    sweep = _sweep_config(found.get("sweep", {}), path)
    base = with_absolute_paths(_base(found, path))
    varied = tuple(_varied(field, about, path) for field, about in _flat(found.get("space", {})).items())
    if not varied:
        raise ConfigError(
            f'{path}: nothing varies; add for example [space] "stage1.rates.latents" = {{log = [0.03, 1]}}'
        )
    space = Space(sweep, base, varied, path)
    for one in varied:
        _check_field(space, one)
    return space


def _sweep_config(values: Any, path: Path) -> SweepConfig:
    try:
        sweep = SweepConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("sweep", *first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{path}: unknown key '{key}'; valid: {', '.join(SweepConfig.model_fields)}") from error
        raise ConfigError(f"{path}: {key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    if sweep.metric == "auc" and sweep.truth is None:
        raise ConfigError(f'{path}: sweep.metric = "auc": the true maps are missing; set sweep.truth = "FOLDER"')
    truth = sweep.truth.absolute() if sweep.truth else None
    if truth is not None and not truth.is_dir():
        raise ConfigError(f"{path}: sweep.truth = {truth}: no such folder; give one with vols/ and labels")
    return sweep.model_copy(update={"truth": truth})


def _base(found: dict[str, Any], path: Path) -> RunConfig:
    base, preset = found.get("base"), found.get("preset")
    if isinstance(base, str):
        return load_config(path.parent / base, preset)
    if base is not None and not isinstance(base, dict):
        raise ConfigError(f"{path}: base = {base!r}: write the name of a configuration file, or a table [base]")
    values = read_preset(preset) if preset is not None else {}
    return validate(_laid_over(values, base or {}), f"{path}: base")


def _laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = under | over
    return both | {
        key: _laid_over(under[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }


def _flat(table: Any, above: str = "") -> dict[str, Any]:
    """Fields by their whole names: `stage1.epochs = {...}` without quotes is a table in a table."""
    if not isinstance(table, dict):
        return {above: table}
    if above and (not table or set(table) & set(get_args(Kind))):
        return {above: table}
    return {
        field: about
        for key, part in table.items()
        for field, about in _flat(part, f"{above}{'.' * bool(above)}{key}").items()
    }


def _varied(field: str, about: Any, path: Path) -> Varied:
    ways = "{log = [0.03, 1]}, {range = [0, 1]}, {int = [8, 64]} or {choice = [1, 2, 3]}"
    if not isinstance(about, dict) or len(about) != 1 or not set(about) <= set(get_args(Kind)):
        raise ConfigError(f"{path}: space: {field} = {about!r}: write {ways}")
    [(kind, values)] = about.items()
    number = int if kind == "int" else int | float
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}: space: {field}: {kind} = {values!r}: write {ways}")
    if kind == "choice":
        return Varied(field, kind, tuple(values))
    good = len(values) == 2 and all(
        isinstance(v, number) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not good or values[0] >= values[1] or (kind == "log" and values[0] <= 0):
        wanted = {"log": "two numbers above 0", "range": "two numbers", "int": "two whole numbers"}[kind]
        raise ConfigError(f"{path}: space: {field}: {kind} = {values!r}: give {wanted}, the smaller one first")
    return Varied(field, kind, tuple(values))


def _check_field(space: Space, one: Varied) -> None:
    """Raise ConfigError for a field that does not exist or cannot vary, and for values it does not take."""
    from spire_dist.training.run import FREE_TO_CHANGE  # with torch, which the actors of Ray need not load

    section: Any = RunConfig
    for place, name in enumerate(parts := one.field.split(".")):
        fields = getattr(section, "model_fields", {})
        if name not in fields:
            here = ".".join(parts[:place]) or "the configuration"
            valid = f"valid in {here}: {', '.join(fields)}" if fields else f"{here} is a field itself"
            raise ConfigError(f"{space.path}: space: unknown key '{one.field}'; {valid}")
        section = fields[name].annotation
    where = f"{space.path}: space: {one.field}"
    if hasattr(section, "model_fields"):
        raise ConfigError(f"{where}: is a section; name one of its fields: {', '.join(section.model_fields)}")
    if parts[0] in FREE_TO_CHANGE:
        raise ConfigError(f"{where}: has no part in the result; vary something else")
    if one.kind in ("log", "range") and float not in (section, *get_args(section)):
        raise ConfigError(f"{where}: takes no fractions; write int or choice instead of {one.kind}")
    for value in one.values:
        space.config({one.field: value})
    allowed = any(one.field == name or one.field.startswith(f"{name}.") for name in MAY_CHANGE_IN_TRAINING)
    if space.sweep.search == "pbt" and not allowed:
        raise ConfigError(
            f'{where}: cannot change while a model trains, as search = "pbt" does; it varies '
            f"{', '.join(MAY_CHANGE_IN_TRAINING)}; use asha for the others"
        )


def best_toml(space: Space, settings: Settings, note: str) -> str:
    """A configuration file for `spire-dist train`, with a first line that says where it comes from."""
    return f"# {note}\n{dump_config(space.config(settings))}"
