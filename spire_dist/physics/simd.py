"""A vector of sixteen float32 as a type of numba, so that kernels say what the processor does and need no compiler.

Numba's own loops over nine or seventeen pixels stay half scalar, and its `exp` is a call per number. Here a kernel loads,
multiplies and stores whole vectors; LLVM maps them to one AVX-512 register, two of AVX, four of NEON. Inside `@njit`:

    x = load(array, i)          sixteen numbers from i on, of a contiguous one-dimensional float32 array
    store(array, i, x)
    spread(a), ramp()           sixteen times a; 0, 1, ... 15
    x + y, x - y, x * y, fma(x, y, z)
    larger(x, y)                the larger of each pair
    where_positive(x, y)        y where x > 0, else 0
    total(x)                    the sum of the sixteen
    add_totals(array, i, w, x, y, z)    add the four sums to array[i], ... array[i + 3]
    exp2(x)                     2^x to float32's precision, at least 2^-126

Nothing checks bounds.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, register_model
from numba.np import arrayobj

# Numba reads an intrinsic's first argument as its typing context and compiles the function it returns: a kernel's call has
# one argument less, and annotations inside would say nothing.
# pyright: reportOptionalCall=false
intrinsic = cast(Callable[[Callable], Any], numba_intrinsic)

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


def _forget_older_kernels() -> None:
    """Numba's cache looks at the time of a kernel's own file only: machine code older than this file is made again."""
    for index in Path(__file__).parents[1].glob("*/__pycache__/*.nbi"):
        with suppress(OSError):  # gone, or not ours to remove
            if index.stat().st_mtime < Path(__file__).stat().st_mtime:
                index.unlink()


_forget_older_kernels()


class _Vector(types.Type):
    pass


_vector = _Vector(name=f"float32x{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


def _place(context, builder, array_type, array, index_type, index):
    """Pointer to sixteen numbers of an array."""
    if array_type.ndim != 1 or array_type.layout != "C" or array_type.dtype != types.float32:
        raise TypeError(f"load and store take contiguous one-dimensional float32 arrays, not {array_type}")
    data = arrayobj.make_array(array_type)(context, builder, array).data
    place = builder.gep(data, [context.cast(builder, index, index_type, types.intp)])
    return builder.bitcast(place, _FLOATS.as_pointer())


def _call(builder, name, result, arguments, **options):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, **options)


@intrinsic
def load(typing, array, index):
    """Sixteen numbers of `array` from `index` on."""

    def lower(context, builder, sig, args):
        return builder.load(_place(context, builder, sig.args[0], args[0], sig.args[1], args[1]), align=4)

    return _vector(array, index), lower


@intrinsic
def store(typing, array, index, value):
    """Write sixteen numbers into `array` from `index` on."""

    def lower(context, builder, sig, args):
        builder.store(args[2], _place(context, builder, sig.args[0], args[0], sig.args[1], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), lower


@intrinsic
def spread(typing, number):
    """Sixteen times `number`."""

    def lower(context, builder, sig, args):
        nothing, first = ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        single = builder.insert_element(nothing, context.cast(builder, args[0], sig.args[0], types.float32), first)
        return builder.shuffle_vector(single, nothing, ir.Constant(_INTS, [0] * LANES))

    return _vector(number), lower


@intrinsic
def ramp(typing):
    """0, 1, ... 15."""
    return _vector(), lambda context, builder, sig, args: ir.Constant(_FLOATS, [float(i) for i in range(LANES)])


@intrinsic
def fma(typing, x, y, z):
    """Rounded once: x y + z."""
    return _vector(x, y, z), lambda context, builder, sig, args: _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, args)


@intrinsic
def larger(typing, x, y):
    """The larger number of each pair; `x` where either is not a number."""

    def lower(context, builder, sig, args):
        return builder.select(builder.fcmp_unordered(">", *args), *args)

    return _vector(x, y), lower


@intrinsic
def where_positive(typing, x, y):
    """`y` where x > 0, else zero."""

    def lower(context, builder, sig, args):
        zeros = ir.Constant(_FLOATS, [0.0] * LANES)
        return builder.select(builder.fcmp_ordered(">", args[0], zeros), args[1], zeros)

    return _vector(x, y), lower


@intrinsic
def total(typing, x):
    """Sum of the sixteen numbers, in the order that is quickest."""

    def lower(context, builder, sig, args):
        zero = ir.Constant(ir.FloatType(), -0.0)
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        return _call(builder, name, ir.FloatType(), [zero, args[0]], fastmath=("reassoc",))

    return types.float32(x), lower


@intrinsic
def add_totals(typing, array, index, w, x, y, z):
    """Add the sums of four vectors to four neighbours in `array`; half the work of four `total`."""

    def lower(context, builder, sig, args):
        def interleave(a, b, width):
            """From pairs of vectors of numbers (or of groups of numbers) to one of sums, a's and b's in turn."""
            groups = [range(i, i + width) for i in range(0, LANES, 2 * width)]
            low = [i + k for g in groups for k in (0, LANES) for i in g]
            halves = [
                builder.shuffle_vector(a, b, ir.Constant(_INTS, [i + shift for i in low])) for shift in (0, width)
            ]
            return builder.fadd(*halves)

        sums = interleave(interleave(args[2], args[3], 1), interleave(args[4], args[5], 1), 2)
        for width in (8, 4):  # w, x, y, z stand in every four lanes: add the fours
            kind = ir.VectorType(ir.IntType(32), width)
            halves = [
                builder.shuffle_vector(sums, sums, ir.Constant(kind, list(range(start, start + width))))
                for start in (0, width)
            ]
            sums = builder.fadd(*halves)
        place = _place(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        place = builder.bitcast(place, sums.type.as_pointer())
        builder.store(builder.fadd(sums, builder.load(place, align=4)), place, align=4)
        return context.get_dummy_value()

    return types.void(array, index, w, x, y, z), lower


@intrinsic
def _nearest(typing, x):
    return _vector(x), lambda context, builder, sig, args: _call(builder, f"llvm.rint.v{LANES}f32", _FLOATS, args)


@intrinsic
def _scale(typing, x, power):
    """A whole power of two times x: added to the exponent's bits."""

    def lower(context, builder, sig, args):
        shifted = builder.shl(builder.fptosi(args[1], _INTS), ir.Constant(_INTS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(args[0], _INTS), shifted), _FLOATS)

    return _vector(x, power), lower


def _operator(symbol, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(ConcreteTemplate):
        cases = [signature(_vector, _vector, _vector)]  # noqa: RUF012 - read by numba

    @lower_builtin(symbol, _vector, _vector)
    def lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


@njit(inline="always")
def exp2(x):  # pragma: no cover - compiled
    """2^x: the nearest whole power times a polynomial (Chebyshev, relative error 2e-9 on ±1/2)."""
    x = larger(x, spread(-126.0))
    whole = _nearest(x)
    x = x - whole
    value = fma(spread(1.54614446986e-4), x, spread(1.34004281776e-3))
    value = fma(value, x, spread(9.61805667852e-3))
    value = fma(value, x, spread(5.55032722667e-2))
    value = fma(value, x, spread(2.40226509223e-1))
    value = fma(value, x, spread(6.93147206703e-1))
    value = fma(value, x, spread(1.0))
    return _scale(value, whole)
