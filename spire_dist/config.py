"""The one typed configuration of a training run: a TOML file, checked here and handed to the constructor that needs it.

Every field states its unit and has a default that works. An unknown key is refused by name with the valid ones. Order of
precedence: defaults, then a preset (`presets.toml`), then the file, then `--set section.key=value`.
"""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from spire_dist.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: immutable, closed, documented by the strings under the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the particles are and how they are read."""

    store: Path = Path("particles.zarr")
    """Particle store written by `spire-dist prep`."""
    resident: Literal["auto", "never", "always"] = "auto"
    """Whether all images are kept in memory: by default where they take up to a quarter of what is free on the GPU, or on a
    node with one rank; else they are streamed from the store. `always`: in the node's memory, a copy for each rank."""
    loader: Literal["local", "ray"] = "local"
    """Who reads what is streamed: this process and its `workers`, or reader actors of a Ray cluster; the same batches."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read for one rank; 0: a thread of its own process. By default a GPU gets 2, a CPU the thread."""


class ConsensusConfig(Section):
    """The homogeneous map that seeds the Gaussians."""

    map: Path | None = None
    """A map (.mrc, protein positive, any box and pixel size) to use instead of back-projecting the particles."""
    padding: int = Field(default=2, ge=1, le=4)
    """Oversampling of the back-projection in Fourier space."""


class LatentConfig(Section):
    """One low-dimensional vector z per particle."""

    kind: Literal["table", "encoder", "encoder+table"] = "table"
    """`table`: a free vector per particle (the paper); `encoder`: a network reads it off the image and pose;
    `encoder+table`: the encoder in stage 1, whose output then starts a table that stage 2 refines."""
    dimension: int = Field(default=8, ge=1, le=64)
    """Numbers per particle."""
    weight: float = Field(default=0.1, ge=0)
    """λ_z of λ_z |z|², in nats per particle: 0.1 is a Gaussian prior of standard deviation 2.2."""
    linear: float = Field(default=0.15, ge=0, lt=1)
    """Share of stage 1, at its beginning, in which a table's latents stay where a linear model of the maps put them, so that
    the Gaussians learn to follow it; 0: they start at random and move from the beginning."""
    encoder_width: int = Field(default=256, ge=8)
    """Units of the encoder's two hidden layers."""
    encoder_box: int = Field(default=32, ge=8)
    """Pixels; images are Fourier-cropped to this box before the encoder."""


class RatesConfig(Section):
    """Adam step sizes at their peak, in the unit of what they move."""

    centres_px: float = Field(default=0.05, gt=0)
    """Pixels per step, centres of Gaussians and anchors."""
    widths: float = Field(default=0.01, gt=0)
    """Relative change of a width per step."""
    amplitudes: float = Field(default=0.02, gt=0)
    """Share of the seed amplitude per step."""
    features: float = Field(default=0.01, gt=0)
    """Feature units per step."""
    networks: float = Field(default=0.005, gt=0)
    """Weight units per step."""
    latents: float = Field(default=0.3, gt=0)
    """Latent units per visit of the particle."""


class StageConfig(Section):
    """Stage 1: every Gaussian moves by itself."""

    gaussians: int = Field(default=2048, ge=1)
    """Number of Gaussians."""
    epochs: float = Field(default=15, gt=0)
    """Passes over the particles."""
    batch: int = Field(default=64, ge=1)
    """Images per step."""
    layers: int = Field(default=1, ge=1)
    """Hidden layers of the per-Gaussian networks (shift and occupancy)."""
    hidden: int = Field(default=32, ge=1)
    """Units per hidden layer."""
    motion_px: float = Field(default=3.0, gt=0)
    """Pixels moved per unit of the shift network's output; its last layer starts at zero."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Passes before the deformation is switched on (the static Gaussians settle first), but where latents start from a linear
    model."""
    final_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the peak step sizes reached at the end of the stage (cosine in between)."""
    tries: int = Field(default=4, ge=0)
    """Latents of a table that all particles of a step try, and take where one explains their image better; 0: none."""
    cut: float = Field(default=4.0, ge=3, le=8)
    """Standard deviations at which a Gaussian ends in the projector."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Norm to which a longer gradient is shortened, that of everything but latents and poses of a table; by default none is."""
    rates: RatesConfig = RatesConfig()
    """Step sizes."""


class HierarchyConfig(StageConfig):
    """Stage 2: Gaussians bound to anchors that move rigidly."""

    gaussians: int = Field(default=8192, ge=1)
    """Number of Gaussians."""
    epochs: float = Field(default=30, gt=0)
    """Passes over the particles."""
    layers: int = Field(default=3, ge=1)
    """Hidden layers of the per-Gaussian networks (shift and occupancy)."""
    hidden: int = Field(default=128, ge=1)
    """Units per hidden layer."""
    motion_px: float = Field(default=1.0, gt=0)
    """Pixels of residual shift per unit of the network's output."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Passes before the deformation is switched on."""
    tries: int = Field(default=2, ge=0)
    """Latents of a table that all particles of a step try, and take where one explains their image better; 0: none."""
    hierarchy: bool = True
    """Whether Gaussians ride on anchors; else each moves by itself, as in stage 1, and parts are only told: to compare with."""
    anchor_layers: int = Field(default=2, ge=1)
    """Hidden layers of the anchor network."""
    anchor_hidden: int = Field(default=128, ge=1)
    """Units per hidden layer of the anchor network."""
    feature_weight: float = Field(default=0.01, ge=0)
    """λ_f of λ_f Σ|df|², in nats over the whole particle set."""
    distil_steps: int = Field(default=300, ge=0)
    """Steps in which the anchors first learn the motion found by stage 1, without images."""


class PartsConfig(Section):
    """Discovery of parts between the stages."""

    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = 3
    """Clusters of Gaussian features: Gaussians that move or appear together (level 1). `auto`: as many as the features of
    stage 1 show."""
    most: int = Field(default=8, ge=1)
    """Clusters that `auto` considers at most."""
    anchors: int = Field(default=5, ge=1)
    """Anchors in all: clusters are split in space, the largest first, until there are this many (level 2)."""

    @field_validator("clusters", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """One line for both kinds of value, where pydantic has one for each."""
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise PydanticCustomError("clusters", "Write a whole number of at least 1, or auto")


class PosesConfig(Section):
    """Refinement of the given poses in stage 2, by a small rotation and shift of every particle."""

    refine: bool = False
    """Whether poses are refined; else they stay as they are given."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of stage 2 after which it begins."""
    rigid_epochs: float = Field(default=4.0, ge=0)
    """Passes over the particles, at its beginning, in which the model rests at z = 0: what wrong poses did to the images was
    taken for motion in stage 1, and would be further."""
    prior_deg: float = Field(default=1.0, gt=0)
    """Degrees about each of three axes: standard deviation of the errors that are expected."""
    prior_px: float = Field(default=2.0, gt=0)
    """Pixels in x and in y, the same of shifts."""
    rate_deg: float = Field(default=0.2, gt=0)
    """Degrees per visit of the particle, Adam's step size at its peak."""
    rate_px: float = Field(default=0.5, gt=0)
    """Pixels per visit of the particle, Adam's step size at its peak."""


class ParallelConfig(Section):
    """How the ranks of a run share the work; may change whenever a run goes on, as may their number."""

    gauss: int = Field(default=1, ge=1)
    """Ranks that share the Gaussians of one model; it divides their number. 1: every rank has all Gaussians and images of its
    own, the best below some 100,000 Gaussians."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """Who adds up gradients and makes steps: `ddp`, each rank all of what it has, or DeepSpeed, which can divide it (ZeRO)."""
    zero: int = Field(default=1, ge=0, le=3)
    """DeepSpeed: what is divided among ranks. 0 nothing, 1 the optimiser's state, 2 gradients too, 3 parameters too."""
    timeout_s: float = Field(default=600, gt=0)
    """Seconds a rank waits for another one before it gives up and names it."""


class JobConfig(Section):
    """What `spire-dist submit` asks Slurm for; a task is a rank. May change whenever a run goes on."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of the job."""
    tasks_per_node: int = Field(default=1, ge=1)
    """Ranks on each node, one for each of its GPUs."""
    gpus_per_task: int = Field(default=1, ge=0, le=1)
    """1, or 0 on a cluster without GPUs and where `sbatch` asks for them in the site's own way (gres)."""
    cpus_per_task: int = Field(default=8, ge=1)
    """CPU cores of a rank."""
    memory_gib: float = Field(default=32, gt=0)
    """GiB of memory on each node."""
    time_min: int = Field(default=24 * 60, ge=1)
    """Minutes of one life of the job. The run saves before they are over and is queued again."""
    partition: str | None = None
    """Slurm's partition; by default the site's."""
    requeues: int = Field(default=100, ge=0)
    """How often the job may be queued again: after time limits, preemptions and crashes, all counted."""
    sbatch: dict[str, str | int | bool] = {}
    """Any further option of sbatch, without its dashes; wins over those above: account = "lab", exclusive = true."""
    setup: list[str] = []
    """Shell lines before the ranks start: module load cuda."""


class OutputConfig(Section):
    """What a run writes while it trains."""

    log_seconds: float = Field(default=10.0, gt=0)
    """Seconds between log lines."""
    save_seconds: float = Field(default=120.0, gt=0)
    """Seconds between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest ones."""
    volumes: int = Field(default=10, ge=2)
    """Maps written at the end, spread over the latent space."""
    report: bool = True
    """Whether maps, tables and the report are written at the end; else `export` and `report` do it when they are wanted."""


class RunConfig(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0)
    """Decides everything random; the same seed, data and machine give the same bits on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA device when there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes all cores this process may use."""
    data: DataConfig = DataConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    latent: LatentConfig = LatentConfig()
    stage1: StageConfig = StageConfig()
    parts: PartsConfig = PartsConfig()
    stage2: HierarchyConfig = HierarchyConfig()
    poses: PosesConfig = PosesConfig()
    parallel: ParallelConfig = ParallelConfig()
    output: OutputConfig = OutputConfig()
    job: JobConfig = JobConfig()
    projector: Literal["auto", "torch", "numba", "triton", "triton-dense"] = "auto"
    """How Gaussians become images; `auto` takes the local splat of the device: numba on a CPU, Triton on a GPU."""
    features: int = Field(default=24, ge=1)
    """Numbers in a Gaussian's feature vector."""
    feature_kind: Literal["learned", "position"] = "learned"
    """`learned`: a Gaussian's features are its own (the paper); `position`: sines and cosines of where it starts, which stay:
    to compare with."""


def load_config(path: Path | None = None, preset: str | None = None, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of a TOML file on top of a preset, with `section.key=value` overrides on top of both.

    Raises ConfigError, one line naming the key, the value and what is valid.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        _merge(values, read_preset(preset))
    if path is not None:
        try:
            _merge(values, tomllib.loads(path.read_text()))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing TOML file") from error
        except ValueError as error:  # also what is no text at all
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides or []:
        _merge(values, _parse_override(override))
    return validate(values, str(path or preset or "configuration"))


def read_preset(name: str) -> dict[str, Any]:
    """The table `name` of presets.toml."""
    presets = tomllib.loads(files("spire_dist").joinpath("presets.toml").read_text())
    if name not in presets:
        raise ConfigError(f"preset: '{name}' does not exist; choose one of {', '.join(presets)}")
    return presets[name]


def validate(values: dict[str, Any], where: str) -> RunConfig:
    """A checked configuration; the first problem found is told in one line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            section: Any = RunConfig
            for part in first["loc"][:-1]:
                section = section.model_fields[str(part)].annotation
            raise ConfigError(f"{where}: unknown key '{key}'; valid here: {', '.join(section.model_fields)}") from error
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{where}: {key} = {first['input']!r}: {message}") from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as TOML; reading it back gives an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration, valid from any folder."""
    data = config.data.model_copy(update={"store": config.data.store.absolute()})
    given = config.consensus.map
    consensus = config.consensus.model_copy(update={"map": given.absolute() if given else None})
    return config.model_copy(update={"data": data, "consensus": consensus})


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write section.key=value, for example stage1.epochs=20")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    nested: Any = parsed
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    """Lay `top` over `base`, section by section."""
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
