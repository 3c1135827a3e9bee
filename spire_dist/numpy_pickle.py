"""Reads pickles that hold nothing but numpy arrays in tuples, lists and dictionaries, and never runs code from them.

cryoDRGN writes poses, CTF tables and true latents so. A pickle names the functions it wants called; only the few that
numpy itself needs to rebuild an array are allowed here, anything else is refused.
"""

import pickle
from pathlib import Path
from typing import Any

from spire_dist.errors import SourceError

_NUMPY_CORES = ("numpy.core", "numpy._core")  # before and since numpy 2
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how protocol 2 spells bytes
    *((f"{core}.multiarray", name) for core in _NUMPY_CORES for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY_CORES),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load(path: str | Path) -> Any:
    """Contents of the pickle at `path`: arrays, numbers, strings, and tuples, lists and dictionaries of them.

    Raises `SourceError` where the file is missing, is no pickle, or asks for anything but numpy's own constructors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{path}: not a pickle of numpy arrays: {reason}") from error
