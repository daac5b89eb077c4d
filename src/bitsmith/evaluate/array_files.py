"""Arrays from ``.npz`` and ``.safetensors`` files, of which nothing is executed."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError

SUFFIXES = (".npz", ".safetensors")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """What the file holds by name; of an ``.npz`` file that has ``x`` or ``y`` only these are read."""
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in ("x", "y") if name in arrays} or {
                name: torch.empty(0) for name in arrays.files
            }
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
    ) as error:
        raise _corrupt(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: str | os.PathLike[str], error: Exception) -> DataError:
    if "allow_pickle" in str(error) or "Object arrays" in str(error):
        return DataError(
            f"{os.fspath(path)!r} holds pickled Python objects, which could run code and were not loaded: "
            f"save plain arrays of numbers (numpy.savez(path, x=..., y=...))"
        )
    return DataError(
        f"the data file {os.fspath(path)!r} is corrupt, cut short or of another kind: {error}. Write it again"
    )
