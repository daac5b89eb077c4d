"""Examining a model before it is quantized, and mending what can be mended."""

from .examine import doctor
from .model import Diagnosis, Finding, Triage
from .subject import TrainingPlan
from .surgery import Change, Surgery, fix
from .triage import triage

__all__ = ["Change", "Diagnosis", "Finding", "Surgery", "TrainingPlan", "Triage", "doctor", "fix", "triage"]
