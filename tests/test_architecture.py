"""The house rules, read from the imports and the tracked files; every rule is also tried on a planted violation."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spire_dist", "data_prep", "cluster")

FLOORS: tuple[tuple[str, ...], ...] = (
    tuple(
        f"spire_dist.{name}"
        for name in ("schema", "errors", "files", "machine", "progress", "config", "numpy_pickle", "maps", "star")
    ),
    ("spire_dist.physics",),
    ("spire_dist.data", "spire_dist.distributed", "data_prep"),
    ("spire_dist.model", "spire_dist.simulation"),
    ("spire_dist.training",),
    ("spire_dist.results",),
    ("spire_dist.comparison",),
    ("cluster",),
    ("spire_dist.cli_benchmark", "spire_dist.cli_cluster"),
    ("spire_dist.cli",),
)
"""Rooms from the ground floor up. An import may point down or along its floor, never up, and never in a circle."""

OWNERS: dict[str, tuple[str, ...]] = {
    "submitit": ("cluster.submit",),
    "ray": ("cluster.ray_cluster", "cluster.prep_jobs", "cluster.ray_loader", "cluster.sweep", "cluster.trial"),
    "deepspeed": ("spire_dist.training.deepspeed_engine",),
}
"""The only modules that may import each of the heavy optional libraries, anywhere in them."""

COMMAND_LINE = ("spire_dist.cli", "spire_dist.cli_benchmark", "spire_dist.cli_cluster")

MAX_LINES = 500

FORBIDDEN_TEXT = {
    "a package index": re.compile(
        r"--(extra-)?index-url|--find[-]links|pypi\.org|pythonho[s]ted|download\.pytorch\.org"
    ),
    "a path of one machine": re.compile(r"(?<![\w.])/(work|root|opt|Users|tmp)/\w|(?<![\w.])/home/(?!you\b)\w"),
}

Sources = dict[str, str]
"""Module name -> source text."""


def read_sources() -> Sources:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p.read_text() for p in files}


# ---- what is imported


def imported_names(module: str, source: str, *, module_level: bool = False) -> set[str]:
    """Dotted names that `module` imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(source, filename=module)
    nodes: Iterable[ast.AST] = _nodes_outside_functions(tree) if module_level else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                origin = ".".join([*package, *([origin] if origin else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def _nodes_outside_functions(node: ast.AST) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _nodes_outside_functions(child)


def internal_imports(sources: Sources, *, module_level: bool = False) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports (`from a import b` is a.b where that is a module, else a)."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported_names(module, source, module_level=module_level):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


# ---- rules: each returns its violations, one line each


def room(module: str) -> str | None:
    """The room of FLOORS a module is in; None for the three package fronts and for a module without a room."""
    rooms = (name for floor in FLOORS for name in floor if module == name or module.startswith(name + "."))
    return next(rooms, None)


def floor_number(module: str) -> int:
    return next((number for number, floor in enumerate(FLOORS) if room(module) in floor), 0)


def homeless_modules(sources: Sources) -> list[str]:
    return [module for module in sources if room(module) is None and module not in PACKAGES]


def arrows_up(sources: Sources) -> list[str]:
    return [
        f"{module} (floor {floor_number(module)}) imports {name} (floor {floor_number(name)})"
        for module, names in internal_imports(sources).items()
        for name in sorted(names)
        if floor_number(name) > floor_number(module)
    ]


def circles(sources: Sources) -> list[str]:
    """A circle of modules, or of rooms where no two modules make one."""
    modules = internal_imports(sources)
    rooms: dict[str, set[str]] = {}
    for module, names in modules.items():
        here = room(module) or module
        rooms.setdefault(here, set()).update((room(name) or name) for name in names if (room(name) or name) != here)
    found = []
    for graph in (modules, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(" <- ".join(error.args[1]))
    return found


def packages_that_meet_outside_the_command_line(sources: Sources) -> list[str]:
    """`spire_dist` may use `data_prep` and `cluster` only in functions of `cli`, `cli_benchmark` and `cli_cluster`."""
    outside = ("data_prep", "cluster")
    found = []
    for module, source in sources.items():
        if module.split(".")[0] != "spire_dist":
            continue
        names = imported_names(module, source, module_level=module in COMMAND_LINE)
        found += [f"{module} imports {name}" for name in sorted(names) if name.split(".")[0] in outside]
    return found


def libraries_outside_their_owner(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, source in sources.items()
        for name in sorted(imported_names(module, source))
        if module not in OWNERS.get(name.split(".")[0], (module,))
    ]


def ways_from_data_prep_to_torch(sources: Sources) -> list[str]:
    graph = internal_imports(sources)
    reached: set[str] = set()
    waiting = [module for module in sources if module.split(".")[0] == "data_prep"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph[module]
    return [
        f"{module} imports {name}, and data_prep reaches it"
        for module in sorted(reached)
        for name in sorted(imported_names(module, sources[module]))
        if name.split(".")[0].startswith("torch")
    ]


def files_too_long(texts: Mapping[str, str]) -> list[str]:
    lengths = {name: len(text.splitlines()) for name, text in texts.items() if name.endswith(".py")}
    return [f"{name}: {length} lines, at most {MAX_LINES}" for name, length in lengths.items() if length > MAX_LINES]


def forbidden_text(texts: Mapping[str, str]) -> list[str]:
    return [
        f"{name}:{number}: {what}: {line.strip()[:80]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN_TEXT.items()
        if pattern.search(line)
    ]


# ---- the project keeps the rules

IMPORT_RULES = (
    homeless_modules,
    arrows_up,
    circles,
    packages_that_meet_outside_the_command_line,
    libraries_outside_their_owner,
    ways_from_data_prep_to_torch,
)


@pytest.mark.parametrize("rule", IMPORT_RULES, ids=lambda rule: rule.__name__)
def test_imports_keep(rule):
    assert rule(read_sources()) == []


@pytest.mark.parametrize("rule", [files_too_long, forbidden_text], ids=lambda rule: rule.__name__)
def test_tracked_files_keep(rule):
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so no list of tracked files")
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a binary file, or one just deleted
    assert len(texts) > 10
    assert rule(texts) == []


def test_data_prep_runs_without_torch_ray_and_deepspeed():
    modules = [name for name in read_sources() if name.split(".")[0] == "data_prep"]
    code = f"import {', '.join(modules)}; import sys; print(sorted({{'torch', 'ray', 'deepspeed'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- the rules see what they are for

CLEAN: Sources = {
    "spire_dist": "",
    "spire_dist.errors": "",
    "spire_dist.physics.poses": "from spire_dist.errors import SourceError\nimport numpy",
    "spire_dist.data.store": "from spire_dist import errors\nfrom ..physics import poses",
    "data_prep.convert": "import spire_dist.physics.poses\nfrom spire_dist.data.store import ParticleStore",
    "spire_dist.model.parts": "import torch",
    "cluster.submit": "def submit():\n    import submitit\n    from spire_dist.errors import ConfigError",
    "spire_dist.cli": "def prep():\n    from data_prep.convert import prepare",
}


@pytest.mark.parametrize("rule", IMPORT_RULES, ids=lambda rule: rule.__name__)
def test_clean_house_has_no_violation(rule):
    assert rule(CLEAN) == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (homeless_modules, "spire_dist.helpers", ""),
        (arrows_up, "spire_dist.physics.ctf", "from spire_dist.model.parts import Parts"),
        (arrows_up, "spire_dist.physics.ctf", "from spire_dist.model import parts"),
        (arrows_up, "spire_dist.physics.ctf", "from ..model.parts import Parts"),
        (arrows_up, "spire_dist.physics.ctf", "def f():\n    import spire_dist.model.parts"),
        (arrows_up, "spire_dist.schema", "import spire_dist.physics.poses"),
        (arrows_up, "spire_dist.results.report", "import cluster.submit"),
        (circles, "spire_dist.errors", "import spire_dist.physics.poses"),
        (circles, "spire_dist.physics.poses", "import spire_dist.physics.ctf"),
        (circles, "spire_dist.data.order", "import data_prep.sources"),
        (packages_that_meet_outside_the_command_line, "spire_dist.cli", "from cluster.submit import submit"),
        (
            packages_that_meet_outside_the_command_line,
            "spire_dist.cli",
            "try:\n    import data_prep\nfinally:\n    pass",
        ),
        (
            packages_that_meet_outside_the_command_line,
            "spire_dist.model.parts",
            "def f():\n    import data_prep.convert",
        ),
        (libraries_outside_their_owner, "spire_dist.training.trainer", "def f():\n    import ray.tune"),
        (libraries_outside_their_owner, "spire_dist.training.trainer", "from deepspeed import initialize"),
        (libraries_outside_their_owner, "cluster.status", "from submitit.helpers import DelayedSubmission"),
        (ways_from_data_prep_to_torch, "data_prep.images", "from torch import nn"),
        (ways_from_data_prep_to_torch, "data_prep.images", "from spire_dist.model import parts"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_violation_is_seen(rule, module: str, source: str):
    planted = {"spire_dist.physics.ctf": "import spire_dist.physics.poses", "data_prep.sources": ""}
    assert rule(CLEAN | planted) == []
    assert rule(CLEAN | planted | {module: source})


@pytest.mark.parametrize(
    "line",
    [
        "pip install x --extra-" + "index-url there",
        "https://" + "pypi" + ".org/simple",
        "open('/" + "work/data')",
        "cd /" + "home/anna/cryo",
        "(/" + "tmp/x)",
    ],
)
def test_planted_text_is_seen(line: str):
    assert forbidden_text({"docs/page.md": f"fine\n{line}\n"})[0].startswith("docs/page.md:2: ")


@pytest.mark.parametrize("line", ["cd /home/you/cryo", "https://example.org/tmp/x", "pip install torch"])
def test_harmless_text_passes(line: str):
    assert forbidden_text({"docs/page.md": line}) == []


def test_planted_long_file_is_seen():
    assert files_too_long({"a.py": "x\n" * MAX_LINES, "b.md": "x\n" * 9999}) == []
    assert files_too_long({"a.py": "x\n" * (MAX_LINES + 1)})
