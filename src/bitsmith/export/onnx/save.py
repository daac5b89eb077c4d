"""Writing a model to disk, whole or not at all; weights go beside it where one file is too small."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from ...errors import OutputError

# A protobuf message ends at 2 GB; what is not weights is small.
SIZE_LIMIT = (1 << 31) - (1 << 24)
_ALIGNMENT = 4096
_SMALL_TENSOR = 1024


def save_onnx(model: onnx.ModelProto, path: str | os.PathLike[str], *, size_limit: int = SIZE_LIMIT) -> Path:
    """Write ``model`` to ``path``; the path written.

    A model whose weights exceed ``size_limit`` bytes keeps them in ``<name>.data`` beside it. Files are
    written under a temporary name in the same folder and moved into place when complete, so that a full disk
    leaves nothing half-written and an older file as it was.
    """
    path = Path(path)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > size_limit
    with _output_errors(path), contextlib.ExitStack() as files:
        if large:
            data_path = path.with_name(path.name + ".data")
            data_file = files.enter_context(_temporary(path))
            model = _with_external_data(model, data_path.name, data_file)
        model_file = files.enter_context(_temporary(path))
        model_file.write_bytes(model.SerializeToString())
        _sync(model_file)
        if large:
            _sync(data_file)
            os.replace(data_file, data_path)
        os.replace(model_file, path)
    return path


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}; nothing was left half-written") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, removed unless it was moved into place."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Have the bytes on disk before the name points to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _with_external_data(model: onnx.ModelProto, location: str, file: Path) -> onnx.ModelProto:
    """A copy of ``model`` whose large tensors point into ``location``; their bytes go to ``file``."""
    light = onnx.ModelProto()
    light.CopyFrom(_without_initializers(model))
    with file.open("wb") as out:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _SMALL_TENSOR:
                light.graph.initializer.append(tensor)
                continue
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))
            entry = light.graph.initializer.add()
            entry.name, entry.data_type = tensor.name, tensor.data_type
            entry.dims.extend(tensor.dims)
            entry.data_location = TensorProto.EXTERNAL
            fields = {"location": location, "offset": str(out.tell()), "length": str(len(tensor.raw_data))}
            for key, value in fields.items():
                item = entry.external_data.add()
                item.key, item.value = key, value
            out.write(tensor.raw_data)
    return light


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model's own fields, sharing nothing; its weights are not copied."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            _copy_graph(value, light.graph)
        elif field.is_repeated:
            getattr(light, field.name).extend(value)
        else:
            setattr(light, field.name, value)
    return light


def _copy_graph(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    for field, value in source.ListFields():
        if field.name == "initializer":
            continue
        if field.is_repeated:
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)
