"""Planning: what it takes of memory."""

import tracemalloc

from data_prep.plan import PLAN_BYTES_PER_ROW, Inputs, Options, make_plan


def test_a_plan_takes_no_more_memory_than_is_told(tmp_path, write_particles):
    count = 20_000
    source = write_particles(tmp_path, count=count, box=8, per_stack=500)
    options = Options(
        box=None, sign="+", radius_a=None, pixel_size=None, no_ctf=False, seed=0, shuffle=True, images_per_shard=4096,
        dtype="float16", normalise=True, allow_missing_poses=False,
    )  # fmt: skip
    tracemalloc.start()
    try:
        make_plan(Inputs(particles=source), options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PLAN_BYTES_PER_ROW * count
