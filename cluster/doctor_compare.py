"""What the first rank of `doctor` makes of what all have told: one list, in which nodes that differ are named."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.doctor_tools import Check, Level, verdict

SLOW_SEEN_S = 2.0
SKEW_S = 2.0
"""`status` takes a rank for stuck that has given no sign of life for 15 s, by the clock of who looks."""
LEVELS: tuple[Level, ...] = ("MISS", "WARN", "OK")
SHOWN = 4
"""Names or differences in one line."""
SHARED = "give --run a folder on a file system that all nodes share"


def merge(said: Sequence[tuple[str, Sequence[Check]]]) -> list[Check]:
    """Findings of several nodes: the first one's where all are well, else the worst, with the nodes that have it."""
    by_name: dict[str, list[tuple[str, Check]]] = {}
    for node, checks in said:
        for check in checks:
            by_name.setdefault(check.name, []).append((node, check))
    return [_worst(entries) for entries in by_name.values()]


def _worst(entries: Sequence[tuple[str, Check]]) -> Check:
    level: Level = next(level for level in LEVELS if any(check.level == level for _, check in entries))
    bad = [(node, check) for node, check in entries if check.level == level]
    first = bad[0][1]
    texts = dict.fromkeys(check.found for _, check in bad)
    if level == "OK" or (len(bad) == len(entries) and len(texts) == 1):
        return first
    found = [f"{_listed(node for node, check in bad if check.found == text)}: {text}" for text in texts]
    return Check(first.name, level, "; ".join(found[:SHOWN]), first.fix)


def _listed(nodes: Iterable[str]) -> str:
    different = list(dict.fromkeys(nodes))
    more = len(different) - SHOWN
    return ", ".join(different[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return ("rank " if len(numbers) == 1 else "ranks ") + _listed(map(str, numbers))


def met(world: int, nodes: Mapping[int, str], answered: set[int], where: str) -> Check:
    """Whether all ranks came to the meeting, and stayed."""
    away, lost = set(range(world)) - set(nodes), set(nodes) - answered
    if away:
        found = f"{_ranks(away)} of {world} did not come to {where}; here: {_listed(nodes.values())}"
        fix = "see what they print; a firewall, or the first node's name (export MASTER_ADDR=<its address> before srun)"
        return Check("meeting", "MISS", found, fix)
    if lost:
        found = (
            f"{_ranks(lost)} on {_listed(nodes[rank] for rank in sorted(lost))} came to {where} and then fell silent"
        )
        return Check("meeting", "MISS", found, "see what they print, and whether the node is well")
    return Check("meeting", "OK", f"{world} ranks on {_listed(nodes.values())} met at {where}")


def settled(checks: Sequence[Check]) -> list[Check]:
    """The same, in which a doubt about names is none any more where ranks have met and made a sum all the same."""
    good = {check.name for check in checks if check.level == "OK"}
    if not {"meeting", "all-reduce (gloo)"} <= good:
        return list(checks)
    return [
        Check(check.name, "OK", f"{check.found}; ranks meet all the same")
        if check.name in ("own address", "node names") and check.level == "WARN"
        else check
        for check in checks
    ]


def same_versions(nodes: Mapping[int, str], reports: Mapping[int, Mapping[str, Any]]) -> Check:
    """Whether Python, packages and code are those of the first rank everywhere."""
    first = reports.get(0, {}).get("versions", {})
    differences: dict[str, list[str]] = {}
    for rank, report in reports.items():
        other = report["versions"]
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                text = f"{name} {other.get(name, 'is absent')}, not {first.get(name, 'absent')}"
                differences.setdefault(text, []).append(nodes[rank])
    found = "; ".join(f"{_listed(where)}: {text}" for text, where in list(differences.items())[:SHOWN])
    same = f"Python, {len(first) - 2} packages and the code are the same on {_listed(nodes.values())}"
    fix = "use one environment on a shared file system, or install the same on all nodes"
    return verdict(not differences, "same versions", found if differences else same, fix, "MISS")


def a_gpu_each(nodes: Mapping[int, str], reports: Mapping[int, Mapping[str, Any]]) -> list[Check]:
    """Whether each rank sees a GPU for its number on the node; nothing where there are none."""
    with_gpus = {rank: report for rank, report in reports.items() if report["gpus"]}
    if not with_gpus:
        return []
    without = [rank for rank, report in reports.items() if report["local"] >= len(report["gpus"])]
    if without:
        rank = without[0]
        seen = len(reports[rank]["gpus"])
        found = f"rank {rank} is number {reports[rank]['local']} (from 0) of {nodes[rank]} and sees {seen} GPU(s)"
        fix = "ask for as many GPUs as tasks with --gpus-per-node, so that each task sees all of its node"
        return [Check("a GPU each", "MISS", found, fix)]
    taken = Counter(report["gpus"][report["local"]] for report in with_gpus.values())
    twice = [uuid for uuid, count in taken.items() if uuid and count > 1]
    found = f"{len(taken)} GPUs for {len(reports)} ranks"
    return [verdict(not twice, "a GPU each", found, "ask for one GPU a task", "MISS")]


def summed(nodes: Mapping[int, str], reports: Mapping[int, Mapping[str, Any]]) -> list[Check]:
    """How the collectives went, by gloo and, where all have GPUs, by NCCL."""
    checks = []
    with_gpus = all(report["gpus"] for report in reports.values())
    for key, name, variables in (
        ("gloo", "all-reduce (gloo)", "GLOO_SOCKET_IFNAME=<interface between the nodes>"),
        ("nccl", "all-reduce (NCCL)", "NCCL_SOCKET_IFNAME=<interface>, NCCL_IB_DISABLE=1 to go without InfiniBand"),
    ):
        results = {rank: report[key] for rank, report in reports.items() if report[key]}
        if key == "nccl" and not with_gpus:
            continue
        failed = next((rank for rank, report in reports.items() if not report[key]), None)
        if failed is not None:
            why = next((report["error"] for report in reports.values() if report["error"]), "it did not come so far")
            told = f"rank {failed} on {nodes[failed]}: {why}"
            checks.append(Check(name, "MISS", told, f"export {variables} before srun; {key.upper()}_DEBUG=INFO tells more"
                                if key == "nccl" else f"export {variables} before srun"))  # fmt: skip
            break
        wrong = [rank for rank, result in results.items() if not result["right"]]
        latency, speed = (
            pick(result[of] for result in results.values()) for pick, of in ((max, "latency_ms"), (min, "gb_per_s"))
        )
        found = f"sum over {len(results)} ranks right, {latency:.2f} ms for one number, {speed:.2f} GB/s for 16 MiB"
        if wrong:
            found = f"{_ranks(wrong)} got a wrong sum"
        checks.append(verdict(not wrong, name, found, "report it: the network or its driver changes data", "MISS"))
    return checks


def seen(nodes: Mapping[int, str], saw: Mapping[int, Mapping[str, Any]]) -> list[Check]:
    """Whether nodes see each other's files, how soon, and each other's locks."""
    pairs = [(nodes[rank], nodes[int(writer)], look) for rank, looks in saw.items() for writer, look in looks.items()
             if writer != "error"]  # fmt: skip
    blind = [f"{reader} does not see what {writer} writes" for reader, writer, look in pairs if look["seconds"] is None]
    unable = [f"{nodes[rank]} cannot write ({looks['error']})" for rank, looks in saw.items() if "error" in looks]
    silent = sorted(set(nodes.values()) - {nodes[rank] for rank in saw})
    if blind or unable or not pairs:
        found = "; ".join((unable + blind)[:SHOWN]) or f"no answer from {_listed(silent)}"
        return [Check("shared files", "MISS", found, SHARED)]
    slowest = max(look["seconds"] for _, _, look in pairs)
    found = f"{_listed(nodes.values())} see each other's, after at most {slowest:.2f} s"
    checks = [
        verdict(
            slowest <= SLOW_SEEN_S, "shared files", found, "the site can lower the attribute cache of NFS (actimeo)"
        )
    ]
    unlocked = [f"{reader} does not see the lock of {writer}" for reader, writer, look in pairs if not look["locked"]]
    fix = "take care that two jobs never train in the same run directory; the site can mount it with locks"
    found = "; ".join(unlocked[:SHOWN]) if unlocked else "seen by other nodes"
    return [*checks, verdict(not unlocked, "shared locks", found, fix)]


def same_time(nodes: Mapping[int, str], ahead: Mapping[int, float]) -> list[Check]:
    """Whether clocks agree."""
    wrong = [f"{nodes[rank]} by {seconds:+.1f} s" for rank, seconds in ahead.items() if abs(seconds) > SKEW_S]
    found = f"off from {nodes[0]}: {', '.join(wrong[:SHOWN])}" if wrong else f"agree to {SKEW_S:g} s"
    return [
        verdict(
            not wrong, "clocks", found, "the site must keep them by NTP; until then ages in status are wrong by that"
        )
    ]
