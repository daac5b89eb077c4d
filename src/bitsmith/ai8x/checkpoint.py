"""Training checkpoints: read without running anything in them, written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..files import atomic_write
from .archive import Damaged, StoredTensor, Unusual, read_archive, write_archive

if TYPE_CHECKING:
    pass


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint at ``path`` with PyTorch tensors, on the CPU.

    Loaded with ``weights_only=True``; of classes only ``torch.optim.Adam`` and ``torch.optim.SGD`` may be named in
    it, which training scripts store to tell their optimizer. Raises CheckpointError.
    """
    import torch

    file = _existing(path)
    try:
        with torch.serialization.safe_globals([torch.optim.Adam, torch.optim.SGD]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged bytes make torch's reader fail in many ways; in each of them the user's file is at fault.
    except Exception as error:
        from ..evaluate.checkpoint import unreadable

        raise unreadable(file, error) from error
    return _mapping(loaded, file)


def read_stored(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint at ``path``: as `read_checkpoint`, but with `StoredTensor` where that needs no PyTorch."""
    file = _existing(path)
    try:
        return _mapping(read_archive(file.read_bytes()), file)
    except Unusual:
        return read_checkpoint(file)
    except Damaged as error:
        raise CheckpointError(
            f"the checkpoint {str(file)!r} is corrupt: the checksum of {error} is wrong. Copy or download it again "
            "(if it was saved with compute_crc32=False, save it with checksums)"
        ) from error
    except OSError as error:
        raise CheckpointError(f"the checkpoint {str(file)!r} cannot be read: {error.strerror}") from error


def write_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``checkpoint`` as ``torch.save`` does; tensors may be PyTorch's, NumPy arrays or `StoredTensor`.

    ``path`` keeps what it held until the new file is complete. Raises OutputError.
    """
    try:
        data = write_archive(checkpoint)
    except (Unusual, RecursionError):
        import torch

        buffer = io.BytesIO()  # torch hides what went wrong with a disk; Python's own writing tells
        torch.save(to_torch(checkpoint), buffer)
        data = buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def as_array(tensor: Any) -> NDArray[Any]:
    """The numbers of a tensor of either kind; bfloat16, which NumPy does not know, as float32."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, StoredTensor):
        return tensor.array
    if not is_tensor(tensor):
        raise CheckpointError(f"the checkpoint has a {type(tensor).__name__} where a plain tensor should be")
    plain = tensor.detach()
    if plain.numel() > plain.untyped_storage().nbytes():
        raise CheckpointError(f"a tensor of shape {tuple(plain.shape)} repeats its numbers instead of holding them")
    array: NDArray[Any] = (plain if str(plain.dtype) != "torch.bfloat16" else plain.float()).resolve_neg().numpy()
    return array


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of either kind, with strided memory."""
    return isinstance(value, (np.ndarray, StoredTensor)) or (
        hasattr(value, "untyped_storage") and str(getattr(value, "layout", "")) == "torch.strided"
    )


def to_torch(value: Any) -> Any:
    """``value`` with the NumPy arrays and `StoredTensor` in its dicts, lists and tuples as PyTorch tensors."""
    import torch

    if isinstance(value, StoredTensor):
        tensor = torch.from_numpy(value.storage.values.copy()).as_strided(value.shape, value.strides, value.offset)
        if value.parameter:
            return torch.nn.Parameter(tensor, requires_grad=value.requires_grad)
        return tensor.requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    if isinstance(value, dict):
        result = value.copy()
        result.update((key, to_torch(entry)) for key, entry in value.items())
        return result
    if type(value) in (list, tuple):
        return type(value)(to_torch(entry) for entry in value)
    return value


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {os.fspath(path)!r} {what} (looked in {Path.cwd()})")
    return file


def _mapping(loaded: Any, file: Path) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a training checkpoint: a dict with `state_dict`"
        )
    return loaded
