"""`report`: one HTML page that shows a run. Called by `spire-dist report`; complete in itself, nothing is fetched.

Sections whose inputs the run does not have (no evaluation, no half maps, no metrics) are left out.
"""

import base64
import io
from dataclasses import asdict
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from spire_dist import __version__
from spire_dist.files import replacing
from spire_dist.maps import read_map
from spire_dist.physics.ctf import contrast_transfer, frequency_grid
from spire_dist.physics.projector import project
from spire_dist.progress import progress
from spire_dist.results import fsc, plots, plots_of_halves, surfaces
from spire_dist.results.agreement import displacement, variable_share
from spire_dist.results.latent_paths import named_path, principal
from spire_dist.results.pseudo_atoms import chain_names, part_colour
from spire_dist.results.runs import decode_in_batches, input_rows, read_json, read_metrics
from spire_dist.training.run import FinishedRun, load_run

FRAME_MS = 90
STILLS = 8
PARTICLES = 7
LOW_PASS_PX = 2.0
"""σ of the Gaussian by which particles are smoothed to be seen at all."""
FILES = {
    "volumes": "the consensus and maps along the path (.mrc)",
    "parts.cif": "Gaussians along the path as atoms, a chain per part (ChimeraX)",
    "parts.cxc": "ChimeraX script that opens atoms and maps",
    "particles.star": "the input's rows with their latents (and refined poses)",
    "poses.npz": "refined poses, in the store's order",
    "latents.npy": "latent of every particle, in the store's order",
    "parts.npy": "part of every Gaussian",
    "evaluation.json": "scores against the truth",
    "evaluation": "FSC curves as text",
    "validation.json": "comparison of two halves of the particles",
    "halves": "the runs on the two halves",
    "metrics.jsonl": "what was logged while training",
    "config.toml": "every setting",
}


def write_report(
    run: Path, *, out: Path | None = None, path: str = "loop", frames: int = 24, pixels: int = 288, seed: int = 0
) -> Path:
    """Write the page of the run in directory `run` to `out` (None: report.html in the run) and return where it is.

    path    what the animation follows: `loop`, `axis-1`, ... or a file of points (see `latent_paths.named_path`)
    frames  pictures of the animation; pixels: side of each before cropping
    """
    target = out or run / "report.html"
    page = render_page(load_run(run), run, path=path, frames=frames, pixels=pixels, seed=seed)
    with replacing(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def render_page(
    run: FinishedRun, folder: Path, *, path: str = "loop", frames: int = 24, pixels: int = 288, seed: int = 0
) -> str:
    """The page as text, of a run that is open already and its directory."""
    points = named_path(run.latents, path, frames, seed)
    centres, amplitudes = decode_in_batches(run, points)
    study = read_json(folder / "stage1" / "parts.json")
    evaluation, records = read_json(folder / "evaluation.json"), read_metrics(folder)
    validation = read_json(folder / "validation.json")
    halves = [run.consensus.with_name(f"consensus_half{n}.mrc") for n in (1, 2)]
    half_fsc = None
    if all(half.exists() for half in halves):
        first, second = (read_map(half)[0] for half in halves)
        half_fsc = fsc.map_fsc(first, second, run.pixel_size)
    context = {
        "name": folder.resolve().name,
        "version": __version__,
        "run": run,
        "gaussians": len(run.widths),
        "path": path,
        "frames": frames,
        "parts": _parts(run, centres, amplitudes, evaluation),
        "study": study,
        "counts": _svg(plots.part_counts(study), "counts") if len(study.get("measures", [])) > 1 else None,
        "pictures": _pictures(run, centres, amplitudes, pixels),
        "latents": _latents(run, points),
        "sections": _sections(run, points, window := _molecule_window(run, centres, amplitudes)),
        "consensus": _consensus(run, window),
        "particles": _particles(run, seed),
        "evaluation": {"parts": None, "parts_of_stage_1": None} | evaluation if evaluation else None,
        "scores": _svg(plots.scores(evaluation), "scores") if evaluation else None,
        "training": _svg(plots.training(records), "training") if records else None,
        "speed": _speed(records),
        "half_fsc": asdict(half_fsc) if half_fsc else None,
        "validation": validation or None,
        "still_resolutions": _nearest_resolutions(validation, points[:: max(1, len(points) // STILLS)][:STILLS]),
        "validated": _svg(plots_of_halves.validation(validation), "validation") if validation else None,
        "part_names": dict(zip(map(int, found := np.unique(run.parts)), chain_names(len(found)), strict=True)),
        "half_maps": _svg(plots.half_maps(half_fsc), "halves") if half_fsc else None,
        "data": _svg(
            plots.data_facts(run.store.ctf[:, :2].mean(axis=1), run.store.rotations, run.store.shifts), "data"
        ),
        "facts": _facts(folder),
        "texts": {n: (folder / n).read_text() for n in ("command.txt", "config.toml") if (folder / n).exists()},
        "files": _files(folder),
    }
    template = files("spire_dist.results").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(context)


def _svg(canvas: plots.Figure, name: str) -> Markup:
    return Markup(plots.svg(canvas, name))


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _webp(pictures: list[NDArray]) -> str:
    """RGBA pictures as one WebP: animated and endless if there are several."""
    images = [Image.fromarray(picture, "RGBA") for picture in pictures]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "WEBP",
        save_all=len(images) > 1,
        append_images=images[1:],
        duration=FRAME_MS,
        loop=0,
        quality=84,
        method=4,
    )
    return _data_uri(buffer.getvalue(), "webp")


def _pictures(run: FinishedRun, centres: NDArray, amplitudes: NDArray, pixels: int) -> dict:
    """The animation from two sides, stills of it, and the parts from three sides: one scene, one contour level."""
    scene = surfaces.choose_scene(centres, amplitudes, run.widths, pixels)
    views = [scene, surfaces.turned(scene, 90)]
    shots = [
        [surfaces.draw(view, c, a, run.widths, run.parts) for view in views]
        for c, a in progress(list(zip(centres, amplitudes, strict=True)), "pictures", unit="frame")
    ]
    windows = [_window([shot[side] for shot in shots]) for side in range(2)]
    rows = slice(min(w[0].start for w in windows), max(w[0].stop for w in windows))
    joined = [np.concatenate([shot[side][rows, windows[side][1]] for side in range(2)], axis=1) for shot in shots]
    still = [shot[0][windows[0]] for shot in shots[:: max(1, len(shots) // STILLS)]][:STILLS]
    three = [scene, surfaces.turned(scene, 90), surfaces.turned(scene, 90, axis=0)]
    sides = [surfaces.draw(view, centres[0], amplitudes[0], run.widths, run.parts) for view in three]
    return {
        "animation": _webp(joined),
        "first": _webp(joined[:1]),
        "width": joined[0].shape[1],
        "height": joined[0].shape[0],
        "stills": [_webp([picture]) for picture in still],
        "still_numbers": [i * max(1, len(shots) // STILLS) + 1 for i in range(len(still))],
        "sides": [_webp([picture[_window([picture])]]) for picture in sides],
        "bar_percent": 100 * _round_length(scene.extent / 4) / scene.extent * pixels / joined[0].shape[1],
        "bar_a": _round_length(scene.extent / 4),
        "enclosed_percent": round(100 * surfaces.ENCLOSED),
    }


def _window(pictures: list[NDArray], margin: int = 4) -> tuple[slice, slice]:
    """Rows and columns that hold all that is drawn in any of the pictures, and a margin."""
    drawn = np.max([picture[..., 3] for picture in pictures], axis=0) > 8
    spans = []
    for axis in (1, 0):
        used = np.flatnonzero(drawn.any(axis=axis))
        low, high = (used[0], used[-1]) if len(used) else (0, drawn.shape[1 - axis] - 1)
        spans.append(slice(max(0, low - margin), high + 1 + margin))
    return spans[0], spans[1]


def _nearest_resolutions(validation: dict, points: NDArray) -> list[float]:
    """Of each point [K, L] the resolution in Å between the halves at the nearest conformation compared; none without any."""
    if not validation:
        return []
    compared = np.array([row["latent"] for row in validation["maps"]])
    nearest = ((points[:, None] - compared) ** 2).sum(axis=2).argmin(axis=1)
    return [validation["maps"][i]["resolutions_a"]["matched"]["0.143"] for i in nearest]


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 × 10^k that is not longer: for the scale bar."""
    unit = 10.0 ** np.floor(np.log10(length))
    return float(max(f * unit for f in (1, 2, 5) if f * unit <= length))


def _parts(run: FinishedRun, centres: NDArray, amplitudes: NDArray, evaluation: dict) -> list[dict]:
    """One row per part: colour, size, how it moves along the path, and how much of it moves in truth where known."""
    weights = np.abs(amplitudes)
    motion, share = displacement(centres, weights), variable_share(centres, weights, run.widths)
    mass = weights.mean(axis=0) * run.widths**3
    known = {row["part"]: row["moving_in_truth"] for row in evaluation.get("parts", {}).get("parts", [])}
    found = np.unique(run.parts)
    rows = []
    for index, (part, chain) in enumerate(zip(found, chain_names(len(found)), strict=True)):
        members = run.parts == part
        weight = mass[members] + 1e-12
        rows.append(
            {
                "name": chain,
                "colour": part_colour(index),
                "gaussians": int(members.sum()),
                "mass_percent": 100 * float(mass[members].sum() / mass.sum()),
                "displacement_a": float(np.sqrt(np.average(motion[members] ** 2, weights=weight))),
                "variable_share": float(np.average(share[members], weights=weight)),
                "truth": known.get(int(part)),
            }
        )
    return rows


def _latents(run: FinishedRun, points: NDArray) -> Markup | None:
    """The scatter of latents; a single latent dimension has no plane to draw it in."""
    if run.latents.shape[1] < 2:
        return None
    found = principal(run.latents)
    shown = min(3, run.latents.shape[1])
    share = found.variances[:shown] / max(found.variances.sum(), 1e-12)
    canvas = plots.latent_scatter(
        found.coordinates(run.latents, shown), found.coordinates(points, shown), share, run.store.label
    )
    return _svg(canvas, "latents")


def _molecule_window(run: FinishedRun, centres: NDArray, amplitudes: NDArray) -> slice:
    """Voxels along each axis, around the middle of the box, that hold all but half a percent of the model's mass."""
    far = np.linalg.norm(centres, axis=2) + 3 * run.widths
    mass = (np.abs(amplitudes) * run.widths**3).ravel()
    order = np.argsort(far.ravel())
    total = np.cumsum(mass[order])
    radius = far.ravel()[order][np.searchsorted(total, 0.995 * total[-1]).clip(max=len(order) - 1)]
    half = int(np.clip(np.ceil(radius / run.pixel_size), 4, run.box // 2))
    return slice(run.box // 2 - half, run.box // 2 + half)


def _sections(run: FinishedRun, points: NDArray, window: slice) -> dict:
    """Central sections and projections of the maps at `STILLS` points of the path, on one grey scale each."""
    chosen = points[:: max(1, len(points) // STILLS)][:STILLS]
    volumes = [run.volume(z)[window, window, window] for z in chosen]
    side = window.stop - window.start
    middle = side // 2
    rows = {"section": [v[middle] for v in volumes], "projection": [v.sum(axis=0) * run.pixel_size for v in volumes]}
    zoom = max(1, 160 // side)
    return {
        name: _data_uri(plots.grey_png(images, len(images), *_range(images), zoom), "png")
        for name, images in rows.items()
    } | {"side_a": side * run.pixel_size}


def _consensus(run: FinishedRun, window: slice) -> str:
    """Central sections of the consensus across x, y and z (top row), and its projections (bottom row)."""
    volume = read_map(run.consensus)[0][window, window, window]
    middle = len(volume) // 2
    sections = [volume[middle], volume[:, middle], volume[:, :, middle]]
    sums = [volume.sum(axis=axis) for axis in range(3)]
    (low, high), (dark, bright) = _range(sections), _range(sums)
    scaled = [(s - low) / max(high - low, 1e-12) for s in sections] + [
        (s - dark) / max(bright - dark, 1e-12) for s in sums
    ]
    return _data_uri(plots.grey_png(scaled, 3, 0, 1, max(1, 160 // len(volume))), "png")


def _particles(run: FinishedRun, seed: int) -> dict:
    """Some particles: as stored, smoothed, and what the model says of them (its projection times their CTF)."""
    rows = np.sort(np.random.default_rng(seed).permutation(run.store.count)[:PARTICLES])
    images = run.store.read(rows)
    centres, amplitudes = (torch.from_numpy(a) for a in decode_in_batches(run, run.latents[rows]))
    rotations, shifts = run.poses or (run.store.rotations, run.store.shifts)
    pose = torch.from_numpy(rotations[rows]), torch.from_numpy(shifts[rows])
    clean = project(centres, amplitudes, torch.from_numpy(run.widths), *pose, run.box, run.pixel_size)
    ctf = contrast_transfer(torch.from_numpy(run.store.ctf[rows]), *frequency_grid(run.box, run.pixel_size))
    predicted = torch.fft.irfft2(torch.fft.rfft2(clean) * ctf, s=clean.shape[-2:]).numpy()
    smooth = [ndimage.gaussian_filter(image, LOW_PASS_PX) for image in images]
    same = [ndimage.gaussian_filter(image, LOW_PASS_PX) for image in predicted]
    zoom = max(1, 128 // run.box)
    sheets = {"stored": images, "smoothed": smooth, "model": same}
    return {
        name: _data_uri(plots.grey_png(list(sheet), len(rows), *_range(sheet), zoom), "png")
        for name, sheet in sheets.items()
    } | {
        "rows": [" of file ".join(map(str, row[::-1])) for row in input_rows(run.store, rows)],
        "smoothing_a": LOW_PASS_PX * run.pixel_size,
    }


def _range(images) -> tuple[float, float]:
    low, high = np.percentile(np.stack(list(images)), [0.3, 99.8])
    return float(low), float(high)


def _speed(records: list[dict]) -> dict | None:
    """Time in all, and the median speed of each stage."""
    if not records:
        return None
    stages = {s: [r["images_per_s"] for r in records if r["stage"] == s] for s in (1, 2)}
    return {
        "time": str(timedelta(seconds=round(records[-1]["elapsed_s"]))),
        "images_per_s": {s: float(np.median(speeds)) for s, speeds in stages.items() if speeds},
        "memory_gib": max(r["memory_gib"] for r in records),
        "wait_percent": 100 * float(np.mean([r["wait_share"] for r in records])),
    }


def _facts(folder: Path) -> dict[str, str]:
    """environment.json and STATUS.json as rows of a table."""
    rows: dict[str, str] = {}
    for name in ("STATUS.json", "environment.json"):
        for key, value in read_json(folder / name).items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            if value not in (None, ""):
                rows[key.replace("_", " ")] = str(value)
    return rows


def _files(folder: Path) -> list[dict]:
    rows = []
    for name, what in FILES.items():
        path = folder / name
        if path.exists():
            size = (
                sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
            )
            rows.append({"name": name + ("/" if path.is_dir() else ""), "what": what, "kib": size / 1024})
    return rows
