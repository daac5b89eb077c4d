"""PyTorch's zip files of tensors, read and written without PyTorch, whose import takes ten times the work itself.

Reading builds tensors, numbers, texts and collections of them and nothing else: two optimizer classes, by which
training scripts name their optimizer, are kept as names. Whatever else a file holds is refused with `Unusual`, and
then `torch.load(weights_only=True)` has to judge it (`bitsmith.ai8x.checkpoint`).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "HalfStorage": np.dtype("<f2"),
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_ALIGNMENT = 64  # as PyTorch writes, so that files can be mapped into memory
OPTIMIZERS = (("torch.optim.adam", "Adam"), ("torch.optim.sgd", "SGD"))


class Unusual(Exception):
    """The file, or the value to be written, has something that this module does not handle."""


class Damaged(Exception):
    """A part of the file has another checksum than when it was written, which PyTorch would not notice."""


@dataclass(frozen=True)
class Name:
    """A class that a file mentions; it is never imported."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory that one or more tensors lie in."""

    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file: a window on its storage, with PyTorch's strides, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    parameter: bool = False

    @property
    def array(self) -> NDArray[Any]:
        """The numbers, without copying."""
        values = self.storage.values
        strides = [step * values.itemsize for step in self.strides]
        return np.ndarray(self.shape, values.dtype, values, self.offset * values.itemsize, strides)


def read_archive(data: bytes) -> Any:
    """The object in the PyTorch file ``data``, with its tensors as `StoredTensor`. Raises Unusual, Damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            names = {entry.filename: entry for entry in file.infolist()}
            (root,) = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in names.values()):
                raise Unusual("compressed entries")
            if f"{root}byteorder" in names and file.read(f"{root}byteorder") != b"little":
                raise Unusual("not little-endian")
            if (part := file.testzip()) is not None:
                raise Damaged(part)
            pickled = file.read(f"{root}data.pkl")
            return _Reader(pickled, lambda key: file.read(f"{root}data/{key}")).load()
    except (Unusual, Damaged):
        raise
    # Damaged bytes fail in many ways; which one does not matter, since torch.load then says what is wrong.
    except Exception as error:
        raise Unusual(str(error)) from error


class _Reader(pickle.Unpickler):
    """Knows five names and can call nothing but the three functions below."""

    def __init__(self, pickled: bytes, record: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self.record = record
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if (module == "torch" and name in _STORAGES) or (module, name) in OPTIMIZERS:
            return Name(module, name)
        raise Unusual(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, size = pid
        dtype: np.dtype[Any] = _STORAGES[storage.name]
        if kind != "storage" or storage.module != "torch":
            raise Unusual(f"storage {pid!r}")
        if key not in self.storages:
            self.storages[key] = Storage(np.frombuffer(self.record(key), dtype)[:size])
        values = self.storages[key].values
        if values.dtype != dtype or values.size != size:
            raise Unusual(f"storage {key} of {values.size} elements, not {size}")
        return self.storages[key]


def _rebuild_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> StoredTensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides) or hooks or metadata:
        raise Unusual("a tensor with more than numbers")
    tensor = StoredTensor(storage, offset, tuple(shape), tuple(strides), bool(requires_grad))
    if min((offset, *shape, *strides)) < 0 or math.prod(shape) > storage.values.size:
        raise Unusual(f"a tensor of shape {shape} in a storage of {storage.values.size}")
    _ = tensor.array  # NumPy checks that it lies inside
    return tensor


def _rebuild_parameter(data: StoredTensor, requires_grad: bool, hooks: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor) or hooks:
        raise Unusual("a parameter with more than numbers")
    return StoredTensor(data.storage, data.offset, data.shape, data.strides, bool(requires_grad), parameter=True)


def write_archive(value: Any) -> bytes:
    """``value`` as a PyTorch file; NumPy arrays in it become tensors. Raises Unusual."""
    writer = _Writer()
    pickled = writer.dump(value)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        _add(file, buffer, "data.pkl", pickled)
        _add(file, buffer, "byteorder", b"little")
        for key, storage in enumerate(writer.storages.values()):
            _add(file, buffer, f"data/{key}", storage.values.tobytes())
        _add(file, buffer, "version", b"3\n")
    return buffer.getvalue()


def _add(file: zipfile.ZipFile, buffer: io.BytesIO, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    start = buffer.tell() + 30 + len(entry.filename) + 4  # behind the entry's header and an extra field's own
    padding = -start % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    file.writestr(entry, data)


class _Writer:
    """Writes pickle's protocol 2 for the values that `read_archive` makes, naming classes without importing them."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.storages: dict[int, Storage] = {}
        self.keys: dict[int, str] = {}

    def dump(self, value: Any) -> bytes:
        self.out += b"\x80\x02"
        self.put(value)
        self.out += b"."
        return bytes(self.out)

    def put(self, value: Any) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif kind is int:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(data) > 255:
                raise Unusual(f"an integer of {len(data)} bytes")
            self.out += b"\x8a" + bytes([len(data)]) + data
        elif kind is float:
            self.out += b"G" + struct.pack(">d", value)
        elif kind is str:
            data = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(data)) + data
        elif kind is tuple:
            self.marked(value, b"t")
        elif kind is list:
            self.out += b"]"
            self.marked(value, b"e")
        elif kind is dict or kind is OrderedDict:
            self.mapping(value)
        elif kind is Name:
            self.out += f"c{value.module}\n{value.name}\n".encode()
        elif kind is StoredTensor:
            self.tensor(value)
        elif isinstance(value, np.ndarray):
            values = np.ascontiguousarray(value)
            steps = tuple(step // value.itemsize for step in values.reshape(value.shape).strides)
            self.tensor(StoredTensor(Storage(values.reshape(-1)), 0, value.shape, steps, requires_grad=False))
        else:
            raise Unusual(f"a {kind.__name__}")

    def marked(self, values: Any, end: bytes) -> None:
        self.out += b"("
        for value in values:
            self.put(value)
        self.out += end

    def mapping(self, value: dict[Any, Any]) -> None:
        if type(value) is OrderedDict:
            self.put(Name("collections", "OrderedDict"))
            self.out += b")R"
            if vars(value):
                self.mapping(vars(value))
                self.out += b"b"
        else:
            self.out += b"}"
        self.marked((part for item in value.items() for part in item), b"u")

    def tensor(self, tensor: StoredTensor) -> None:
        storage = tensor.storage
        key = self.keys.setdefault(id(storage), str(len(self.keys)))
        self.storages[id(storage)] = storage  # also keeps it alive: ids are of living objects only
        name = _STORAGE_OF.get(storage.values.dtype)
        if name is None:
            raise Unusual(f"a tensor of {storage.values.dtype}")
        if tensor.parameter:
            self.put(Name("torch._utils", "_rebuild_parameter"))
            self.out += b"("
        self.put(Name("torch._utils", "_rebuild_tensor_v2"))
        self.out += b"("
        self.put(("storage", Name("torch", name), key, "cpu", storage.values.size))
        self.out += b"Q"
        for part in (tensor.offset, tensor.shape, tensor.strides, tensor.requires_grad and not tensor.parameter):
            self.put(part)
        self.mapping(OrderedDict())
        self.out += b"tR"
        if tensor.parameter:
            self.put(tensor.requires_grad)
            self.mapping(OrderedDict())
            self.out += b"tR"
