"""Reads pickles that hold nothing but numpy arrays in tuples, lists and dictionaries, and never runs code from them;
and one array from a pickle, a .npy file or text.

cryoDRGN writes poses, CTF tables and true latents so. A pickle names the functions it wants called; only the few that
numpy itself needs to rebuild an array are allowed here, anything else is refused, and so is a file that would have more
memory reserved than it has bytes.
"""

import io
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spire_dist.errors import SourceError


def load(path: str | Path) -> Any:
    """Contents of the pickle at `path`: arrays, numbers, strings, and tuples, lists and dictionaries of them.

    Raises `SourceError` where the file is missing, is no pickle, or asks for anything but numpy's own constructors.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        _check_memo(content)
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{path}: not a pickle of numpy arrays: {reason}") from error


def load_numbers(path: Path, dtype: type = float, *, axes: Literal[1, 2] = 1) -> NDArray[Any]:
    """The one array of a .npy file, a pickle (.pkl, .pickle), or else a text table of `dtype` with at least `axes` axes.

    Raises `SourceError` in one line where it cannot be read or holds none.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".pkl", ".pickle"):
            numbers = np.asarray(load(path))
        elif kind == ".npy":  # mapped first: a header that promises more than the file holds reserves nothing
            numbers = np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's word on an empty file
                numbers = np.loadtxt(path, dtype=dtype, ndmin=axes)
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged header can raise nearly anything
        raise SourceError(f"{path}: no array of numbers ({' '.join(str(error).split())[:200]})") from error
    if numbers.size == 0:
        raise SourceError(f"{path}: holds no numbers")
    return numbers


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before numpy 2
        if (module, name) in _OWN:
            return _OWN[module, name]
        if (module, name) in _NUMPYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are read")


def _empty_array(*_: Any) -> np.ndarray:
    """What every array starts as: its state follows and brings its bytes. Whatever size the pickle asks for is unread."""
    return np.ndarray((0,), dtype=np.int8)


def _latin1_bytes(text: str, *_: Any) -> bytes:
    return text.encode("latin1")


_OWN = {
    ("numpy", "ndarray"): None,  # only ever named, as the class that `_reconstruct` is to make
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("_codecs", "encode"): _latin1_bytes,  # how protocol 2 spells bytes
}
_NUMPYS = {
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}


def _check_memo(content: bytes) -> None:
    """Refuse a number of the memo beyond how many were given: pickle would reserve room for all up to it."""
    given = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            given += 1
            if argument is not None and argument > given:
                raise pickle.UnpicklingError(f"its memo skips to number {argument}")
