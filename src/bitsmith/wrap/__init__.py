"""Models in the style of TI's wrappers: calibrated or trained by running them, converted, exported."""

from .ptq import PTQModel
from .qat import QATModel

__all__ = ["PTQModel", "QATModel"]
