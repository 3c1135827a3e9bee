"""Checks of what lies between machines: the file system of a run, ports, names of machines."""

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.doctor_tools import Check, UnansweredError, in_child, run_command, verdict, within

SHARED_TYPES = re.compile(
    r"nfs4?|lustre|gpfs|beegfs(_nodev)?|ceph|cifs|smb3|afs|panfs|wekafs|pvfs2|orangefs|9p|virtiofs|fuse\.\w*(ceph|gluster|juice|s3|sshfs)\w*"
)
LOCAL_TYPES = re.compile(r"ext[234]|xfs|btrfs|zfs|f2fs|tmpfs|ramfs|overlay|vfat")
LOCAL_LOCKS = re.compile(r"\b(nolock|localflock|local_lock=(all|flock))\b")
FREE_GIB = 10.0
LEAST_FREE_GIB = 1.0
SLOW_FSYNC_S = 1.0
SLOW_NAME_S = 2.0
"""A meeting of ranks looks names up several times over; with 20 s each they seem to hang."""
FOLDER_S = 20.0
PORTS = range(20000, 30000)
"""As in `distributed.mesh`, which would bring torch along."""
SAMPLE = 200
"""Ports tried out of thousands."""


# ---- file system


def standing(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists() or place == place.parent)


def mount_of(place: Path, mounts: Path) -> tuple[str, str]:
    """Type and options of the file system that `place` is on, by a list like /proc/self/mountinfo."""
    best, found = -1, ("unknown", "")
    try:
        lines = mounts.read_text().splitlines()
    except OSError:  # no Linux
        return found
    for line in lines:
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4]))
        kind, _, options = right.partition(" ")
        if (point == place or point in place.parents) and len(str(point)) >= best:
            best, found = len(str(point)), (kind, f"{left.split()[5]},{options}")
    return found


def file_system(run: Path, nodes: int | None, mounts: Path = Path("/proc/self/mountinfo")) -> list[Check]:
    """Type, free space and behaviour of the file system under a run directory, which may not exist yet.

    With several `nodes` the type counts: a disk of one machine may not be seen by the others. With None it does not, as they
    will try whether they see it.
    """
    try:
        answer, _ = within(FOLDER_S / 2, lambda: _place(run, mounts))
    except TimeoutError:
        return [Check("file system", "MISS", f"{run}: no answer", "its file server is not there; see with ls")]
    place, kind, options, free, nodes_free = answer
    if not place.is_dir():
        return [Check("file system", "MISS", f"{place} is a file", "give --run a folder")]
    shared, local = SHARED_TYPES.fullmatch(kind), LOCAL_TYPES.fullmatch(kind)
    found = f"{place}: {kind}" + (", shared" if shared else ", a disk of this machine" if local and nodes else "")
    fix = "use a folder that all nodes share; in a job, srun spire-dist doctor --run tells whether they see it"
    if kind in ("tmpfs", "ramfs"):
        found, fix = f"{place}: {kind}, lost when this machine restarts", "put runs on a disk"
        checks = [Check("file system", "WARN", found, fix)]
    else:
        checks = [verdict(bool(shared) or nodes in (None, 1), "file system", found, fix)]
    found = f"{free / 2**30:.1f} GiB"
    fix = "make room, or put the run elsewhere"
    checks.append(verdict(free >= FREE_GIB * 2**30, "free space", found, fix,
                          "WARN" if free >= LEAST_FREE_GIB * 2**30 else "MISS"))  # fmt: skip
    if nodes_free is not None and nodes_free < 1000:
        checks[-1] = Check("free space", "MISS", f"{found}, but room for {nodes_free} more files only", "remove files")
    return checks + _behaviour(place, options)


def _place(run: Path, mounts: Path) -> tuple[Path, str, str, int, int | None]:
    place = standing(run)
    space = os.statvfs(place)
    kind, options = mount_of(place.resolve(), mounts)
    return place, kind, options, space.f_bavail * space.f_frsize, space.f_favail if space.f_files else None


def _behaviour(place: Path, options: str) -> list[Check]:
    folder = place / f".spire-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        tried = in_child("cluster.doctor_places", "try_folder", [str(folder)], seconds=FOLDER_S)
    except UnansweredError as error:
        with suppress(OSError, TimeoutError):
            within(2, lambda: shutil.rmtree(folder, ignore_errors=True))
        return [Check("writing", "MISS", f"{place}: {error}", "its file server may hang; try touch and sync there")]
    if "error" in tried:
        fix = "choose another folder for --run, or ask for the right to write"
        return [Check("writing", "MISS", f"{place}: {tried['error']}", fix)]
    if not tried["renames"]:
        found = f"{place}: a renamed file does not take the other's place"
        return [Check("writing", "MISS", found, "saves need it; put runs on another file system")]
    found = f"4 MiB on the disk in {1000 * tried['seconds']:.0f} ms, renames replace"
    fix = "each save waits for it several times: raise output.save_seconds, or use a faster file system"
    checks = [verdict(tried["seconds"] <= SLOW_FSYNC_S, "writing", found, fix)]
    own = LOCAL_LOCKS.search(options)
    found = f"only within a machine (mounted with {own[0]})" if own else "work" if tried["locks"] else "do not work"
    fix = "take care that two jobs never train in the same run directory; the site can mount it with locks"
    return [*checks, verdict(tried["locks"] and not own, "file locks", found, fix)]


def try_folder(name: str) -> dict[str, Any]:
    """Make a new folder, write, flush, rename and lock files in it, and remove it; in a process of its own."""
    folder = Path(name)
    doing = "making a folder"
    try:
        folder.mkdir()
        doing = "writing"
        start = time.monotonic()
        with (folder / "new").open("wb") as file:
            file.write(os.urandom(2**22))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        doing = "renaming"
        (folder / "old").write_bytes(b"old")
        os.replace(folder / "new", folder / "old")
        renames = (folder / "old").stat().st_size == 2**22 and not (folder / "new").exists()
        return {"seconds": seconds, "renames": renames, "locks": _locks_work(folder / "old")}
    except OSError as error:
        return {"error": f"{error.strerror} ({doing})"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locks_work(path: Path) -> bool:
    with path.open("a") as first:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return not lock_is_free(path)


def lock_is_free(path: Path) -> bool:
    """Whether nobody seems to hold the lock of a file."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


# ---- ports


def ports(environment: Mapping[str, str]) -> list[Check]:
    """Whether ranks can meet: the port of this job, or a sample of those that jobs get."""
    job = environment.get("SLURM_JOB_ID")
    if job and environment.get("SLURM_PROCID", "0") == "0":
        port = int(environment.get("MASTER_PORT", PORTS[int(job) % len(PORTS)]))
        fix = f"export MASTER_PORT=<a free one> before srun; ss -ltnp 'sport = :{port}' shows whose it is"
        return [
            verdict(
                _is_free(port), "ports", f"{port}, of this job, is {'free' if _is_free(port) else 'taken'}", fix, "MISS"
            )
        ]
    sample = PORTS[:: max(1, len(PORTS) // SAMPLE)]
    taken = sum(not _is_free(port) for port in sample)
    found = f"{len(sample) - taken} of {len(sample)} tried between {PORTS.start} and {PORTS.stop - 1} are free"
    fix = "jobs may meet a port that is taken: export MASTER_PORT=<a free one> before srun"
    return [verdict(taken <= len(sample) // 10, "ports", found, fix, "MISS" if taken == len(sample) else "WARN")]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True


# ---- names


def names(environment: Mapping[str, str], nodes: int) -> list[Check]:
    """Whether machines find each other by name, and how fast; with several `nodes` through which interface."""
    own = socket.gethostname()
    try:
        address, seconds = within(10, lambda: socket.gethostbyname(own))
    except (OSError, TimeoutError) as error:
        fix = f"the site must put {own} into its DNS or /etc/hosts; meanwhile export GLOO_SOCKET_IFNAME={_interface()}"
        return [Check("own name", "WARN" if nodes == 1 else "MISS", f"{own} does not resolve ({error})", fix)]
    with suppress(OSError, TimeoutError):
        seconds = max(seconds, _reverse_s(address))
    found = f"{own} is {address}" + (f", after {seconds:.1f} s" if seconds > SLOW_NAME_S else "")
    fix = "the site: nodes into /etc/hosts, or `options timeout:1 attempts:1` in /etc/resolv.conf"
    checks = [verdict(seconds <= SLOW_NAME_S, "own name", found, fix)]
    chosen = environment.get("GLOO_SOCKET_IFNAME")
    if address.startswith("127.") and nodes > 1 and not chosen:
        name = _interface()
        fix = f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name} before srun"
        checks.append(Check("own address", "WARN", f"{address}, which other nodes cannot reach", fix))
    if chosen and chosen.lstrip("=^").split(",")[0] not in psutil.net_if_addrs():
        there = ", ".join(psutil.net_if_addrs())
        checks.append(
            Check("interface", "MISS", f"GLOO_SOCKET_IFNAME={chosen} is not one of {there}", "name one of them")
        )
    return checks + (_names_of_nodes(environment) if nodes > 1 else [])


def _names_of_nodes(environment: Mapping[str, str]) -> list[Check]:
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not listed:
        return []
    status, out, _ = run_command("scontrol", "show", "hostnames", listed)
    if status:
        return []
    lost, slowest = [], 0.0
    for name in out.split():
        try:
            slowest = max(slowest, within(5, lambda name=name: socket.gethostbyname(name))[1])
        except (OSError, TimeoutError):
            lost.append(name)
            if len(lost) == 3:
                break
    fix = "the site: nodes into DNS or /etc/hosts; meanwhile export MASTER_ADDR=<address of the first node> before srun"
    if lost:
        return [Check("node names", "WARN", f"not found here: {', '.join(lost)}", fix)]
    return [verdict(slowest <= SLOW_NAME_S, "node names", f"{listed} resolve, in at most {slowest:.1f} s", fix)]


def _reverse_s(address: str) -> float:
    """Seconds of a look-up of the name of an address, found or not."""

    def ask() -> None:
        with suppress(OSError):
            socket.gethostbyaddr(address)

    try:
        return within(10, ask)[1]
    except TimeoutError:
        return 10.0


def _interface() -> str:
    """The network interface that leads elsewhere, by the kernel's routes; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of documentation
            address = probe.getsockname()[0]
        except OSError:
            return "<interface>"
    found = (name for name, entries in psutil.net_if_addrs().items() if any(e.address == address for e in entries))
    return next(found, "<interface>")
