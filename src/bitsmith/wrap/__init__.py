"""Models in the style of TI's wrappers: calibrated or trained by running them, converted, exported."""

from .ptq import PTQModel

__all__ = ["PTQModel"]
