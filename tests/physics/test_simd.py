"""The vector type of the CPU kernels against numpy."""

import numpy as np
import pytest
from numba import njit

from spire_dist.physics.simd import (
    LANES,
    add_totals,
    exp2,
    fma,
    larger,
    load,
    ramp,
    spread,
    store,
    total,
    where_positive,
)


@njit
def apply(x, y, z, results):
    a, b, c = load(x, 1), load(y, 2), load(z, 0)
    store(results[0], 3, a + b)
    store(results[1], 3, a - b)
    store(results[2], 3, a * b)
    store(results[3], 3, fma(a, b, c))
    store(results[4], 3, larger(a, b))
    store(results[5], 3, where_positive(a, b))
    store(results[6], 3, ramp() + spread(x[0]))
    return total(a)


def test_every_operation_is_numpys():
    x, y, z = np.random.default_rng(0).standard_normal((3, LANES + 2)).astype(np.float32)
    results = np.full((7, LANES + 4), 7, dtype=np.float32)
    summed = apply(x, y, z, results)
    a, b, c = x[1 : LANES + 1], y[2:], z[:LANES]
    expected = [a + b, a - b, a * b, a * b + c, np.maximum(a, b), np.where(a > 0, b, 0), np.arange(LANES) + x[0]]
    np.testing.assert_allclose(results[:, 3:-1], expected, rtol=1e-6, atol=1e-7)
    assert (results[:, :3] == 7).all()  # nothing beside its sixteen numbers is written
    assert (results[:, -1] == 7).all()
    assert summed == pytest.approx(a.sum(), rel=1e-5)


@njit
def add_sums(x, out):
    add_totals(out, 2, load(x, 0), load(x, LANES), load(x, 2 * LANES), load(x, 3 * LANES))


def test_four_sums_are_added_to_four_neighbours():
    x = np.random.default_rng(1).standard_normal(4 * LANES).astype(np.float32)
    out = np.arange(8, dtype=np.float32)
    add_sums(x, out)
    expected = np.arange(8.0)
    expected[2:6] += x.reshape(4, LANES).astype(np.float64).sum(1)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_what_is_no_number_stays_none():
    x = np.full(LANES, np.nan, dtype=np.float32)
    out = np.zeros_like(x)
    powers(x, out)
    assert np.isnan(out).all()
    results = np.zeros((7, LANES + 4), dtype=np.float32)
    apply(np.full(LANES + 2, np.nan, np.float32), *np.zeros((2, LANES + 2), np.float32), results)
    assert np.isnan(results[4, 3:-1]).all()  # the larger of nan and 0


@njit
def powers(x, out):
    for i in range(0, len(x), LANES):
        store(out, i, exp2(load(x, i)))


def test_powers_of_two_are_exact_to_single_precision():
    x = np.concatenate([np.linspace(-126, 126, 2**14), np.arange(-100, 101)[:192], np.full(LANES, -1e30)])
    x = x.astype(np.float32)
    out = np.empty_like(x)
    powers(x, out)
    np.testing.assert_allclose(out[:-LANES], np.exp2(x[:-LANES].astype(np.float64)), rtol=2e-7)
    assert (out[-LANES:] <= 2.0**-126).all()
    assert (out[2**14 : 2**14 + 192] == 2.0 ** np.arange(-100, 92)).all()


def test_only_flat_contiguous_single_precision_arrays_are_taken():
    @njit
    def first(x):
        return total(load(x, 0))

    for wrong in (np.zeros(64), np.zeros((4, 16), np.float32), np.zeros(64, np.float32)[::2]):
        with pytest.raises(Exception, match="contiguous one-dimensional float32"):
            first(wrong)
