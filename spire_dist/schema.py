"""The particle store on disk: names, shapes, units and version. Numpy only; the contract between `data_prep`,
which writes it, and `spire_dist.data.store`, which reads it.

One Zarr (format 3) group:

    images        [N, D, D]  float16 or float32; protein positive, background mean 0 and standard deviation 1
    rotations     [N, 3, 3]  float32; r_image = R @ r_volume
    shifts        [N, 2]     float32, Å, (x, y); a point c lands at (R c)[:2] + t
    ctf           [N, 9]     float32; columns CTF_COLUMNS
    optics_group  [N]        int32
    source_index  [N]        int64; row of the particle in the input
    label         [N]        int32, only where the truth is known

and `manifest.json` beside `zarr.json`, written last: without it the store is unfinished and not readable.
"""

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
IMAGES_PER_CHUNK = 64
"""Images in one inner chunk, the unit of reading."""

CTF_COLUMNS = (
    "defocus_u_a",  # Å, underfocus positive
    "defocus_v_a",  # Å
    "defocus_angle_deg",  # degrees, from x towards y to the U axis
    "voltage_kv",
    "cs_mm",
    "amplitude_contrast",  # fraction
    "phase_shift_deg",
    "b_factor_a2",  # Å², envelope exp(-B s² / 4)
    "scale",  # multiplies the whole CTF
)
"""Columns of `ctf`, with their units in their names (RELION's parameters)."""

NO_CTF = (0.0, 0.0, 0.0, 300.0, 0.0, 1.0, 0.0, 0.0, 1.0)
"""A row whose CTF is 1 everywhere (all amplitude contrast, no defocus): images without a microscope."""

ARRAYS = ("images", "rotations", "shifts", "ctf", "optics_group", "source_index", "label")
"""Arrays of the group; `label` is the only optional one."""
