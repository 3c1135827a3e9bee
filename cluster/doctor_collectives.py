"""What a rank's child of `doctor` does: torch's view of the GPUs, then sums over all ranks by gloo and NCCL, timed.

A process of its own, because a GPU driver or a collective that hangs can only be ended from outside. Each step prints a line of
JSON when it is done, so that what was found before a hang is known.
"""

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cluster.doctor_machine import torch_facts

TOGETHER_S = 20.0
"""How long a rank waits for the others."""
NUMBERS = 4 * 2**20
"""16 MiB, as many as the gradients of a middle-sized model."""
REPEATS = 3


def main() -> None:
    """Rank, world, local rank and place of the meeting are in the environment."""
    facts = torch_facts()
    _tell("facts", facts)
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    patience = timedelta(seconds=TOGETHER_S)
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, patience, wait_for_workers=False
    )
    try:
        start = time.monotonic()
        dist.init_process_group(
            "gloo", store=PrefixStore("doctor-gloo", store), rank=rank, world_size=world, timeout=patience
        )
        _tell("gloo", _timed(None, torch.device("cpu"), time.monotonic() - start))
        all_facts: list = [None] * world
        dist.all_gather_object(all_facts, {"nccl": "nccl" in facts, "gpus": len(facts["gpus"])})
        if all(one["nccl"] and one["gpus"] for one in all_facts):
            device = torch.device("cuda", local_rank if local_rank < len(facts["gpus"]) else 0)
            torch.cuda.set_device(device)
            start = time.monotonic()
            group = dist.new_group(backend="nccl", timeout=patience)
            assert isinstance(group, dist.ProcessGroup)  # as everyone is in it
            _tell("nccl", _timed(group, device, time.monotonic() - start))
        dist.barrier()  # nobody leaves before all have done
    except RuntimeError as error:
        _tell("error", next(iter(str(error).splitlines()), type(error).__name__)[:200])
    sys.stdout.flush()
    os._exit(0)  # what a failed collective has left would hold the process up


def _timed(group: dist.ProcessGroup | None, device: torch.device, meeting_s: float) -> dict[str, float | bool]:
    """Whether a sum over all ranks is right, its milliseconds for one number, and GB/s of each rank's link for many."""
    world = dist.get_world_size()
    one = torch.full((1,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(one, group=group)  # the first makes the connections
    right = one.item() == world * (world + 1) / 2
    latency, many = [], []
    for numbers, seconds in ((1, latency), (NUMBERS, many)):
        data = torch.ones(numbers, device=device)
        for _ in range(REPEATS):
            start = time.monotonic()
            dist.all_reduce(data, group=group)
            data[0].item()  # on a GPU: wait until it is done
            seconds.append(time.monotonic() - start)
    moved = 2 * (world - 1) / world * 4 * NUMBERS  # what each rank must send in any all-reduce
    return {
        "right": right,
        "meeting_s": meeting_s,
        "latency_ms": 1e3 * min(latency),
        "gb_per_s": moved / min(many) / 1e9,
    }


def _tell(step: str, found: object) -> None:
    print(json.dumps({step: found}), flush=True)


if __name__ == "__main__":
    main()
