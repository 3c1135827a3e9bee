"""Progress of anything that takes longer than two seconds: a bar in a terminal, a plain line every 30 s elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE_INTERVAL_S = 30.0


def progress(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "it", done: int = 0
) -> Iterator[Item]:
    """Yield `items` unchanged while showing how far along they are on standard error.

    `done` items of `total` were finished before this call (a resumed conversion starts its bar there).
    """
    if total is None and hasattr(items, "__len__"):
        total = done + len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, initial=done, unit=unit, leave=False, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=done + 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_S:
            last = now
            print(
                f"{what}: {count}{f'/{total}' if total else ''} {unit}, {now - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
