"""The page of a stand-in run: well-formed, complete in itself, honest about what is missing; and its pictures."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spire_dist.results import evaluate, report, surfaces

VOID = {"meta", "img", "br", "source", "link", "input", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects headings, pictures and references, and insists that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.references, self.pictures = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if tag == "img" and name == "src":
                self.pictures.append(value)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset"):
                self.references.append(value)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def text(standin, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "load_run", lambda run: standin)
    patch.setattr(evaluate, "load_run", lambda run, stage=None: standin)
    evaluate.evaluate(standin.directory, standin.directory.parent / "truth", images=0)
    path = report.write_report(standin.directory, frames=6, pixels=64)
    patch.undo()
    assert path == standin.directory / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_has_its_sections(text):
    assert Page(text).headings == [
        "Along the path", "Parts", "Latents", "Against the truth", "Training", "Consensus", "Particles",
        "How it was made", "Files",
    ]  # fmt: skip


def test_page_refers_to_nothing_outside(text):
    page = Page(text)
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "<script" not in text
    assert len(text) < 8e6


def test_references_within_figures_lead_to_something(text):
    wanted = {r[1:] for r in Page(text).references if r.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert wanted <= set(ids)
    assert len([i for i in ids if i in wanted]) == len(wanted)


def test_every_picture_opens_and_the_first_one_moves(text):
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) for uri in Page(text).pictures]
    assert getattr(pictures[0], "n_frames", 1) == 6
    assert all(min(picture.size) > 10 for picture in pictures)


def test_command_is_shown_as_text_not_as_a_tag(text):
    assert "&lt;ring&gt;.toml" in text


def test_page_shows_the_numbers_of_the_evaluation(text, standin):
    scores = report.read_json(standin.directory / "evaluation.json")["scores"]
    for name in ("model", "average"):
        assert f"{scores[f'per_conformation/{name}_masked']['mean']:.4f}" in text


def test_sections_without_inputs_do_not_appear(standin, tmp_path):
    consensus = tmp_path / "volumes" / "consensus.mrc"
    consensus.parent.mkdir()
    consensus.write_bytes(standin.consensus.read_bytes())
    bare = type(standin)(**{**vars(standin), "consensus": consensus, "latents": standin.latents[:, :2]})
    page = report.render_page(bare, tmp_path, frames=4, pixels=48)
    headings = Page(page).headings
    assert "Against the truth" not in headings
    assert "Training" not in headings
    assert "AUC" not in page
    assert "half maps" not in page


def test_nearer_body_hides_the_farther_one():
    centres = np.array([[0, 0, 20], [0, 0, -20]], dtype=np.float32)
    widths, amplitudes = np.full(2, 6, np.float32), np.ones(2, np.float32)
    scene = surfaces.Scene(np.zeros(3), 120.0, 0.3, np.eye(3), 60)
    front = surfaces.draw(scene, centres, amplitudes, widths, np.array([0, 1]))[30, 30]
    back = surfaces.draw(surfaces.turned(scene, 180), centres, amplitudes, widths, np.array([0, 1]))[30, 30]
    assert front[2] > front[0]  # the first part is blue
    assert back[0] > back[2]  # the second is orange


def test_picture_has_x_to_the_right_and_y_up():
    scene = surfaces.Scene(np.zeros(3), 120.0, 0.3, np.eye(3), 60)
    picture = surfaces.draw(
        scene, np.float32([[20, 40, 0]]), np.ones(1, np.float32), np.full(1, 6, np.float32), np.zeros(1)
    )
    row, column = (np.average(np.indices((60, 60))[axis], weights=picture[..., 3]) for axis in (0, 1))
    assert column == pytest.approx(30 + 10, abs=1)
    assert row == pytest.approx(29 - 20, abs=1)


def test_sphere_is_drawn_with_the_radius_of_its_contour():
    width, level = 10.0, 0.5
    scene = surfaces.Scene(np.zeros(3), 80.0, level, np.eye(3), 100)
    picture = surfaces.draw(
        scene, np.zeros((1, 3), np.float32), np.ones(1, np.float32), np.float32([width]), np.zeros(1)
    )
    area = (picture[..., 3] / 255).sum() * 0.8**2
    radius = width * np.sqrt(2 * np.log(1 / level))
    assert np.sqrt(area / np.pi) == pytest.approx(radius, rel=0.03)


def test_scene_looks_along_the_axis_about_which_things_turn(standin):
    ring = 2 * np.pi * np.arange(8) / 8
    centres, amplitudes = standin.decode(np.stack([np.cos(ring), np.sin(ring), 0 * ring], axis=1))
    scene = surfaces.choose_scene(centres, amplitudes, standin.widths)
    assert abs(scene.view[2] @ [0, 0, 1]) > 0.99
    np.testing.assert_allclose(scene.view @ scene.view.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(scene.view) == pytest.approx(1)


def test_the_particles_shown_are_named_with_their_file_where_there_are_several(standin):
    two = {"sources": [*standin.store.sources, "b.star"], "source": standin.store.source_index % 2}
    run = dataclasses.replace(standin, store=SimpleNamespace(**vars(standin.store) | two))
    [shown] = re.findall(r"Rows (.*?) of the input", report.render_page(run, run.directory, frames=2, pixels=48))
    names = shown.split(", ")
    assert len(names) == 7
    for name in names:
        row, file = map(int, name.split(" of file "))
        assert file == row % 2 + 1


def test_the_number_of_parts_and_their_stability_are_told(standin, tmp_path):
    consensus = tmp_path / "volumes" / "consensus.mrc"
    (tmp_path / "stage1").mkdir()
    consensus.parent.mkdir()
    consensus.write_bytes(standin.consensus.read_bytes())
    run = dataclasses.replace(standin, consensus=consensus)
    measure = {"stability": 0.9, "stability_by_chance": 0.3, "gap": 0.1, "gap_error": 0.01, "silhouette": 0.4}
    for by, counts in (("data", (1, 2, 3)), ("hand", (2,))):
        measures = [measure | {"count": count} for count in counts]
        study = {"by": by, "chosen": 2, "measures": measures, "stability": [0.97, 0.41]}
        (tmp_path / "stage1" / "parts.json").write_text(json.dumps(study))
        page = report.render_page(run, tmp_path, frames=2, pixels=48)
        Page(page)
        assert ("chosen by the data" if by == "data" else "given by hand") in page
        assert "0.97, 0.41" in page
        assert ("gap statistic" in page) == (by == "data")
