"""Pictures of a run that still trains: the right planes of the right map, from table and encoder, with nothing written."""

import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.drawn import Pictures
from cluster.painter import Painter, last_checkpoint
from cluster.pictures import PLACES, SIDE, _map_sections, _model_sections, _place, _scatter, draw
from spire_dist.config import load_config
from spire_dist.errors import RunError
from spire_dist.maps import write_map
from spire_dist.physics.projector import render_volume
from spire_dist.training.train import train

BOX = 64


def pixels(png: bytes | None) -> np.ndarray:
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def planes(volume: np.ndarray) -> list[np.ndarray]:
    middle = len(volume) // 2
    return [volume[middle], volume[:, middle], volume[:, :, middle]]


@pytest.fixture(scope="module")
def trained(tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of latent, as it is while it trains: with a checkpoint and without results."""
    runs = {}
    threads = torch.get_num_threads()
    for kind in ("table", "encoder"):
        runs[kind] = tmp_path_factory.mktemp("drawn") / kind
        settings = [*tiny_settings, f"latent.kind='{kind}'", "output.report=false"]
        train(load_config(overrides=settings), runs[kind])
        (runs[kind] / "latents.npy").rename(runs[kind].with_suffix(".npy"))
    torch.set_num_threads(threads)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "encoder"])
def test_a_run_that_trains_is_drawn_from_its_checkpoint(trained, kind):
    run = trained[kind]
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    drawn = draw(run)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before
    assert (drawn.checkpoint, drawn.stage, drawn.step) == (last_checkpoint(run), 2, 24)
    assert (drawn.particles, drawn.shown, drawn.labels) == (240, 240, None)
    assert sum(drawn.share) == pytest.approx(1)
    assert drawn.share[0] >= drawn.share[1]
    assert [row.name for row in drawn.maps] == ["consensus", *PLACES]
    for row in drawn.maps:
        sheet = pixels(row.png)
        assert sheet.shape[1] / sheet.shape[0] == pytest.approx(3, rel=0.1)
        assert sheet[..., 0].std() > 20, row.name
    assert 0.005 < (pixels(drawn.scatter)[..., 3] > 0).mean() < 0.5


@pytest.mark.slow
def test_when_it_has_ended_the_pictures_stay_the_same(trained, tmp_path):
    ended = shutil.copytree(trained["table"], tmp_path / "run")
    shutil.copy(trained["table"].with_suffix(".npy"), ended / "latents.npy")
    assert [row.png for row in draw(ended).maps] == [row.png for row in draw(trained["table"]).maps]


@pytest.mark.slow
def test_the_painter_draws_beside_the_page(trained):
    painter, run = Painter(), trained["table"]
    try:
        found, why = painter.look(run)
        assert (found, why) == (None, f"{last_checkpoint(run)} is being drawn")
        until = time.monotonic() + 240
        while why.endswith("is being drawn") and time.monotonic() < until:
            time.sleep(0.2)
            found, why = painter.look(run)
    finally:
        painter.close()
    assert why == ""
    assert isinstance(found, Pictures)
    assert found.checkpoint == last_checkpoint(run)


def test_a_run_without_a_checkpoint_is_not_drawn(trained, tmp_path):
    shutil.copy(trained["table"] / "config.toml", tmp_path)
    with pytest.raises(RunError, match="no checkpoint yet"):
        draw(tmp_path)


def test_sections_are_the_middle_planes_of_the_models_map():
    rng = torch.Generator().manual_seed(0)
    centres, peaks = 6 * torch.randn(40, 3, generator=rng), torch.rand(40, generator=rng)
    widths = 2 + torch.rand(40, generator=rng)
    volume = render_volume(centres, peaks, widths, BOX, 1.0, cut=8.0).numpy()
    sections = _model_sections(centres, peaks, widths, BOX // 2)
    np.testing.assert_allclose(sections, np.stack(planes(volume)), atol=1e-4 * volume.max())


@pytest.mark.parametrize("half", [BOX // 2, 20])
def test_sections_of_a_file_are_its_middle_planes_and_lie_on_the_models(tmp_path, half):
    centres, widths = torch.tensor([[0.0, 0, 0], [5, -3, 0], [9, 0, 4]]), torch.full((3,), 2.5)
    volume = render_volume(centres, torch.ones(3), widths, BOX, 1.0).numpy()
    write_map(tmp_path / "map.mrc", volume, 1.0)
    sections = _map_sections(tmp_path / "map.mrc", half)
    window = slice(BOX // 2 - half, BOX // 2 + half)
    if half == BOX // 2:
        np.testing.assert_array_equal(sections, np.stack(planes(volume)))
    # Resampled, the peaks still are where the model has them: half a voxel beside them it would be ten times as far off.
    np.testing.assert_allclose(sections, _model_sections(centres, torch.ones(3), widths, half), atol=0.02)
    assert sections.shape[-1] == np.clip(2 * half, 64, SIDE)
    assert sections.max() == pytest.approx(max(plane[window, window].max() for plane in planes(volume)), rel=0.02)


def test_maps_are_of_particles_at_their_place_along_the_axis():
    along = np.random.default_rng(0).standard_normal((1000, 2))
    order = np.argsort(along[:, 0])
    for share in PLACES.values():
        row = _place(along, share)
        assert abs(np.flatnonzero(order == row)[0] / 1000 - share) < 0.025
        assert abs(along[row, 1]) < 0.5
    assert _place(np.zeros((1, 2)), 0.95) == 0


def test_labels_colour_the_scatter():
    along = np.random.default_rng(0).standard_normal((300, 2))
    along[150:, 0] += 20
    labelled = pixels(_scatter(along, np.repeat([3, 7], 150), {}))
    seen = labelled[..., 3] > 100
    left, right = (labelled[:, part][seen[:, part]][:, :3].mean(axis=0) for part in (slice(360), slice(360, None)))
    assert np.abs(left - right).max() > 100
    assert min(left.max(), right.max()) > 150, "too dark for a dark page"
    assert (pixels(_scatter(along, None, {"A": 0})) != pixels(_scatter(along, None, {}))).any()
