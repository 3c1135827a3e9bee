"""The optional libraries each do one real thing, the core needs none of them, and the wheel holds every file."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spire_dist", "data_prep", "cluster")


def run_python(code: str, timeout_s: float = 120.0) -> str:
    """Last line of what a fresh interpreter prints; fails with its standard error."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_core_imports_without_the_extras():
    code = """
import importlib, pkgutil, sys
for name in ("ray", "submitit", "deepspeed", "triton"):
    sys.modules[name] = None
import spire_dist, data_prep, cluster
count = 0
for package in (spire_dist, data_prep, cluster):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # Built on Triton's and Ray's own classes; imported by the projector and by sweeps, where these are.
        if module.name not in ("spire_dist.physics.kernels_gpu", "cluster.trial"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert int(run_python(code)) == len(modules) - len(PACKAGES) - 2


def test_submitit_runs_a_function(tmp_path: Path):
    pytest.importorskip("submitit", reason="needs the extra [slurm]")
    code = f"""
import operator, submitit
print(submitit.LocalExecutor({str(tmp_path)!r}).submit(operator.add, 2, 3).result())
"""
    assert run_python(code) == "5"


@pytest.mark.slow
def test_ray_runs_a_task():
    pytest.importorskip("ray", reason="needs the extra [ray]")
    code = """
import os, secrets
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)  # else Ray leaves one in the home directory
import ray, ray.data, ray.tune
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get(ray.remote(lambda a, b: a + b).remote(2, 3)))
"""
    assert run_python(code, timeout_s=300) == "5"


def test_deepspeed_imports_beside_this_torch():
    pytest.importorskip("torch")
    if not any((Path(folder) / "deepspeed").is_dir() for folder in sys.path):
        pytest.skip("needs the extra [deepspeed]")
    version = run_python("import deepspeed; print(deepspeed.__version__)", timeout_s=300)
    assert tuple(int(part) for part in version.split("+")[0].split(".")[:3]) >= (0, 19, 8)


def test_wheel_holds_every_tracked_file_of_the_packages(tmp_path: Path):
    pytest.importorskip("build", reason="needs the extra [dev]")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout, so no list of tracked files")
    tracked = [name for name in filter(None, listing.stdout.split("\0")) if (ROOT / name).is_file()]
    source = tmp_path / "source"  # setuptools writes beside what it reads
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    [wheel] = tmp_path.glob("spire_dist-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in tracked if name.split("/")[0] in PACKAGES}
    assert wanted
    assert wanted - inside == set()
    assert any(name.endswith("licenses/LICENSE") for name in inside)
