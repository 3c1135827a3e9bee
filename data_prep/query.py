"""Which particles of a store a query means, such as "defocus_a < 20000 and label == 3". Called by `edit.py`.

The text is parsed by Python and evaluated here, node by node, on the store's columns: it can name a column, compare and
calculate, and nothing else. No library is given the text to evaluate, for those that take one also run what it calls.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.subset import Kept, stack_paths
from spire_dist.data.store import ParticleStore
from spire_dist.errors import ConfigError
from spire_dist.physics.poses import relion_angles_from_matrices
from spire_dist.schema import CTF_COLUMNS

Operators = Mapping[type[ast.AST], Callable[..., Any]]
LOGIC: Operators = {
    **{ast.And: np.logical_and, ast.BitAnd: np.logical_and, ast.Or: np.logical_or, ast.BitOr: np.logical_or},
    **{ast.Not: np.logical_not, ast.Invert: np.logical_not},
}
ARITHMETIC: Operators = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos},
}
COMPARISONS: Operators = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge},
}
"""No power: 9**9**9 would never end."""


def by_query(store: ParticleStore, query: str) -> tuple[Kept, str]:
    """The particles for which an expression on the columns of `columns_of` is true, in the syntax of Python.

    Raises `ConfigError` naming a column that is not there, or what cannot be evaluated.
    """
    columns = columns_of(store)
    try:
        expression = ast.parse(query.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"query: {query!r} cannot be read; expected like defocus_a < 20000 and label == 3") from error
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    if unknown := sorted(names - set(columns)):
        raise ConfigError(f"query: no column {unknown[0]}; {store.path} has {', '.join(columns)}")
    try:
        with np.errstate(all="ignore"):
            kept = _evaluate(expression, {name: _wide(columns[name]()) for name in names})
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"query: {query!r} cannot be evaluated ({' '.join(str(error).split())[:200]})") from error
    if np.shape(kept) != (store.count,) or kept.dtype != bool:
        raise ConfigError(f"query: {query!r} is not true or false for each particle; expected like defocus_a < 20000")
    return kept, query.strip()


def columns_of(store: ParticleStore) -> dict[str, Callable[[], NDArray[Any]]]:
    """What a query may name: column -> function that gives its values [N]: Å, degrees, text as objects."""
    names = ("optics_group", "source", "source_index", "stack", "slice", "input_pixel_size", "uid", "label")
    columns: dict[str, Callable[[], NDArray[Any]]] = {
        name: lambda name=name: getattr(store, name) for name in names if getattr(store, name) is not None
    }
    columns["optics_group_name"] = lambda: _named(
        store.optics_group, [g["name"] for g in store.attributes["optics_groups"]]
    )
    columns["stack_name"] = lambda: _named(store.stack, [path.name for path in stack_paths(store.path)])
    if store.attributes["has_ctf"]:
        columns |= {name: lambda i=i: store.ctf[:, i] for i, name in enumerate(CTF_COLUMNS)}
        columns["defocus_a"] = lambda: (store.ctf[:, 0] + store.ctf[:, 1]) / 2
    if store.has_poses:
        columns |= {name: lambda i=i: store.shifts[:, i] for i, name in enumerate(("shift_x", "shift_y"))}
        angles = ("rot", "tilt", "psi")
        columns |= {n: lambda i=i: relion_angles_from_matrices(store.rotations)[:, i] for i, n in enumerate(angles)}
    return columns


def _evaluate(node: ast.expr, columns: Mapping[str, NDArray[Any]]) -> Any:
    """The value of an expression: an array [N], or a constant. Raises TypeError for all that is not meant to be there."""

    def value(part: ast.expr) -> Any:
        return _evaluate(part, columns)

    match node:
        case ast.Name():
            return columns[node.id]
        case ast.Constant(value=int() | float() | str()):
            return node.value
        case ast.BoolOp():
            return reduce(LOGIC[type(node.op)], [_truth(value(part)) for part in node.values])
        case ast.BinOp() if type(node.op) in LOGIC:
            return LOGIC[type(node.op)](_truth(value(node.left)), _truth(value(node.right)))
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](_number(value(node.left)), _number(value(node.right)))
        case ast.UnaryOp() if type(node.op) in LOGIC:
            return LOGIC[type(node.op)](_truth(value(node.operand)))
        case ast.UnaryOp():
            return ARITHMETIC[type(node.op)](_number(value(node.operand)))
        case ast.Compare():
            parts = [node.left, *node.comparators]
            pairs = zip(pairwise(parts), node.ops, strict=True)
            return reduce(np.logical_and, [_compare(one, op, other, value) for (one, other), op in pairs])
    what = type(node.op if isinstance(node, ast.BinOp) else node).__name__
    raise TypeError(f"it holds {what}; comparisons, arithmetic, and, or, not and in are allowed")


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, value: Callable[[ast.expr], Any]) -> Any:
    one = value(left)
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple):
            raise TypeError("what follows in is not a list")
        equal = [one == _alike(one, value(item)) for item in right.elts]
        found = reduce(np.logical_or, equal, np.zeros(np.shape(one), dtype=bool))
        return found if isinstance(op, ast.In) else ~found
    if type(op) not in COMPARISONS:
        raise TypeError(f"it holds {type(op).__name__}")
    return COMPARISONS[type(op)](one, _alike(one, value(right)))


def _truth(value: Any) -> Any:
    if np.asarray(value).dtype != bool:
        raise TypeError("and, or and not join comparisons; those that & and | join are written in parentheses")
    return value


def _number(value: Any) -> Any:
    if _is_text(value):  # "a" * 10**9 would fill the memory, and "%d" is a language of its own
        raise TypeError("text can only be compared")
    return value


def _alike(one: Any, other: Any) -> Any:
    if _is_text(one) != _is_text(other):
        raise TypeError("a number is compared with text")
    return other


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype == object)


def _named(numbers: NDArray[np.int32], names: list[str]) -> NDArray[np.object_]:
    return np.array(names, dtype=object)[numbers]


def _wide(column: NDArray[Any]) -> NDArray[Any]:
    """Integers that do not overflow where they are multiplied."""
    return column.astype(np.int64) if column.dtype.kind == "i" else column
