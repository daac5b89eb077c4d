"""The user's own code by name: ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BitsmithError


def load_callable(spec: str, what: str, error: type[BitsmithError]) -> Callable[..., Any]:
    """The callable that ``spec`` names; ``what`` it is for, and the ``error`` to raise, are the caller's.

    >>> load_callable("math:sqrt", "a function", BitsmithError)(9.0)
    3.0
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise error(f"{spec!r} does not name {what}: write 'file.py:name' or 'package.module:name'")
    module = _import_file(place, what, error) if place.endswith(".py") else _import_module(place, what, error)
    found = getattr(module, name, None)
    if found is None:
        public = [key for key in vars(module) if not key.startswith("_") and callable(getattr(module, key))]
        offers = f"; it has {', '.join(sorted(public)[:12])}" if public else ""
        raise error(f"{place!r} has no {name!r} to be {what}{offers}")
    if not callable(found):
        raise error(f"{spec!r} is a {type(found).__name__}, not {what}: it must be callable")
    return found  # type: ignore[no-any-return]


def call_factory(spec: str, what: str, error: type[BitsmithError]) -> Any:
    """What the callable named by ``spec`` returns when it is called without arguments."""
    factory = load_callable(spec, what, error)
    with _importable(_folder_of(spec)):
        try:
            return factory()
        except Exception as cause:
            raise error(f"{spec!r} raised {_describe(cause)}") from cause


def _import_file(place: str, what: str, error: type[BitsmithError]) -> ModuleType:
    """Run ``file.py`` as a module of its own; its neighbours can be imported, as under ``python file.py``."""
    path = Path(place)
    if not path.is_file():
        raise error(f"{place!r}, which should hold {what}, is not a file (looked in {Path.cwd()})")
    name = f"bitsmith_user_{path.stem}_{abs(hash(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and inspect look a class's module up there
    with _importable(path.resolve().parent):
        try:
            module_spec.loader.exec_module(module)
        except Exception as cause:
            del sys.modules[name]
            raise error(f"{place!r} cannot be run: it raised {_describe(cause)}") from cause
    return module


def _import_module(place: str, what: str, error: type[BitsmithError]) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as cause:
            if cause.name != place.partition(".")[0] and cause.name != place:
                raise error(f"{place!r} cannot be imported: it needs the module {cause.name!r}") from cause
            hint = f"; did you mean '{place}.py'?" if Path(f"{place}.py").is_file() else ""
            raise error(
                f"there is no module {place!r} to hold {what}: install it, run from the folder that has it, "
                f"or name a file as 'file.py:name'{hint}"
            ) from cause
        except Exception as cause:
            raise error(f"{place!r} cannot be imported: it raised {_describe(cause)}") from cause


def _folder_of(spec: str) -> Path:
    place = spec.rpartition(":")[0]
    return Path(place).resolve().parent if place.endswith(".py") else Path.cwd()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Have ``folder`` on the import path for a while; a console script's own path lacks the user's folder."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _describe(error: BaseException) -> str:
    """The error, and the line of the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
