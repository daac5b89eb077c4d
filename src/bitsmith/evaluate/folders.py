"""Folders of images in ImageNet's form: one sub-folder per class; and which class each one is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
_FORMS = (
    "a .json or .yaml file of folder: class (or class: folder, or class: [folder, name], as ImageNet's has it), or a "
    "text file with a folder and its class on each line, or with all folders in the order of their classes"
)


def scan_folder(folder: Path, label_map: Mapping[str, int] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """All images of a folder with one sub-folder per class: paths, class indices, and the folders' names.

    Classes are numbered in the sorted order of their folders' names, as torchvision and timm number them, or as
    ``label_map`` says.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in folder.iterdir())
        found = f"{loose} images lie directly in it" if loose else "it has no sub-folders and no images"
        raise DataError(
            f"the data folder {str(folder)!r} has no classes: {found}. It should have one sub-folder per "
            f"class, such as {folder / 'cat' / '001.jpg'}"
        )
    if label_map is not None and (unknown := [name for name in classes if name not in label_map]):
        raise DataError(
            f"{len(unknown)} of the {len(classes)} class folders in {str(folder)!r} are not in the label map, such as "
            f"{', '.join(map(repr, unknown[:3]))}; it has {', '.join(map(repr, list(label_map)[:3]))} ..."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in EXTENSIONS)
        paths += files
        labels += [index if label_map is None else label_map[name]] * len(files)
    if not paths:
        raise DataError(
            f"the {len(classes)} class folders in {str(folder)!r} hold no images: "
            f"looked for {', '.join(sorted(EXTENSIONS))}"
        )
    return paths, labels, classes


def read_label_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """Folder name to class index, from a file in one of the usual forms; DataError says where it is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".json", ".yaml", ".yml"):
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            return _from_mapping(data, path)
    except FileNotFoundError:
        raise DataError(f"the label map {str(path)!r} does not exist (looked in {Path.cwd()})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"the label map {str(path)!r} cannot be read: {error}. It may be {_FORMS}") from error
    return _from_lines(text, path)


def _from_mapping(data: Any, path: Path) -> dict[str, int]:
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return _unique([(name, index) for index, name in enumerate(data)], path)
    if not isinstance(data, dict) or not data:
        raise DataError(f"the label map {str(path)!r} holds no mapping: it may be {_FORMS}")
    pairs = []
    for key, value in data.items():
        # ImageNet's usual file is {"0": ["n01440764", "tench"], ...}; torchvision's class_to_idx the other way round.
        folder, index = (value[0], key) if isinstance(value, list) and value else (key, value)
        if isinstance(folder, int) or (isinstance(value, str) and not value.lstrip("-").isdigit()):
            folder, index = index, folder
        pairs.append((str(folder), _index(index, f"{key!r}: {value!r}", path)))
    return _unique(pairs, path)


def _from_lines(text: str, path: Path) -> dict[str, int]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"the label map {str(path)!r} is empty: it may be {_FORMS}")
    split = [(number, line, _folder_and_class(line)) for number, line in lines]
    if not any(pair for _, _, pair in split):
        return _unique([(line, index) for index, (_, line) in enumerate(lines)], path)
    pairs = []
    for number, line, pair in split:
        if pair is None:
            raise DataError(
                f"line {number} of the label map {str(path)!r} is {line!r}, not a folder and its class. It may be "
                f"{_FORMS}"
            )
        pairs.append(pair)
    return _unique(pairs, path)


def _folder_and_class(line: str) -> tuple[str, int] | None:
    """``folder 3``, ``folder,3`` or ``3,folder``; folders may have spaces."""
    separator = next((mark for mark in ("\t", ",") if mark in line), None)
    words = [word.strip() for word in (line.split(separator) if separator else line.rsplit(None, 1))]
    if len(words) == 2 and words[1].isdigit():
        return words[0], int(words[1])
    if len(words) == 2 and separator and words[0].isdigit():
        return words[1], int(words[0])
    return None


def _index(value: Any, where: str, path: Path) -> int:
    try:
        index = int(value) if not isinstance(value, float | bool) else -1
    except (TypeError, ValueError):
        index = -1
    if index < 0:
        raise DataError(f"the label map {str(path)!r}: {where} gives no class, a whole number from 0 on")
    return index


def _unique(pairs: list[tuple[str, int]], path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for folder, index in pairs:
        if found.setdefault(folder, index) != index:
            raise DataError(f"the label map {str(path)!r} gives {folder!r} two classes: {found[folder]} and {index}")
    return found
