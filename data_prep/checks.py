"""Is a store what it says? `verify_store` compares it with its hashes and its source, `inspect_store` describes it.

Called by `spire-dist verify` and `spire-dist inspect`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.images import background_mask, background_statistics
from data_prep.picture import draw_picture
from data_prep.recipe import batches_in_file_order, read_pixels, store_images
from data_prep.shards import read_recipe, shard_rows, size_and_hash
from data_prep.writing import content_fingerprint
from spire_dist.data.store import SHARDS, ParticleStore, read_manifest
from spire_dist.errors import SpireError
from spire_dist.progress import progress
from spire_dist.schema import CTF_COLUMNS, MANIFEST_NAME

IMAGES_COMPARED = 64


def verify_store(store: Path, *, source: bool = True) -> list[str]:
    """Problems of a finished store, one line each; none means it is good.

    Every file is compared with its hash in the manifest. With `source`, the inputs must also be what they were, and
    a sample of images is made from them again and compared. Raises `StoreError` where the store is unfinished.
    """
    store = Path(store)
    manifest = read_manifest(store)
    shards = {name: entry for name, entry in manifest["files"].items() if name.startswith(SHARDS)}
    tables = {name: entry for name, entry in manifest["files"].items() if name not in shards}
    if broken := _damaged_files(store, tables):  # then nothing that is read from them can be trusted
        return [f"{path}: {found}; delete the store and run the command that made it again" for path, found in broken]
    particles = ParticleStore.open(store)
    problems = []
    for path, found in _damaged_files(store, shards):
        rows = shard_rows(particles.attributes, int(path.parts[-3]))
        remedy = f"delete it and {MANIFEST_NAME}, then run the command that made it again"
        problems.append(f"{path}: {found}: particles {rows.start} to {rows.stop - 1} of the store; {remedy}")
    if content_fingerprint(manifest["files"], particles.attributes) != manifest["fingerprint"]:
        problems.append(f"{store / MANIFEST_NAME}: its fingerprint is not that of its files; make the store again")
    if source:
        changed = _changed_inputs(particles)
        problems += changed or ([] if problems else _different_images(particles))
    return problems


def inspect_store(store: Path, picture: Path | None = None) -> str:
    """A description of a store in plain text, and, where `picture` is given, a PNG of what its particles look like."""
    particles = ParticleStore.open(Path(store))
    text = "\n".join(f"{name:<13}{value}" for name, value in _facts(particles))
    if picture is not None:
        try:
            draw_picture(particles, Path(picture))
            text += f"\n{'picture':<13}{picture}"
        except OSError as error:
            text += f"\n{'picture':<13}not written: {picture} ({error.strerror or error}); name another with --picture"
    return text


# --- verify ----------------------------------------------------------------------------------------------------------


def _damaged_files(store: Path, files: dict[str, dict[str, Any]]) -> list[tuple[Path, str]]:
    """(file, what is wrong with it) of those `files` that are not what the manifest says."""
    damaged = []
    for name, entry in progress(files.items(), "verify", total=len(files), unit="file"):
        path = store / name
        if not path.is_file():
            damaged.append((path, "is missing"))
        elif path.stat().st_size != entry["bytes"]:
            damaged.append((path, f"has {path.stat().st_size} bytes, expected {entry['bytes']}"))
        elif size_and_hash(path)["sha256"] != entry["sha256"]:
            damaged.append((path, "is damaged (its sha256 is not the manifest's)"))
    return damaged


def _changed_inputs(particles: ParticleStore) -> list[str]:
    stacks = particles.read_stacks()
    problems = []
    for entry in (*particles.attributes["inputs"], *({"role": "stack"} | stack for stack in stacks)):
        path = Path(entry["path"])
        if not path.is_file():
            problems.append(f"{path}: the {entry['role']} file is gone, so the store cannot be compared with it")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: has {path.stat().st_size} bytes, had {entry['bytes']} when the store was made")
        elif entry.get("sha256") and size_and_hash(path)["sha256"] != entry["sha256"]:
            problems.append(f"{path}: its content changed since the store was made; make another store from it")
    return problems


def _different_images(particles: ParticleStore) -> list[str]:
    """A sample of particles, made from the stacks again."""
    rows = np.unique(np.linspace(0, particles.count - 1, IMAGES_COMPARED).astype(np.int64))
    sources, recipes = particles.source[rows], particles.attributes.get("recipes")  # those of a merged store differ
    try:
        return [
            problem
            for source in np.unique(sources)
            for problem in _different_from(particles, rows[sources == source], recipes[source] if recipes else {})
        ]
    except SpireError as error:
        return [str(error)]


def _different_from(particles: ParticleStore, rows: NDArray[np.int64], recipe_of_source: dict[str, Any]) -> list[str]:
    """Particles [n] of one source, made again."""
    recipe = read_recipe(particles.path, particles.attributes | recipe_of_source, rows)
    made = np.empty((len(rows), recipe.box, recipe.box), dtype=recipe.dtype)
    scales = np.ones(len(rows), dtype=np.float32)
    for batch in batches_in_file_order(recipe, np.arange(len(rows))):
        own = store_images(recipe, batch, read_pixels(recipe, batch), made, batch)
        scales[batch] = 1 if own is None else own
    found = particles.read(rows)
    expected = made.astype(np.float32) * scales[:, None, None]
    # Another machine's arithmetic may round the last bit differently.
    step = scales if recipe.dtype == "int8" else np.full(len(rows), 2e-3)
    differs = np.any(np.abs(found - expected) > step[:, None, None] * (1 + np.abs(expected)), axis=(1, 2))
    return [
        f"{particles.path}: particle {rows[i]}, row {particles.source_index[rows[i]] + 1} of "
        f"{particles.sources[particles.source[rows[i]]]}, is not what {recipe.name(int(i))} gives now"
        for i in np.flatnonzero(differs)
    ]


# --- inspect ---------------------------------------------------------------------------------------------------------


def _facts(particles: ParticleStore) -> list[tuple[str, str]]:
    """(name, value) lines, in the order a microscopist asks."""
    attributes = particles.attributes
    ctf = dict(zip(CTF_COLUMNS, particles.ctf.T, strict=True))
    defocus_a = (ctf["defocus_u_a"] + ctf["defocus_v_a"]) / 2
    side_a = particles.box * particles.pixel_size
    size = particles.count * particles.box**2 * np.dtype(particles.image_dtype).itemsize
    facts = [
        ("store", str(particles.path)),
        ("particles", f"{particles.count}, {size / 2**20:.4g} MiB as {particles.image_dtype}"),
        ("images", f"{particles.box} px at {particles.pixel_size:.4g} Å/px = {side_a:.4g} Å"),
        (
            "contrast",
            "; ".join(dict.fromkeys(_sign_text(made["sign"]) for made in attributes.get("recipes", [attributes]))),
        ),
        ("background", _background_text(particles)),
        ("poses", _pose_text(particles)),
    ]
    if attributes["has_ctf"]:
        facts += [
            ("defocus", f"{_range(defocus_a)} Å, astigmatism {_range(ctf['defocus_u_a'] - ctf['defocus_v_a'])} Å"),
            (
                "microscope",
                f"{_range(ctf['voltage_kv'])} kV, Cs {_range(ctf['cs_mm'])} mm, amplitude contrast "
                f"{_range(ctf['amplitude_contrast'])}, phase shift {_range(ctf['phase_shift_deg'])}°",
            ),
        ]
    else:
        facts.append(("CTF", "none (images without a microscope)"))
    for i, group in enumerate(attributes["optics_groups"]):
        boxes, sizes = "/".join(map(str, group["boxes"])), "/".join(f"{s:.4g}" for s in group["pixel_sizes_a"])
        text = f"{group['name']}: {group['count']} particles, {boxes} px at {sizes} Å/px in the input"
        facts.append(("optics" if i == 0 else "", text))
    if attributes["ignored_effects"]:
        facts.append(("left out", f"{', '.join(attributes['ignored_effects'])}: in the input, not in the image model"))
    if particles.label is not None:
        facts.append(("labels", f"{len(np.unique(particles.label))} true state(s)"))
    stacks = len(particles.read_stacks())
    counts = np.bincount(particles.source)
    inputs = [entry for entry in attributes["inputs"] if entry["role"] == "particles"]
    for i, (source, count) in enumerate(zip(inputs, counts, strict=True)):
        known = f"sha256 {source['sha256'][:12]}" if source["sha256"] else f"{source['bytes']} bytes"
        text = f"{source['path']} ({known}), {count} particles"
        facts.append(("" if i else "source", text))
    facts.append(("images from", f"{stacks} file(s)"))
    facts += [("" if i else "history", entry["did"]) for i, entry in enumerate(attributes.get("history", []))]
    facts.append(("fingerprint", particles.fingerprint))
    return facts


def _sign_text(sign: dict[str, Any]) -> str:
    applied = "kept as it was" if sign["applied"] > 0 else "inverted"
    how = {"option": "as asked", "blob/sign": "as cryoSPARC's blob/sign says"}.get(sign["found_by"])
    if how is None:
        how = f"found from the centres of {sign['images']} images: {sign['contrast']:.2g} ± {sign['spread']:.2g}"
    return f"protein is positive; the input's contrast was {applied} ({how})"


def _background_text(particles: ParticleStore) -> str:
    if not particles.attributes["normalised"]:
        return "left as it was"
    radius_a = particles.attributes["background_radius_a"]
    rows = np.unique(np.linspace(0, particles.count - 1, 256).astype(np.int64))
    mask = background_mask(particles.box, radius_a / particles.pixel_size)
    mean, deviation = background_statistics(particles.read(rows), mask)
    measured = f"mean {abs(mean.mean()):.2f}, standard deviation {deviation.mean():.2f}"
    return f"normalised outside {radius_a:.4g} Å of the centre: {measured} in {len(rows)} images"


def _pose_text(particles: ParticleStore) -> str:
    if not particles.has_poses:
        return "none: good for looking at, not for training"
    length_a = np.linalg.norm(particles.shifts, axis=1)
    return f"known; shifts {np.sqrt((length_a**2).mean()):.2g} Å r.m.s., at most {length_a.max():.3g} Å"


def _range(values: NDArray[np.float32]) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"
