"""Proof that a file computes what was measured."""

from .certificate import Certificate, OutputComparison
from .engines import Engine, open_engine
from .folder import save_evidence, verify_folder
from .verify import verify

__all__ = [
    "Certificate",
    "Engine",
    "OutputComparison",
    "open_engine",
    "save_evidence",
    "verify",
    "verify_folder",
]
