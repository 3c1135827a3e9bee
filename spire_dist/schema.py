"""The particle store on disk: names, shapes, units and version. Numpy only; the contract between `data_prep`,
which writes it, and `spire_dist.data.store`, which reads it.

One Zarr (format 3) group:

    images            [N, D, D]  float16 or float32; protein positive, background mean 0 and standard deviation 1;
                                 or int8 of a compact store, to be multiplied by `scale`
    scale             [N]        float32, only beside int8 images
    rotations         [N, 3, 3]  float32; r_image = R @ r_volume
    shifts            [N, 2]     float32, Å, (x, y); a point c lands at (R c)[:2] + t
    ctf               [N, 9]     float32; columns CTF_COLUMNS
    optics_group      [N]        int32; entry of the attribute `optics_groups`
    source            [N]        int32; which particle file: entry of the inputs whose role is "particles"
    source_index      [N]        int64; row in that file; shared by the tilts of one particle
    stack             [N]        int32; entry of `stacks.json`
    slice             [N]        int32; image in that stack
    input_pixel_size  [N]        float64, Å/px of the image in that stack
    uid               [N]        uint64, only from cryoSPARC
    label             [N]        int32, only where the truth is known

Images are in chunks of `images_per_chunk`, chunks in shards of `images_per_shard`, one file each. Every other array is
one uncompressed chunk, so that it can be mapped into memory. `stacks.json` lists the image files that were read.
`manifest.json` beside `zarr.json` is written last: without it the store is unfinished and not readable.
"""

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
STACKS_NAME = "stacks.json"

CHUNK_BYTES = 2**21
MOST_IMAGES_PER_CHUNK = 64


def images_per_chunk(box: int, itemsize: int) -> int:
    """Images in one inner chunk, the unit of reading: a power of two, at most 64 and at most 2 MiB (but at least one)."""
    fitting = max(CHUNK_BYTES // (box * box * itemsize), 1)
    return min(MOST_IMAGES_PER_CHUNK, 1 << (fitting.bit_length() - 1))


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

ARRAYS = (
    "images",
    "rotations",
    "shifts",
    "ctf",
    "optics_group",
    "source",
    "source_index",
    "stack",
    "slice",
    "input_pixel_size",
)
OPTIONAL_ARRAYS = ("scale", "uid", "label")
