"""Checks of one machine: Python, versions, which `cluster` is imported, GPUs, NCCL, limits of memory and files."""

import hashlib
import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.doctor_tools import ROOT, Check, UnansweredError, in_child, last_line, run_command, verdict

DISTRIBUTION = "spire-dist"
EXTRAS = {"deepspeed": "parallel.engine = 'deepspeed'", "ray": "sweeps and data.loader = 'ray'", "slurm": "submit"}
"""Optional installations and what needs them."""
SHOWN = ("torch", "numpy", "zarr", "numba", "deepspeed", "ray", "submitit")
"""Whose versions the table names."""
TORCH_S = 60.0
"""Starting torch from a cold network file system takes long."""
OPEN_FILES = 1024
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_GIB = 1.0


# ---- Python and packages


def python(least: str | None = None) -> list[Check]:
    """Whether this Python is new enough, by default by what the installed distribution asks for."""
    found = f"{platform.python_version()}, {sys.prefix}"
    if least is None:
        try:
            least = metadata(DISTRIBUTION)["Requires-Python"] or ">=3.11"
        except PackageNotFoundError:
            least = ">=3.11"
    if platform.python_version() in SpecifierSet(least, prereleases=True):
        return [Check("Python", "OK", found)]
    return [Check("Python", "MISS", f"{found}; needs {least}", "make an environment with a newer Python")]


def packages(wanted: frozenset[str] = frozenset()) -> list[Check]:
    """Whether what is installed is in the ranges of pyproject.toml; `wanted` are the extras that must be there."""
    try:
        needed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        fix = f"pip install -e {ROOT}"
        return [Check("packages", "WARN", f"{DISTRIBUTION} is not installed, so no versions are asked for", fix)]
    wrong, absent = [], set[str]()
    for need in needed:
        extra = next((name for name in EXTRAS if need.marker and not need.marker.evaluate({"extra": ""})
                      and need.marker.evaluate({"extra": name})), None)  # fmt: skip
        if extra is None and need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        installed = _version(need.name)
        if installed is None and extra:
            absent.add(extra)
        elif installed is None or not need.specifier.contains(installed, prereleases=True):
            wrong.append(
                (f"{need.name} {installed or 'is not installed'} (needs {need.specifier})", str(need).split(";")[0])
            )
    shown = ", ".join(f"{name} {found}" for name in SHOWN if (found := _version(name)))
    checks = [Check("packages", "OK", shown)]
    if wrong:
        fix = "pip install " + " ".join(f"'{requirement.strip()}'" for _, requirement in wrong)
        checks = [Check("packages", "MISS", "; ".join(text for text, _ in wrong), fix)]
    for name in sorted(absent):
        found = f"not installed; needed for {EXTRAS[name]}"
        fix = f"pip install '{DISTRIBUTION}[{name}]'"
        checks.append(verdict(name not in wanted, f"extra {name}", found, fix, "MISS"))
    return checks


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def own_packages() -> list[Check]:
    """Whether Python, started in another folder, finds our `cluster`, and no other project has files in it."""
    asked = "[found.origin if (found := find_spec(name)) else '' for name in ('spire_dist', 'cluster')]"
    code = f"from importlib.util import find_spec; print(*{asked}, sep='\\n')"
    status, out, errors = run_command(sys.executable, "-P", "-c", code, folder=Path("/"))
    core, ours = [*out.splitlines(), "", ""][:2]
    if status:
        return [Check("own packages", "WARN", f"could not be asked for: {last_line(errors)}", "see PYTHONPATH")]
    if not core or not ours:
        found = f"{'cluster' if core else 'spire_dist'} is only found from this folder: jobs start elsewhere"
        return [Check("own packages", "MISS", found, f"pip install -e {ROOT}")]
    if Path(ours).parents[1] != Path(core).parents[1]:
        found = f"`import cluster` gives {ours}, which is not ours (beside {core})"
        return [Check("own packages", "MISS", found, "take that folder out of PYTHONPATH, or uninstall what brings it")]
    owners = sorted({name for name in packages_distributions().get("cluster", []) if name != DISTRIBUTION})
    if owners:
        found = f"the installed {', '.join(owners)} calls itself `cluster` too"
        return [
            Check("own packages", "MISS", found, f"pip uninstall {' '.join(owners)}, then install {DISTRIBUTION} again")
        ]
    return [Check("own packages", "OK", str(Path(core).parents[1]))]


# ---- GPUs


def torch_facts() -> dict[str, Any]:
    """What torch sees; called in a process of its own, as a broken driver may hang."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip, "gpus": []}
    if facts["cuda"]:
        try:
            torch.cuda.init()
            for number in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(number)
                name = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
                facts["gpus"].append({"name": name, "uuid": str(getattr(device, "uuid", ""))})
        except (RuntimeError, AssertionError) as error:
            facts["error"] = last_line(str(error).partition("\n")[0])
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    return facts


def ask_torch() -> dict[str, Any]:
    """`torch_facts` from a child; {"failed": why} where there is no answer."""
    try:
        return in_child("cluster.doctor_machine", "torch_facts", seconds=TORCH_S)
    except UnansweredError as error:
        return {"failed": str(error)}


def gpus_of_machine() -> int:
    """GPUs that the driver lists, whatever CUDA_VISIBLE_DEVICES hides; 0 without an NVIDIA driver."""
    status, out, _ = run_command("nvidia-smi", "-L")
    listed = sum(line.startswith("GPU ") for line in out.splitlines()) if status == 0 else 0
    return listed or len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus(facts: Mapping[str, Any], machine: int, environment: Mapping[str, str], wanted: bool) -> list[Check]:
    """Whether torch sees the GPUs that are there or were asked for.

    Args:
        facts: of `torch_facts`.
        machine: GPUs that the driver lists.
        environment: CUDA_VISIBLE_DEVICES and what Slurm gave.
        wanted: the configuration asks for a GPU.

    """
    if "failed" in facts:
        return [
            Check("GPUs", "MISS", f"torch does not start: {facts['failed']}", "install torch again for this machine")
        ]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    given = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS")
    there = f"this machine has {machine}" if machine else f"Slurm gave {given}" if given else ""
    if facts["gpus"]:
        names = [gpu["name"] for gpu in facts["gpus"]]
        found = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) + f" (CUDA {facts['cuda']})"
        listed = [name for name in (visible or "").split(",") if name.strip()]
        if len(names) < len(listed):
            fix = "name only GPUs that exist, or unset it"
            return [Check("GPUs", "WARN", f"{found}; CUDA_VISIBLE_DEVICES={visible} names more", fix)]
        checks = [Check("GPUs", "OK", found)]
        if "nccl" in facts:
            return [*checks, Check("NCCL", "OK", facts["nccl"])]
        return [
            *checks,
            Check("NCCL", "WARN", "torch was built without it", "install the CUDA build of torch for several GPUs"),
        ]
    if not facts["cuda"] and (there or wanted):
        found = f"torch {facts['torch']} is a CPU build" + (
            f", but {there}" if there else "; device = 'cuda' is asked for"
        )
        return [Check("GPUs", "MISS", found, "pip install the CUDA build of torch (see pytorch.org, Get Started)")]
    if there and visible is not None:
        found = f"CUDA_VISIBLE_DEVICES={visible!r} shows none, but {there}"
        return [Check("GPUs", "MISS", found, "unset it, or ask Slurm for GPUs (job.gpus_per_task = 1)")]
    if there or (wanted and "SLURM_JOB_ID" in environment):
        found = f"torch {facts['torch']} sees none{', but ' + there if there else ''} ({facts.get('error', 'no reason given')})"
        return [Check("GPUs", "MISS", found, "compare nvidia-smi's CUDA version with torch's, and ask Slurm for GPUs")]
    build = (
        f"torch {facts['torch']} is built for CUDA {facts['cuda']}"
        if facts["cuda"]
        else f"torch {facts['torch']} is a CPU build"
    )
    if wanted:
        return [
            Check(
                "GPUs", "WARN", f"none here (a login node?); {build}", "check in a job: srun --gpus=1 spire-dist doctor"
            )
        ]
    return [Check("GPUs", "OK", f"none here; {build}")]


# ---- limits


def limits(gpu: bool) -> list[Check]:
    """Open files and shared memory; with a GPU and InfiniBand also memory that may be locked."""
    files, memory = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    no_limit = resource.RLIM_INFINITY
    found = "no limit" if files == no_limit else f"{files} at most"
    enough = files == no_limit or files >= OPEN_FILES
    checks = [verdict(enough, "open files", found, "ulimit -n 65536 (for jobs in job.setup)")]
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY)
        found = f"{size.free / 2**30:.1f} of {size.total / 2**30:.1f} GiB free in {SHARED_MEMORY}"
        fix = "ranks and loaders of a node talk there: empty it, or give the container more (--shm-size=8g)"
        checks.append(verdict(size.free >= SHARED_MEMORY_GIB * 2**30, "shared memory", found, fix))
    if gpu and any(Path("/sys/class/infiniband").glob("*")):
        found = "no limit" if memory == no_limit else f"{memory / 2**10:.0f} KiB at most"
        fix = "NCCL needs it for InfiniBand: the site must lift the limit for slurmd (LimitMEMLOCK=infinity)"
        checks.append(verdict(memory == no_limit, "locked memory", found, fix))
    return checks


# ---- what nodes are compared by


def versions() -> dict[str, str]:
    """What must be the same on all nodes: Python, packages and our own code."""
    try:
        names = {Requirement(line).name for line in requires(DISTRIBUTION) or []}
    except PackageNotFoundError:
        names = set(SHOWN)
    packages = {name: installed for name in sorted(names) if (installed := _version(name))}
    sources = sorted(path for folder in ("spire_dist", "cluster") for path in (ROOT / folder).rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {"Python": platform.python_version(), DISTRIBUTION: code, **packages}
