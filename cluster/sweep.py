"""`sweep`: train many configurations and keep the best, on Ray Tune. Called by `spire-dist sweep`.

Everything that can be wrong with the file is told before Ray starts. The sweep's folder (`sweep_files.py`) holds all that
counts: whatever is killed, `--resume` goes on, and no report that a trial has made is made again.
"""

import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.ray_cluster import ray_cluster, require_ray
from cluster.sweep_files import RAY, STOP, SWEEP, VIEW, held, read_sweep, write_sweep
from cluster.sweep_results import write_results
from cluster.sweep_space import Space, load_space
from spire_dist.data.order import Order
from spire_dist.data.store import ParticleStore
from spire_dist.data.views import training_view
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import ConfigError, Stopped

CRASHES = 2
"""How often Ray starts a trial again, perhaps elsewhere, whose processes crash."""
SAVE_S = 150.0
"""How long trials may take to save when the sweep is stopped."""
POLL_S = 0.2
SNAPSHOT_S = 2
"""Seconds between Ray's records of which trials there are."""


def sweep(space: Path, out: Path, *, resume: bool = False, ray_address: str | None = None) -> str:
    """Search the space of a TOML file in the folder `out`; returns the table of what was found.

    Raises ConfigError for a file that cannot be used, or a folder that is there (or not, with `resume`); Stopped, exit code 75,
    after Ctrl-C, TERM or USR2, when all trials have saved.
    """
    found, given, out = load_space(space), out, out.absolute()
    _check_folder(found, out, resume)
    store = ParticleStore.open(found.base.data.store)
    _check_trials(found, store)
    address = require_ray(ray_address)
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": str(SNAPSHOT_S)}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints a box of nothing the user asked for
    with ray_cluster(address, cpus=_cores(found, address)):
        _check_room(found)
        write_sweep(out, found.as_dict())
        if found.sweep.metric == "loss":
            kept = store.count - max(1, round(found.sweep.held_out * store.count))
            training_view(store, out / VIEW, kept)
        (out / STOP).unlink(missing_ok=True)
        with _stopping_all(out) as asked:
            _search(found, out)
            if asked:
                raise Stopped(f"stopped by {asked[0].name}; go on with: spire-dist sweep {space} {given} --resume")
    return write_results(given, found)


def _check_folder(space: Space, out: Path, resume: bool) -> None:
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out}: is there already; go on with it by --resume, or name a new folder")
        return
    if not (out / SWEEP).exists():
        raise ConfigError(f"{out}: no sweep to go on with ({SWEEP} is missing); leave --resume out to begin one")
    old, new = _flat(read_sweep(out)), _flat(space.as_dict())
    for key in new.keys() | old.keys():
        if key != "path" and old.get(key) != new.get(key):
            raise ConfigError(
                f"{space.path}: {key.removeprefix('base.')} = {new.get(key)}: {out} was begun with {old.get(key)}; use that, "
                "or begin a new folder"
            )


def _flat(values: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {above: values}
    return {
        key: v for name, part in values.items() for key, v in _flat(part, f"{above}.{name}" if above else name).items()
    }


def _check_trials(space: Space, store: ParticleStore) -> None:
    """Raise ConfigError for the first drawn configuration that cannot be trained."""
    if not store.has_poses:
        raise ConfigError(f"data.store = {store.path}: prepared without poses; prepare it from a file with poses")
    for settings in space.draws():
        config = space.config(settings)
        for stage in (config.stage1, config.stage2):
            Order(store.count, store.images_per_chunk, stage.batch, config.seed).portion(0, 0, space.sweep.ranks)
        if config.data.loader == "ray":
            raise ConfigError('data.loader = "ray": trials of a sweep read for themselves; leave it out')


def _cores(space: Space, address: str) -> int | None:
    """Cores that a cluster of this machine is to offer; none: all. They limit a population, whose trials all begin."""
    plan = space.sweep
    if plan.search != "pbt" or plan.at_once is None:
        return None
    if address != "local":
        raise ConfigError(f'{space.path}: sweep.at_once = {plan.at_once}: on a cluster that runs, search = "pbt" takes all the '
                          "room there is; leave it out")  # fmt: skip
    return plan.at_once * plan.ranks * plan.cpus


def _check_room(space: Space) -> None:
    """Raise ConfigError where no node of the cluster could ever hold one trial: Ray would wait for it for ever."""
    import ray

    wanted = {"CPU": space.sweep.ranks * space.sweep.cpus, "GPU": space.sweep.ranks * space.sweep.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(kind, 0) >= count for kind, count in wanted.items()) for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ConfigError(
            f"{space.path}: sweep: a trial wants {wanted['CPU']} cores and {wanted['GPU']} GPUs of one node, the cluster's "
            f"have {there}; lower ranks, cpus or gpus"
        )


def _search(space: Space, out: Path) -> None:
    """Let Ray run all trials, or what is left of them."""
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    from cluster.trial import PERMILLE, Explore, Halving, Progress, Trial, folder_name

    logging.getLogger("ray").setLevel(logging.ERROR)
    plan = space.sweep
    random.seed(plan.seed)  # with which Ray chooses whom a population's worst go on from
    scheduler = None
    if plan.search == "asha":
        scheduler = Halving(out, plan.metric, plan.mode, plan.grace, plan.reduction)
    elif plan.search == "pbt":
        scheduler = PopulationBasedTraining(
            PERMILLE, plan.metric, plan.mode, 1000 * plan.interval, custom_explore_fn=Explore(space), log_config=False,
            synch=True,
        )  # fmt: skip
    room: dict[str, float] = {"CPU": plan.ranks * plan.cpus, "GPU": plan.ranks * plan.gpus}
    trainable = tune.with_resources(Trial, tune.PlacementGroupFactory([room]))
    if tune.Tuner.can_restore(str(out / RAY)):
        tuner = tune.Tuner.restore(str(out / RAY), trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={
                "out": str(out),
                "code": str(Path(__file__).parents[1]),
                "settings": tune.grid_search(space.draws()),
            },
            tune_config=tune.TuneConfig(
                metric=None if scheduler else plan.metric,
                mode=None if scheduler else plan.mode,
                scheduler=scheduler,
                max_concurrent_trials=None if plan.search == "pbt" else plan.at_once,
                reuse_actors=True,
                trial_dirname_creator=folder_name,
            ),
            run_config=tune.RunConfig(
                name=RAY,
                storage_path=str(out),
                verbose=0,
                callbacks=[Progress(plan.metric, plan.mode, out)],
                failure_config=tune.FailureConfig(max_failures=CRASHES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=3),
            ),
        )
    tuner.fit()


@contextmanager
def _stopping_all(out: Path) -> Iterator[list[signal.Signals]]:
    """Inside the block a stop signal makes all trials save and leave, on whatever node, and then Ray's loop end.

    The list that is yielded has the signal in it then. A second Ctrl-C interrupts at once.
    """
    asked: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            (out / STOP).touch()
            print("stopping: the trials that run save", file=sys.stderr, flush=True)
            asked.append(signal.Signals(number))

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Ray's loop has begun
    over = threading.Event()
    ending = threading.Thread(target=_end_when_saved, args=(out, asked, over), daemon=True)
    ending.start()
    try:
        yield asked
    finally:
        over.set()
        ending.join()
        for number, handler in (before | {signal.SIGUSR1: previous}).items():
            signal.signal(number, handler)


def _end_when_saved(out: Path, asked: list[signal.Signals], over: threading.Event) -> None:
    """Once a stop is asked for and no trial holds its run directory any more, end Ray's loop, which kills what still runs.

    It takes SIGUSR1 as a wish to end and to keep what is unfinished, and hears it only once it has begun: hence repeated.
    """
    while not asked:
        if over.wait(POLL_S):
            return
    until = time.monotonic() + SAVE_S
    while time.monotonic() < until and any(held(run) for run in (out / "trials").iterdir()):
        if over.wait(POLL_S):
            return
    while not over.is_set():
        os.kill(os.getpid(), signal.SIGUSR1)
        over.wait(POLL_S)
