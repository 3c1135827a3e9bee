"""Two models compared: known maps, planted motion, planted parts; and the matching of their latents by particles."""

from types import SimpleNamespace

import numpy as np
import pytest

from spire_dist.results import fsc
from spire_dist.results.halves import Seen, compare_motion, compare_parts, cross_fsc, match, soft_mask

BOX, PIXEL_SIZE = 24, 4.0


def smooth_map(rng, at):
    """A blob with random density inside, smooth: zero outside."""
    axis = np.arange(BOX) - BOX // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    envelope = np.exp(-((x - at) ** 2 + y**2 + z**2) / 18)
    return (envelope * (1 + 0.3 * rng.standard_normal((BOX,) * 3))).astype(np.float32)


def half_of(maps):
    """A stand-in for a half: the map at latent [k] is maps[k]."""
    return SimpleNamespace(box=BOX, volume=lambda z: maps[int(z[0])])


def test_equal_maps_agree_only_at_matched_conformations():
    rng = np.random.default_rng(0)
    maps = [smooth_map(rng, at) for at in (-4, 0, 4)]
    points = np.arange(3, dtype=np.float32)[:, None]
    # The second half has its latents in another order: what is matched is what its latents say.
    found = cross_fsc([half_of(maps), half_of(maps[::-1])], [points, 2 - points])
    np.testing.assert_allclose(found.masked[range(3), range(3)], 1, atol=1e-9)
    np.testing.assert_allclose(found.unmasked, 1, atol=1e-9)
    np.testing.assert_allclose(found.differences, 1, atol=1e-6)
    np.testing.assert_allclose(found.pooled_differences, 1, atol=1e-6)
    np.testing.assert_allclose(np.diag(found.likeness), 1, atol=1e-6)
    assert found.masked[0, 2, 3:].mean() < 0.5
    expected = fsc.map_fsc(maps[0], maps[2], PIXEL_SIZE, found.mask).curve
    np.testing.assert_allclose(found.masked[0, 2], expected, atol=1e-9)


def test_rigid_maps_with_noise_of_their_own_agree_everywhere_but_in_their_differences():
    rng = np.random.default_rng(1)
    rigid, count = smooth_map(rng, 0), 6
    noisy = [half_of([rigid + 0.01 * rng.standard_normal(rigid.shape) for _ in range(count)]) for _ in range(2)]
    points = np.arange(count, dtype=np.float32)[:, None]
    found = cross_fsc(noisy, [points, points])
    assert found.masked[:, :, 1:6].min() > 0.95
    # A shell of radius 4 has 100 independent numbers (a map is real), of each of 5 differences: 4.5 standard deviations.
    assert abs(found.pooled_differences[4:]).max() < 0.2
    assert abs(np.diag(found.likeness).mean()) < 0.1


def test_a_soft_mask_is_one_on_the_density_and_falls_smoothly_to_zero():
    volume = np.zeros((BOX,) * 3, np.float32)
    volume[12, 12, 12] = 1
    line = soft_mask(volume)[12, 12, 12:]
    assert (line[:3] == 1).all()
    np.testing.assert_allclose(line[3:5], [0.75, 0.25], atol=1e-6)  # cosine, 1/3 and 2/3 of the way
    assert (line[5:] == 0).all()


def test_latents_are_matched_by_the_particles_whatever_the_other_space_is_like():
    rng = np.random.default_rng(2)
    turn = rng.uniform(0, 2 * np.pi, 2000)
    run = np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    own = np.stack([5 - np.sin(turn), 3 * np.cos(turn), turn * 0], axis=1).astype(np.float32)
    own += 0.3 * rng.standard_normal(own.shape).astype(np.float32)
    at = 2 * np.pi * np.arange(8) / 8
    points = np.stack([np.cos(at), np.sin(at)], axis=1).astype(np.float32)
    found, neighbours = match(run, own, points)
    assert neighbours == 2000 // 32
    expected = np.stack([5 - np.sin(at), 3 * np.cos(at), 0 * at], axis=1)
    # The mean of 62 particles along a ninth of the ring, then the particle nearest to it.
    assert np.abs(found - expected).max() < 0.45
    assert all((own == z).all(axis=1).any() for z in found)


@pytest.fixture(scope="module")
def body():
    """300 Gaussians of two bodies, 5 conformations; the second body moves along x in the first three, then along y."""
    rng = np.random.default_rng(3)
    centres = np.concatenate([rng.normal(-30, 8, (200, 3)), rng.normal(30, 8, (100, 3))])
    way = np.array([[0, 0, 0], [6, 0, 0], [12, 0, 0], [12, 6, 0], [12, 12, 0]], dtype=float)
    moved = np.repeat(centres[None], 5, axis=0)
    moved[:, 200:] += way[:, None]
    parts = np.repeat([0, 1], [200, 100])
    return Seen(moved.astype(np.float32), np.ones((5, 300), np.float32), np.full(300, 3, np.float32), parts)


def another(body: Seen, rng, shift=0.5, way=None) -> Seen:
    """The same molecule from other Gaussians: fewer, in another order, their parts named differently."""
    chosen = rng.permutation(300)[:280]
    centres = body.centres[:, chosen] + rng.normal(0, shift, (1, 280, 3))
    if way is not None:
        centres = centres[:1] + way
    return Seen(centres.astype(np.float32), body.amplitudes[:, chosen], body.widths[chosen], 7 - body.parts[chosen])


def test_equal_motion_correlates_fully_and_its_size_is_told(body):
    rng = np.random.default_rng(4)
    found = compare_motion(body, [another(body, rng), another(body, rng)])
    assert found["correlation"] == pytest.approx(1, abs=1e-3)
    assert found["difference_a"] < 0.3
    fixed, arm = found["parts"]
    assert fixed["rms_a"] == [0, 0]
    # Mean of the squared distance over the ordered pairs of different conformations, by hand.
    way = body.centres[:, 250] - body.centres[0, 250]
    squares = ((way[:, None] - way) ** 2).sum(axis=2)
    assert arm["rms_a"][0] == pytest.approx(np.sqrt(squares.sum() / 20), rel=1e-3)
    assert arm["correlation"] == pytest.approx(1, abs=1e-3)


def test_independent_motion_does_not_correlate_and_opposite_motion_does_negatively(body):
    rng = np.random.default_rng(5)
    # Small beside the bodies, 8 Å: what is far out of a body came from further in, in both halves (0.22 for motion of 3 Å).
    found = [
        compare_motion(body, [another(body, rng, way=rng.normal(0, 0.5, (5, 280, 3))) for _ in range(2)])
        for _ in range(30)
    ]
    # One such motion has some 100 independent numbers (neighbours share their mean), thirty have a deviation of 0.02.
    assert abs(np.mean([one["correlation"] for one in found])) < 0.06
    together = np.mean([one["difference_a"] / np.hypot(*one["rms_a"]) for one in found])
    assert together == pytest.approx(1, abs=0.05)
    there = another(body, rng)
    back = Seen(2 * there.centres[:1] - there.centres, there.amplitudes, there.widths, there.parts)
    assert compare_motion(body, [there, back])["parts"][1]["correlation"] < -0.5


def test_absent_gaussians_say_nothing_of_motion(body):
    rng = np.random.default_rng(6)
    one, two = another(body, rng), another(body, rng)
    stray = np.tile(rng.normal(30, 8, (1, 40, 3)), (5, 1, 1)) + rng.normal(0, 30, (5, 40, 3))
    joined = Seen(
        np.concatenate([two.centres, stray], axis=1).astype(np.float32),
        np.concatenate([two.amplitudes, np.full((5, 40), 1e-3)], axis=1).astype(np.float32),
        np.full(320, 3, np.float32), np.concatenate([two.parts, np.full(40, 9)]),
    )  # fmt: skip
    assert compare_motion(body, [one, joined]) == compare_motion(body, [one, two])


def test_parts_agree_whatever_their_names_and_not_when_they_are_drawn_by_lot(body):
    rng = np.random.default_rng(7)
    halves = [another(body, rng), another(body, rng)]
    found = compare_parts(body, halves)
    assert found["between_halves"] == pytest.approx(1)
    assert found["with_run"] == pytest.approx([1, 1])
    assert found["moving"] == pytest.approx(1)
    assert found["moving_share_of_mass"] == pytest.approx([1 / 3, 1 / 3], abs=0.01)
    lot = [Seen(h.centres, h.amplitudes, h.widths, rng.integers(0, 2, 280)) for h in halves]
    assert abs(compare_parts(body, lot)["between_halves"]) < 0.05
    still = [Seen(np.repeat(h.centres[:1], 5, axis=0), h.amplitudes, h.widths, h.parts) for h in halves]
    assert compare_parts(body, still)["moving"] is None
