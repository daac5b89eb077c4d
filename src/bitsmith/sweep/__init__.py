"""Many configurations of models and recipes: run once each, wherever there is room, and kept in one store."""

from .best import best_rows
from .grid import Sweep, load_sweep
from .run import run_sweep
from .store import Store, export_rows

__all__ = ["Store", "Sweep", "best_rows", "export_rows", "load_sweep", "run_sweep"]
