import numpy as np
import pytest
import starfile

from data_prep.sources import read_particles
from spire_dist.errors import SourceError

OPTICS = {"rlnVoltage": "voltage_kv", "rlnAmplitudeContrast": "amplitude_contrast", "rlnDefocusU": "defocus_u_a"}


@pytest.mark.parametrize(("column", "value"), [("rlnAmplitudeContrast", 10), ("rlnVoltage", 3e5), ("rlnDefocusU", 1e6)])
def test_a_ctf_value_in_another_unit_is_refused_by_row(tmp_path, write_particles, refusal, column, value):
    star = write_particles(tmp_path)
    blocks = starfile.read(star, always_dict=True)
    for block in blocks.values():
        if column in block:
            block[column] = block[column].astype(float)
            block.loc[block.index[-1], column] = value
    starfile.write(blocks, star, overwrite=True)
    refusal(SourceError, [star.name, OPTICS[column], f"{value:g}", "row"], lambda: read_particles(star))


def test_the_unchanged_file_is_read(tmp_path, write_particles):
    assert np.isfinite(read_particles(write_particles(tmp_path)).ctf).all()
