"""What quantizing each layer costs, and which layers are worth more bits."""

from .measure import sensitivity
from .model import LayerSensitivity, Proposal, Sensitivity

__all__ = ["LayerSensitivity", "Proposal", "Sensitivity", "sensitivity"]
