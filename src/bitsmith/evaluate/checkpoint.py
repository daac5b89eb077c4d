"""Files of weights: read without ever running what is in them, and matched to the model key by key."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# Under these keys training scripts keep the weights beside the optimizer's state and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "net", "state_dict_ema", "model_ema")
_LISTED = 8


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file by name; nothing in the file is executed.

    ``{"state_dict": ...}`` and the like are unwrapped.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise CheckpointError(f"the file of weights {os.fspath(path)!r} {what} (looked in {Path.cwd()})")
    if file.stat().st_size == 0:
        raise CheckpointError(f"the file of weights {os.fspath(path)!r} is empty: copy or download it again")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        return _state_dict(_read_torch(file), file)
    raise CheckpointError(
        f"{os.fspath(path)!r} is not a file of weights that Bitsmith reads: "
        f"its name should end in .safetensors, .pt or .pth"
    )


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load ``path`` into ``model`` in place, or say which keys do not match and change nothing.

    The ``module.`` that data-parallel training puts before every name is taken off.
    """
    own = model.state_dict()
    tensors = _without_prefix(read_checkpoint(path), own)
    # A counter that inference never reads; many published checkpoints leave it out.
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in own]
    shapes = [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(_mismatch(path, type(model).__name__, missing, unexpected, shapes))
    model.load_state_dict(tensors, strict=False)
    return model


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # Damaged bytes make torch's reader fail in many ways; in each of them the user's file is at fault.
    except Exception as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The CheckpointError that says what ``error``, raised by ``torch.load(weights_only=True)``, means for ``file``."""
    # torch says "GLOBAL name" of every function or class that is not on its short list.
    if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(error))) is not None:
        return _holds_code(file, named[1])
    return _damaged(file, error)


def _holds_code(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{str(file)!r} holds more than tensors: loading it would run code, {name}, so nothing of it was "
        f"loaded. If you made the file, save only the weights, by torch.save(model.state_dict(), ...) or "
        f"safetensors.torch.save_file"
    )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch"
    hint = "" if file.suffix == ".safetensors" or _is_zip(file) else " (not a whole zip archive)"
    return CheckpointError(
        f"{str(file)!r}, {file.stat().st_size:,} bytes, is corrupt, cut short or no {kind} file{hint}: "
        f"{reason}. Copy or download it again"
    )


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # raised, not answered, for some damaged ends of archives
        return False


def _state_dict(loaded: Any, file: Path) -> dict[str, Tensor]:
    """The mapping from names to tensors, however deep training scripts have wrapped it."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a mapping from names to tensors: "
            f"save model.state_dict()"
        )
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(repr, list(loaded)[:_LISTED]))
        raise CheckpointError(f"{str(file)!r} has no tensors under its keys ({keys}): save model.state_dict()")
    return tensors


def _without_prefix(tensors: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Names without what data-parallel training and torch.compile put before all of them."""
    names = set(own)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if names.isdisjoint(tensors) and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _mismatch(
    path: str | os.PathLike[str], model: str, missing: list[str], unexpected: list[str], shapes: list[str]
) -> str:
    parts = [f"the weights in {os.fspath(path)!r} do not fit the model {model}:"]
    for name, keys in (
        ("missing from the file", missing),
        ("not in the model", unexpected),
        ("of another shape", shapes),
    ):
        if keys:
            more = [f"and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
            parts.append("\n    ".join([f"  {len(keys)} {name}:", *keys[:_LISTED], *more]))
    parts.append("  Nothing was loaded. Give the file that was saved from this model, or build the model it is for.")
    return "\n".join(parts)
