"""What a trial of a sweep does from one report to the next: train to a share of the training, look how good it is, say so.

    python -m cluster.trial_process OUT NUMBER SHARE

A process of its own, or one for each rank, started by `trial.py`; it needs nothing of Ray. A trial is a run directory,
OUT/trials/0007, which goes on from its checkpoint. Each report is a line of its reports.jsonl.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cluster.sweep_files import (
    CONFIG,
    LOG,
    ORIGIN,
    PARENT,
    STARTS,
    STOP,
    held,
    read_reports,
    read_sweep,
    trial_folder,
    write_reports,
)
from cluster.sweep_space import SweepConfig
from spire_dist.config import RunConfig, load_config
from spire_dist.data.store import ParticleStore
from spire_dist.distributed.checkpoint import ALONE, read_facts
from spire_dist.distributed.launch import launch
from spire_dist.distributed.stopping import STOP_SIGNALS
from spire_dist.errors import SpireError, Stopped
from spire_dist.training.objective import Objective
from spire_dist.training.run import FinishedRun, write_status
from spire_dist.training.saving import State, read_state
from spire_dist.training.saving import mixture_from_state as mixture_of
from spire_dist.training.train import all_latents, open_source, train
from spire_dist.training.validation import held_out_loss

CONFORMATIONS = 10
"""For `auc`: so many maps are compared, evenly spaced."""
RESTARTS = 2
"""How often several ranks are started again after a crash."""
LOCK_WAIT_S = 60.0
POLL_S = 0.5


def report(out: Path, number: int, share: float) -> None:
    """Train a trial to a share of its training, and add a report of how good it then is; on the first rank."""
    run, about = trial_folder(out, number), read_sweep(out)
    sweep = SweepConfig.model_validate(about["sweep"])
    config = load_config(run / CONFIG)
    training = ParticleStore.open(config.data.store)
    steps = steps_of(config, training.count)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        _wait_for_an_earlier_life(run)
    began = time.monotonic()
    train_until(config, run, round(share * sum(steps)) if share < 1 else None, steps[0])
    if not first:
        return
    trained_s = time.monotonic() - began
    state = read_state(run)
    assert state is not None
    if share < 1:
        told = f"at {100 * share:.0f} % of the training, for the sweep to decide"
        write_status(run, "stopped", state.stage, state.step, told)
    began = time.monotonic()
    if sweep.metric == "auc":
        value = _auc(run, state, config, training, sweep)
    else:
        whole = ParticleStore.open(about["base"]["data"]["store"])
        value = held_out_loss(state, config, whole, training.count, _device(config))
    done = {
        "share": share,
        sweep.metric: value,
        "steps": state.step + (steps[0] if state.stage == 2 else 0),
        "train_s": round(trained_s, 2),
        "look_s": round(time.monotonic() - began, 2),
        "time": round(time.time(), 2),
        **json.loads((run / ORIGIN).read_text()),
    }
    write_reports(run, [*read_reports(run), done])


def steps_of(config: RunConfig, particles: int) -> tuple[int, int]:
    """Steps of the two stages."""
    first, second = (round(stage.epochs * -(-particles // stage.batch)) for stage in (config.stage1, config.stage2))
    return first, second


def train_until(config: RunConfig, run: Path, until: int | None, first_stage: int) -> None:
    """Train until so many steps of both stages are done and saved, or to the end. `first_stage` of them are stage 1's.

    Raises what `train` raises, Stopped where somebody else wants the run to stop.
    """
    facts = read_facts(run)
    done = facts["step"] + (first_stage if facts["stage"] == 2 else 0) if facts else 0
    if until is not None and done >= max(until, 1):
        return
    with _stopping_itself(None if until is None else max(until, 1) - done) as reached:
        try:
            train(config, run)
        except SpireError as error:
            if error.exit_code != Stopped.exit_code or not reached:
                raise


@contextmanager
def _stopping_itself(steps: int | None) -> Iterator[list[bool]]:
    """Inside the block training stops, as it does on request, after so many steps: on every rank after the same one.

    The list that is yielded has something in it then. A step is a call of the objective; DeepSpeed makes one more, of nothing.
    """
    seen, reached = 0, list[bool]()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal seen
        if isinstance(module, Objective) and (inputs[0].total > 1 or len(inputs[0].rows)):
            seen += 1
            if seen == steps:
                reached.append(True)
                signal.raise_signal(signal.SIGUSR2)

    hook = register_module_forward_pre_hook(count)
    try:
        yield reached
    finally:
        hook.remove()


def _auc(run: Path, state: State, config: RunConfig, store: ParticleStore, sweep: SweepConfig) -> float:
    """Mean area under the FSC of maps at the conformations' latents, inside the truth's mask where there is one."""
    from spire_dist.results.evaluate import score  # with much that other sweeps need not load

    mixture = mixture_of(state, config).eval()
    if state.latents is not None:
        latents = state.latents[:, 0]
    else:
        latents = all_latents(run, open_source(config, store, torch.device("cpu")), config, ALONE)
    parts = np.zeros(len(mixture.gaussians.offsets), dtype=np.int64)
    seen = FinishedRun(run, config, store, mixture, state.stage, latents.numpy(), parts)
    assert sweep.truth is not None
    scores = score(seen, sweep.truth, conformations=CONFORMATIONS, images=0)[0]["scores"]
    return scores.get("per_conformation/model_masked", scores["per_conformation/model_unmasked"])["mean"]


def _device(config: RunConfig) -> torch.device:
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _wait_for_an_earlier_life(run: Path) -> None:
    """Where a sweep was killed and goes on at once, the trial's old process may still be saving."""
    until = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < until and held(run):
        time.sleep(POLL_S)


def _leave_when_told(parent: int, stop: Path) -> None:
    """Stop this process, which then saves, where the one that started it is gone or the sweep is to stop."""
    while os.getppid() == parent and not stop.exists():
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """`python -m cluster.trial_process OUT NUMBER SHARE`; exit codes as those of `spire-dist train`."""
    out, number, share = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run, ranks = trial_folder(out, number), read_sweep(out)["sweep"]["ranks"]
    # Before training, which has a handler of its own, nothing is to be saved. Ray's processes are started deaf to signals.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(Stopped.exit_code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Named by it, because it may be gone before this line is reached; ranks have their launcher.
    parent = os.getppid() if "RANK" in os.environ else int(os.environ.get(PARENT, os.getppid()))
    threading.Thread(target=_leave_when_told, args=(parent, out / STOP), daemon=True).start()
    if "RANK" not in os.environ:
        log = os.open(run / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(log, stream)
        with open(run / STARTS, "a") as starts:
            host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            starts.write(
                json.dumps({"time": round(time.time(), 2), "host": host, "pid": os.getpid(), "to": share}) + "\n"
            )
        if ranks > 1:
            sys.exit(launch([sys.executable, "-m", "cluster.trial_process", *sys.argv[1:]], ranks, RESTARTS))
    try:
        report(out, number, share)
    except SpireError as error:
        if str(error):
            print(f"spire-dist: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
