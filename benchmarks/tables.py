"""What every benchmark writes: its numbers, and the tables that were printed."""

import json
from collections.abc import Iterable
from pathlib import Path

from spire_dist.comparison.tables import table

__all__ = ["table", "write"]


def write(out: Path, name: str, result: dict, lines: Iterable[str]) -> None:
    """OUT/NAME.json with every number and OUT/NAME.md with the text that was printed."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
