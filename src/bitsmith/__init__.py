"""Bitsmith: a trained PyTorch model in, a verified fixed-point model for a named target out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import BitsmithError
    from .model import QuantizedModel
    from .quantize import quantize
    from .recipe import Override, Recipe, load_recipe
    from .targets import Target, get_target, list_targets

# Public name -> module; imported at first use, so that `import bitsmith` costs next to nothing.
_PUBLIC = {
    "BitsmithError": "errors",
    "Override": "recipe",
    "QuantizedModel": "model",
    "Recipe": "recipe",
    "Target": "targets",
    "get_target": "targets",
    "list_targets": "targets",
    "load_recipe": "recipe",
    "quantize": "quantize",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitsmith' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "errors"]
