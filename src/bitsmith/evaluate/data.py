"""Calibration and validation data by name, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ..errors import DataError
from .array_files import SUFFIXES, read_arrays
from .factory import call_factory
from .folders import read_label_map, scan_folder
from .images import Preprocess, read_batches

FORMS = (
    "a folder with one sub-folder of images per class, an .npz or .safetensors file with x and y, or file.py:factory"
)
BATCH = 50


@runtime_checkable
class Data(Protocol):
    """Batches ``(x, y)``, or ``x`` alone where the right answers are not known, any number of times."""

    @property
    def name(self) -> str:
        """Where it comes from, as the user wrote it."""
        ...

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """From the first batch on."""
        ...


@dataclass(frozen=True)
class ArrayData:
    """Samples in memory. ``indices`` are those that take part, in this order; None means all.

    ``note`` says how the values were converted, if they were.
    """

    x: Tensor
    y: Tensor | None = None
    name: str = "data in memory"
    batch: int = BATCH
    indices: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.y is not None and len(self.y) != len(self.x):
            raise DataError(f"{self.name}: x has {len(self.x)} samples, but y has {len(self.y)}")
        if not len(self.x):
            raise DataError(f"{self.name} is empty: x has the shape {tuple(self.x.shape)}")

    @property
    def labels(self) -> list[int] | None:
        """The classes of all samples, where ``y`` is one integer for each."""
        return self.y.tolist() if self.y is not None and is_labels(self.y) else None

    @property
    def total(self) -> int:
        """How many samples the source has, selected or not."""
        return len(self.x)

    def __len__(self) -> int:
        return -(-_count(self) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        for chosen in _chunks(self):
            x = self.x[chosen]
            x = x if self.preprocess is None else self.preprocess.normalize(x)
            yield x if self.y is None else (x, self.y[chosen])


@dataclass(frozen=True)
class FolderData:
    """Images on disk, read batch by batch by ``workers`` threads (None: one for each core)."""

    paths: Sequence[Path]
    labels: list[int]
    classes: list[str]
    preprocess: Preprocess
    name: str
    batch: int = BATCH
    indices: tuple[int, ...] | None = None
    workers: int | None = None
    mapped: bool = False  # classes are numbered by a file, not by the order of their names
    note: str | None = None

    @property
    def total(self) -> int:
        """How many samples the source has, selected or not."""
        return len(self.paths)

    def __len__(self) -> int:
        return -(-_count(self) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        selected = [self.paths[i] for i in _selection(self)]
        chunks = list(_chunks(self))
        batches = [[self.paths[i] for i in chosen] for chosen in chunks]
        for chosen, x in zip(chunks, read_batches(batches, self.preprocess, selected, self.workers)):
            yield x, torch.tensor([self.labels[i] for i in chosen])


@dataclass(frozen=True)
class IterableData:
    """What a user's factory returned: any iterable of batches, cut after ``samples`` samples."""

    source: Iterable[Any]
    name: str
    samples: int | None = None
    _kept: list[Any] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        if self.samples is not None or not hasattr(self.source, "__len__"):
            return sum(1 for _ in self)
        return len(cast(Sized, self.source))

    def __iter__(self) -> Iterator[Any]:
        left = self.samples
        # A generator can be run through once only, so what it gives is kept.
        for item in self._replayable():
            if left is not None:
                if left <= 0:
                    return
                item = _head(item, left)
                left -= batch_size(item)
            yield item

    def _replayable(self) -> Iterable[Any]:
        if not isinstance(self.source, Iterator):
            return self.source
        if not self._kept:
            left = self.samples
            for item in self.source:
                self._kept.append(item)
                left = None if left is None else left - batch_size(item)
                if left is not None and left <= 0:
                    break
        return self._kept


def load_data(
    spec: str,
    *,
    samples: int | None = None,
    preprocess: Preprocess | None = None,
    batch: int = BATCH,
    seed: int = 0,
    exclude: Data | None = None,
    workers: int | None = None,
    label_map: str | os.PathLike[str] | None = None,
) -> Data:
    """The data that ``spec`` names, cut to ``samples`` drawn evenly from all classes by ``seed``.

    Where ``samples`` are asked for, they come with the classes taking turns, also where there are no more than these.

    ``spec`` is a folder with one sub-folder of images per class, an ``.npz`` or ``.safetensors`` file with
    ``x`` and ``y``, or ``file.py:factory`` for any iterable of batches. In files, float ``x`` is used as it
    is (in float32); uint8 ``x`` is taken for images and goes through the mean and std of ``preprocess``: what
    was converted is told in the result's ``note``. Samples of the same source that ``exclude`` uses are left out.
    Folders are read by ``workers`` threads (None: one for each core; 0: none), and ``label_map`` is a file that says
    which class each sub-folder is, where that is not the order of their names.
    """
    if samples is not None and samples < 1:
        raise DataError(f"{samples} samples of {spec!r} were asked for: at least one is needed")
    preprocess = preprocess or Preprocess()
    path = check_source(spec)
    source: ArrayData | FolderData
    if path is None:
        return _from_factory(spec, samples)
    if path.is_dir():
        paths, labels, classes = scan_folder(path, None if label_map is None else read_label_map(label_map))
        source = FolderData(
            paths, labels, classes, preprocess, name=spec, batch=batch, workers=workers, mapped=label_map is not None,
            note=_empty_classes(path, paths, classes),
        )  # fmt: skip
    elif label_map is not None:
        raise DataError(f"{spec!r} has no class folders for the label map to number: its labels are in it")
    else:
        source = _read_arrays(path, preprocess, batch)
    return _selected(source, samples, seed, exclude)


def check_source(spec: str) -> Path | None:
    """The folder or file that ``spec`` names, None for a factory; DataError where it is none of these."""
    path = Path(spec)
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return path
    if path.suffix in SUFFIXES:
        raise DataError(f"the data file {spec!r} does not exist (looked in {Path.cwd()})")
    if ":" in spec and not path.exists():
        return None
    problem = "is not data that Bitsmith reads" if path.exists() else f"does not exist (looked in {Path.cwd()})"
    raise DataError(f"{spec!r} {problem}: give {FORMS}")


def _empty_classes(folder: Path, paths: Sequence[Path], classes: Sequence[str]) -> str | None:
    filled = {path.relative_to(folder).parts[0] for path in paths}
    if not (empty := [name for name in classes if name not in filled]):
        return None
    names = ", ".join(map(repr, empty[:3])) + (" ..." if len(empty) > 3 else "")
    return f"{len(empty)} of the {len(classes)} class folders in {str(folder)!r} hold no images ({names}): they count"


def balanced_indices(labels: Sequence[int], samples: int, seed: int = 0) -> list[int]:
    """``samples`` indices, as evenly from all classes as these allow, drawn by ``seed``; classes take turns.

    >>> labels = [0] * 90 + [1] * 10
    >>> chosen = balanced_indices(labels, 8)
    >>> [labels[i] for i in chosen].count(1)
    4
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[int, list[int]] = {}
    for index in torch.randperm(len(labels), generator=generator).tolist():
        groups.setdefault(labels[index], []).append(index)
    chosen: list[int] = []
    for turn in range(max(map(len, groups.values()), default=0)):
        chosen += [group[turn] for group in groups.values() if turn < len(group)]
        if len(chosen) >= samples:
            break
    return chosen[:samples]


def is_labels(y: Tensor) -> bool:
    """Whether ``y`` holds one class index per sample."""
    return y.ndim == 1 and not y.is_floating_point() and y.dtype != torch.bool


def batch_size(item: Any) -> int:
    """Samples in a batch: the length of its first tensor.

    >>> batch_size((torch.zeros(3, 8), torch.zeros(3)))
    3
    """
    for leaf in torch.utils._pytree.tree_leaves(item):
        if isinstance(leaf, Tensor):
            return len(leaf) if leaf.ndim else 1
    return 1


def _head(item: Any, samples: int) -> Any:
    """The first ``samples`` samples of a batch."""
    if batch_size(item) <= samples:
        return item
    return torch.utils._pytree.tree_map(lambda leaf: leaf[:samples] if isinstance(leaf, Tensor) else leaf, item)


def _selection(data: ArrayData | FolderData) -> Sequence[int]:
    return range(data.total) if data.indices is None else data.indices


def _count(data: ArrayData | FolderData) -> int:
    return data.total if data.indices is None else len(data.indices)


def _chunks(data: ArrayData | FolderData) -> Iterator[list[int]]:
    selection = _selection(data)
    for start in range(0, len(selection), data.batch):
        yield list(selection[start : start + data.batch])


def _selected(
    source: ArrayData | FolderData, samples: int | None, seed: int, exclude: Data | None
) -> ArrayData | FolderData:
    """Cut to ``samples``; never the first ones, nor class by class: folders and many files are sorted by class."""
    candidates = list(range(source.total))
    if isinstance(exclude, ArrayData | FolderData) and exclude.name == source.name:
        used = set(_selection(exclude))
        candidates = [index for index in candidates if index not in used]
        if not candidates:
            raise DataError(
                f"all {source.total} samples of {source.name!r} are used for calibration, so none is left to "
                f"validate with: lower --calibration-samples or give other validation data"
            )
    if samples is not None:
        labels = source.labels or [0] * source.total
        chosen = balanced_indices([labels[index] for index in candidates], samples, seed)
        candidates = [candidates[index] for index in chosen]
    elif len(candidates) == source.total:
        return source
    return replace(source, indices=tuple(candidates))


def _from_factory(spec: str, samples: int | None) -> IterableData:
    source = call_factory(spec, "the data's factory", DataError)
    if isinstance(source, Tensor):
        source = [source]
    if not isinstance(source, Iterable):
        raise DataError(
            f"{spec!r} returned a {type(source).__name__}: it must return an iterable of batches, such as a DataLoader"
        )
    return IterableData(source, name=spec, samples=samples)


def _read_arrays(path: Path, preprocess: Preprocess, batch: int) -> ArrayData:
    tensors = read_arrays(path)
    if "x" not in tensors:
        raise DataError(
            f"{str(path)!r} has no array 'x' (it has {', '.join(sorted(tensors)) or 'nothing'}): "
            f"save the inputs as x and the labels as y"
        )
    x, y = tensors["x"], tensors.get("y")
    note = _conversion(x, path, preprocess)
    x, used = _inputs(x, path, preprocess)
    if y is not None and not y.is_floating_point():
        y = y.long()
        y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
    return ArrayData(x, y, name=str(path), batch=batch, preprocess=used, note=note)


def _conversion(x: Tensor, path: Path, preprocess: Preprocess) -> str | None:
    """What happens to ``x`` before the network sees it; None where it is taken as it is."""
    kind = str(x.dtype).removeprefix("torch.")
    if x.dtype == torch.uint8:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.std))
        moved = " moved from NHWC to NCHW," if _channels_last(x) else ""
        return (
            f"x in {str(path)!r} is uint8 and taken for images:{moved} divided by 255, less the mean ({mean}), "
            f"divided by the standard deviation ({std}), neither resized nor cropped"
        )
    if x.is_floating_point() and x.dtype != torch.float32:
        return f"x in {str(path)!r} is {kind}, converted to float32 without any scaling"
    return None


def _channels_last(x: Tensor) -> bool:
    """Whether images are NHWC, as image readers give them."""
    return x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)


def _inputs(x: Tensor, path: Path, preprocess: Preprocess) -> tuple[Tensor, Preprocess | None]:
    """``x`` in the type that the network takes, and whether its pixels still need their mean and std."""
    if x.ndim == 0:
        raise DataError(f"x in {str(path)!r} is a single number: its first dimension must count the samples")
    if x.dtype == torch.uint8:
        if _channels_last(x):
            x = x.permute(0, 3, 1, 2).contiguous()  # layout moves sums by a rounding, which GPTQ can make visible
        if x.ndim != 4:
            raise DataError(f"x in {str(path)!r} is uint8 of shape {tuple(x.shape)}: images are (N, C, H, W)")
        return x, preprocess
    if x.is_floating_point():
        x = x.float()
        bad = ~torch.isfinite(x).flatten(1).all(1) if x.ndim > 1 else ~torch.isfinite(x)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise DataError(
                f"{int(bad.sum())} of {len(x)} samples of x in {str(path)!r} hold NaN or infinity, first sample {first}"
            )
        return x, None
    if x.dtype in (torch.int32, torch.int64):  # token ids
        return x.long(), None
    raise DataError(
        f"x in {str(path)!r} is {str(x.dtype).removeprefix('torch.')}: save it as float32 inputs, uint8 "
        f"images or int64 token ids"
    )
