"""A real browser for the tests of the live page: what its document is after the scripts ran, and a picture of it."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PATIENCE_S = 90.0
BUDGET_MS = 4000
"""Of the page's own time: it has fetched itself anew once by then."""


def install_browser(attempts: int = 3) -> None:
    """Skip where Chromium is not installed and cannot be."""
    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with open(Path(tempfile.gettempdir()) / "spire-tests-install.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be at it
            for attempt in range(attempts):
                if shutil.which("chromium"):
                    break
                time.sleep(10 * attempt)  # anybody else's apt may hold its locks
                environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
                packages = ["chromium", "fonts-dejavu-core"]
                for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
                    words = ["apt-get", "-o", "DPkg::Lock::Timeout=120", *command]
                    subprocess.run(words, env=environment, capture_output=True, timeout=600, check=False)
    if shutil.which("chromium") is None:
        pytest.skip("needs a browser: apt-get install chromium")


def document(url: str) -> str:
    """The page as the browser has it after a while. Fails where it refuses something of it, or a script does."""
    return _chromium(url, "--dump-dom")


def screenshot(
    url: str, path: Path, width: int = 1200, height: int = 1000, *, dark: bool = False, scale: int = 1
) -> Path:
    """A PNG of the page, `width` × `height` CSS pixels, in a new file."""
    scheme = "0" if dark else "1"
    look = [
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--force-device-scale-factor={scale}",
        "--hide-scrollbars",
    ]
    _chromium(url, f"--screenshot={path}", f"--window-size={width},{height}", *look)
    assert path.exists()
    return path


def _chromium(url: str, *options: str) -> str:
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        ran = subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--enable-logging=stderr", f"--user-data-dir={profile}", f"--virtual-time-budget={BUDGET_MS}"),
                *(*options, url),
            ],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    told = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
    assert ran.returncode == 0, ran.stderr
    assert not told, told
    return ran.stdout
