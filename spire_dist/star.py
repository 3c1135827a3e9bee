"""STAR files as columns, every row checked. Read by `data_prep.relion`, `data_prep.tomograms` and `results.tables`.

Read here and not by the starfile library, which fills a short row up with NaN, makes a quotation mark of an apostrophe in
a path, cuts a row at a # within a name, lets the last of two equal labels or blocks win, and takes 3 GB for a million
particles. Nothing is guessed: a line that does not fit its table is refused by its number.
"""

import codecs
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import SourceError

Columns = dict[str, NDArray[Any]]
"""Label (without its underscore) -> [rows] of float64, float32 or str objects, or [rows, 2] of these (see `read_blocks`)."""

ROWS_AT_ONCE = 512
"""Rows held as text before they become numbers."""

TEXTS_SHARED = 2**16
"""Different texts of a block that are remembered, so that equal cells are one object: millions of rows name few stacks."""

CELL = re.compile(rb"""
    "(?P<double> .*? )" (?= \s | $ )   # a quoted cell ends with a quote before white space, so 5" stays within it
  | '(?P<single> .*? )' (?= \s | $ )
  | (?P<comment> [#] .* )
  | (?P<plain> \S+ )
""", re.VERBOSE)  # fmt: skip


def read_blocks(source: Path, labels: Mapping[str, type]) -> dict[str, Columns]:
    """The blocks of a STAR file by name (`data_optics` is "optics"), with those of their columns that `labels` lists.

    labels  label -> float or np.float32 (a cell that is no number stays text, for `numbers` to refuse); str; or tuple for
            text [rows, 2] cut after its last @: 000012@a.mrcs is ("000012@", "a.mrcs"), a.mrcs is ("", "a.mrcs")

    A block without `loop_` (one value for each label) is a table of one row. Raises `SourceError` with the line's number.
    """
    tables: dict[str, Table] = {}
    for number, _, cells, table, is_row in walk(source, labels):
        if table is not None:
            tables[table.name] = table
            if is_row:
                table.add(number, cells)
    return {name: table.columns() for name, table in tables.items()}


def walk(
    source: Path, labels: Mapping[str, type], *, quoted: bool = False
) -> Iterator[tuple[int, bytes, list[bytes], "Table | None", bool]]:
    """Each line of a STAR file: (number from 1, text, cells, block it stands in, whether it is a row of the block's loop).

    The block knows of its labels up to the line. A byte order mark is left out. Raises as `read_blocks`, whose arguments
    these are; `quoted` as in `split_cells`.
    """
    names: set[str] = set()
    table = None
    try:
        with open(source, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            for number, line in enumerate(file, start=1):
                cells = split_cells(line, quoted=quoted)
                is_row = False
                if is_heading(cells):
                    table = Table(source, cells[0][5:].decode(errors="surrogateescape"), labels)
                    if table.name in names:
                        raise SourceError(f"{source}: line {number}: a second block data_{table.name}; one is expected")
                    names.add(table.name)
                elif cells and table is not None:
                    is_row = table.takes(line)
                    if not is_row:
                        table.describe(number, cells)
                yield number, line, cells, table, is_row
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from error


def numbers(source: Path, columns: Columns, label: str) -> NDArray[Any]:
    """Column `label` [rows] as numbers; a cell that is none, NaN or infinity is refused, naming its row from 1.

    A column that was read as numbers is returned itself, not a copy.
    """
    cells = columns[label]
    if cells.dtype == object:
        for row, cell in enumerate(cells):
            if not _is_number(cell):
                raise SourceError(f"{source}: {label} is {cell!r} in row {row + 1}; a number is needed")
    values = cells.astype(np.float64) if cells.dtype == object else cells
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        more = f" and {bad.size - 1} more" if bad.size > 1 else ""
        raise SourceError(f"{source}: {label} is not a finite number in row {bad[0] + 1}{more}; correct or remove it")
    return values


def vectors(source: Path, columns: Columns, label: str) -> list[NDArray[np.float64]]:
    """Column `label` of cells like [0.1,2,-3] as one array for each row, shared by equal cells; lengths may differ."""
    known: dict[str, NDArray[np.float64]] = {}
    for row, cell in enumerate(columns[label]):
        if cell not in known:
            try:
                known[cell] = np.array([float(x) for x in cell.strip("[]").split(",")])
            except ValueError:
                raise SourceError(
                    f"{source}: {label} is {cell!r} in row {row + 1}; expected numbers like [1,0,0,0]"
                ) from None
    return [known[cell] for cell in columns[label]]


def split_cells(line: bytes, *, quoted: bool = False) -> list[bytes]:
    """The cells of a line: all from a # that begins one on is a comment, and quotes are removed unless `quoted`."""
    if not (b'"' in line or b"'" in line or b"#" in line):
        return line.split()  # a million rows in seconds
    found = []
    for match in CELL.finditer(line):
        if match.lastgroup == "comment":
            break
        found.append(match.group(0 if quoted else match.lastgroup or 0))
    return found


def is_heading(cells: list[bytes]) -> bool:
    """Whether a line begins a block; a row may begin with the same letters, but has more cells."""
    return len(cells) == 1 and cells[0][:5].lower() == b"data_"


class Table:
    """One block while it is read."""

    def __init__(self, source: Path, name: str, wanted: Mapping[str, type]) -> None:
        self.source, self.name, self.wanted = source, name, wanted
        self.labels: list[str] = []
        self.is_loop = self.has_rows = False
        self.waiting: list[list[bytes]] = []
        self.parts: dict[str, list[NDArray[Any]]] = {}
        self.texts: dict[bytes, str] = {}

    def takes(self, line: bytes) -> bool:
        """Whether a line is a row: all are, once the labels have ended. A first cell in quotes is no label."""
        self.has_rows = self.has_rows or (self.is_loop and bool(self.labels) and not line.lstrip().startswith(b"_"))
        return self.has_rows

    def describe(self, number: int, cells: list[bytes]) -> None:
        """Take the line of a label, or of a label and its value, or `loop_`."""
        first = cells[0].decode(errors="surrogateescape")
        if first.lower() == "loop_" and not self.labels:
            self.is_loop = True
        elif not first.startswith("_") or (not self.is_loop and len(cells) < 2):
            raise SourceError(f"{self.source}: line {number}: {first!r} is neither a label with its value nor loop_")
        elif first[1:] in self.labels:
            raise SourceError(f"{self.source}: line {number}: a second column {first[1:]} in data_{self.name}")
        else:
            self.labels.append(first[1:])
            if not self.is_loop:
                self.waiting = [[*(self.waiting[0] if self.waiting else []), b" ".join(cells[1:])]]

    def add(self, number: int, cells: list[bytes]) -> None:
        """Take a row of the loop."""
        if len(cells) != len(self.labels):
            raise SourceError(
                f"{self.source}: line {number}: {len(cells)} values for the {len(self.labels)} columns of data_{self.name}"
            )
        self.waiting.append(cells)
        if len(self.waiting) == ROWS_AT_ONCE:
            self._convert()

    def columns(self) -> Columns:
        """All that was taken."""
        self._convert()
        return {label: np.concatenate(self.parts.pop(label)) for label in list(self.parts)}

    def _convert(self) -> None:
        for column, label in enumerate(self.labels):
            kind = self.wanted.get(label)
            if kind is None:
                continue
            parts = self.parts.setdefault(label, [])
            parts.append(self._converted([row[column] for row in self.waiting], kind))
            while len(parts) > 1 and len(parts[-2]) <= len(parts[-1]):  # small pieces leave holes in memory
                parts[-2:] = [np.concatenate(parts[-2:])]
        self.waiting = []
        if len(self.texts) > TEXTS_SHARED:
            self.texts = {}

    def _converted(self, cells: list[bytes], kind: type) -> NDArray[Any]:
        if kind is tuple:
            halves = [cell.rpartition(b"@") for cell in cells]
            pairs = [(self._text(before + at), self._text(after)) for before, at, after in halves]
            return np.array(pairs, dtype=object).reshape(len(cells), 2)  # [0, 2] where no row is left
        if kind is not str:
            try:
                with np.errstate(over="ignore"):  # beyond float32 is infinite, which `numbers` refuses
                    return np.fromiter(map(float, cells), dtype=kind, count=len(cells))
            except ValueError:
                pass
        return np.array([self._text(cell) for cell in cells], dtype=object)

    def _text(self, cell: bytes) -> str:
        text = self.texts.get(cell)
        if text is None:
            text = self.texts[cell] = cell.decode(errors="surrogateescape")
        return text


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
