"""The benchmark's FSC against explicit loops over the full cube, and against its published test vectors."""

import numpy as np
import pytest

from spire_dist.errors import SourceError
from spire_dist.results import fsc


def curve_by_loops(a, b):
    """Shell i-1 <= r < i over the full centred cube, one lattice point after the other."""
    box = len(a)
    first, second = (np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(v))) for v in (a, b))
    cross, one, two = (np.zeros(box // 2) for _ in range(3))
    for index in np.ndindex(a.shape):
        squared = sum((i - box // 2) ** 2 for i in index)
        for shell in range(1, box // 2):
            if (shell - 1) ** 2 <= squared < shell**2:
                cross[shell] += (np.conj(first[index]) * second[index]).real
                one[shell] += abs(first[index]) ** 2
                two[shell] += abs(second[index]) ** 2
    curve = np.ones(box // 2)
    curve[1:] = cross[1:] / np.sqrt(one[1:] * two[1:])
    return curve


def test_curve_equals_a_loop_over_every_voxel_of_the_full_cube():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 12, 12))
    b = 0.3 * a + rng.normal(size=a.shape)
    expected = np.clip(np.round(curve_by_loops(a, b), 7), 0, 1)
    np.testing.assert_allclose(fsc.benchmark_fsc(a, b), expected, atol=1.01e-7)


def test_mask_multiplies_both_maps_as_it_is():
    rng = np.random.default_rng(1)
    a, b, mask = (rng.uniform(size=(10, 10, 10)) for _ in range(3))
    expected = np.clip(np.round(curve_by_loops(a * mask, b * mask), 7), 0, 1)
    np.testing.assert_allclose(fsc.benchmark_fsc(a, b, mask), expected, atol=1.01e-7)


@pytest.mark.parametrize(("box", "maximum", "opposite"), [(64, 0.484375, 0.0078125), (128, 0.4921875, 0.00390625)])
def test_area_of_a_map_against_itself_and_its_negative_are_the_published_ones(box, maximum, opposite):
    volume = np.random.default_rng(2).normal(size=(box, box, box)).astype(np.float32)
    assert fsc.auc(fsc.benchmark_fsc(volume, volume)) == pytest.approx(maximum, abs=1e-9)
    assert fsc.ceiling(box) == maximum
    assert fsc.auc(fsc.benchmark_fsc(volume, -volume)) == pytest.approx(opposite, abs=1e-9)


def test_area_of_independent_noise_is_in_the_measured_range():
    rng = np.random.default_rng(3)
    areas = [fsc.auc(fsc.benchmark_fsc(rng.normal(size=(64,) * 3), rng.normal(size=(64,) * 3))) for _ in range(4)]
    assert all(0.015 < area < 0.037 for area in areas)


def test_area_ignores_the_scale_of_every_shell():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 16, 16, 16))
    line = np.fft.fftfreq(16)
    radius = np.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) * 16
    falloff = 1 / (1 + np.floor(radius + 1e-9))  # constant within a shell
    sharpened = np.fft.ifftn(np.fft.fftn(b) * falloff).real
    np.testing.assert_allclose(fsc.benchmark_fsc(a, sharpened), fsc.benchmark_fsc(a, b), atol=2e-7)


def test_usual_shells_give_a_smaller_area_than_the_benchmark_s():
    rng = np.random.default_rng(5)
    box = 64
    line = np.fft.fftfreq(box)
    radius = np.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2)
    truth = np.fft.ifftn(np.fft.fftn(rng.normal(size=(box,) * 3)) * np.exp(-20 * radius)).real
    noisy = truth + rng.normal(0, 0.2 * truth.std(), truth.shape)
    usual = np.clip(fsc.map_fsc(truth, noisy, 1.0).curve[: box // 2], 0, 1)
    lost = fsc.auc(fsc.benchmark_fsc(truth, noisy)) - np.trapezoid(usual, dx=1 / box)
    assert 0.2 / box < lost < 0.6 / box


def test_usual_shells_are_those_of_the_rounded_radius():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 8, 8, 8))
    first, second = np.fft.fftn(a), np.fft.fftn(b)
    line = np.rint(np.fft.fftfreq(8) * 8)
    radius = np.rint(np.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2))
    for shell, value in enumerate(fsc.map_fsc(a, b, 1.0).curve):
        here = radius == shell
        power = (np.abs(first[here]) ** 2).sum() * (np.abs(second[here]) ** 2).sum()
        assert value == pytest.approx((np.conj(first[here]) * second[here]).sum().real / np.sqrt(power), abs=1e-12)


def test_resolution_is_where_the_curve_crosses_between_two_shells():
    frequencies = np.array([0.0, 0.1, 0.2, 0.3])
    assert fsc.resolution(frequencies, np.array([1, 1, 0.5, 0.0]), 0.25) == pytest.approx(1 / 0.25)
    assert fsc.resolution(frequencies, np.ones(4), 0.143) == pytest.approx(1 / 0.3)


def test_description_names_the_resolutions_and_every_shell():
    found = fsc.MapFsc(np.array([0, 0.05, 0.1]), np.array([1, 0.8, 0.1]), 10.4, 13.1)
    lines = fsc.describe(found).splitlines()
    assert "FSC 0.143: 10.40 Å   FSC 0.5: 13.10 Å" in lines[0]
    assert [line.split() for line in lines[2:]] == [
        ["0", "inf", "1.0000"],
        ["1", "20.00", "0.8000"],
        ["2", "10.00", "0.1000"],
    ]


def test_odd_box_and_unequal_boxes_are_refused_by_their_size():
    with pytest.raises(SourceError, match="9 px is odd"):
        fsc.benchmark_fsc(np.zeros((9, 9, 9)), np.zeros((9, 9, 9)))
    with pytest.raises(SourceError, match="8 and 10 px"):
        fsc.benchmark_fsc(np.zeros((8, 8, 8)), np.zeros((10, 10, 10)))


def test_curve_file_holds_cycles_per_voxel_and_fsc(tmp_path):
    fsc.save_curve(tmp_path / "curve.txt", np.array([1, 0.9, 0.5, 0.25]))
    assert (tmp_path / "curve.txt").read_text().splitlines()[:3] == [
        "pixres fsc", "0.0000000 1.0000000", "0.1250000 0.9000000"
    ]  # fmt: skip


def test_an_odd_box_has_an_ordinary_fsc_but_no_benchmark_score():
    a, b = np.random.default_rng(3).normal(size=(2, 15, 15, 15))
    curve = fsc.map_fsc(a, a + b, 1.0).curve
    axis = np.arange(15) - 7
    radius = np.rint(np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2))
    x, y = (np.fft.fftshift(np.fft.fftn(volume)) for volume in (a, a + b))
    for i in range(len(curve)):
        s = radius == i
        expected = np.real(np.sum(x[s].conj() * y[s])) / np.sqrt(np.sum(np.abs(x[s]) ** 2) * np.sum(np.abs(y[s]) ** 2))
        assert abs(curve[i] - expected) < 1e-9
    with pytest.raises(SourceError, match="odd"):
        fsc.benchmark_fsc(a, b)


def test_an_empty_map_agrees_with_nothing():
    a = np.random.default_rng(4).normal(size=(8, 8, 8))
    assert (fsc.map_fsc(a, 0 * a, 1.0).curve == 0).all()
