"""Many configurations of models and recipes: run once each, wherever there is room, and kept in one store."""

from .best import best_rows
from .grid import Sweep, load_sweep
from .local import LocalEngine
from .run import run_sweep
from .store import Store, export_rows
from .view import write_sweep_page

__all__ = ["LocalEngine", "Store", "Sweep", "best_rows", "export_rows", "load_sweep", "run_sweep", "write_sweep_page"]
