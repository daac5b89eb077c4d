"""Finding the grids: one walk over the calibration data."""

from .calibrate import calibrate, parse_memory

__all__ = ["calibrate", "parse_memory"]
