"""What quantizing each layer costs: plain data that serializes to JSON."""

from __future__ import annotations

import io

import yaml
from pydantic import BaseModel, ConfigDict, Field

from ..recipe import Override


class LayerSensitivity(BaseModel):
    """One layer: SQNR in dB at its own output (local, propagated) and at the model's; None: no noise at all."""

    model_config = ConfigDict(extra="forbid")

    name: str
    type: str
    macs: int = 0
    weight_bits: int | None = None
    input_bits: int | None = None
    local_db: float | None = Field(default=None, description="at its output, everything before it in float")
    propagated_db: float | None = Field(default=None, description="at its output, everything before it quantized")
    alone_db: float | None = Field(default=None, description="at the model's output, only this layer quantized")
    left_out_db: float | None = Field(default=None, description="at the model's output, all but this layer quantized")


class Proposal(BaseModel):
    """Layers to keep at more bits, the most rewarding first, and what the outputs gain by it."""

    model_config = ConfigDict(extra="forbid")

    layers: list[str] = []
    keep: str = Field(default="float", description="'float' or '16 bits'")
    sqnr_db: list[float] = Field(default=[], description="at the outputs, with the first 1, 2 ... layers kept in float")
    macs_fraction: float = Field(default=0.0, description="their share of the multiply-accumulates")
    overrides: list[Override] = []
    reason: str = ""

    def to_yaml(self) -> str:
        """The overrides as YAML, to be pasted into a recipe."""
        data = [override.model_dump(mode="json", exclude_defaults=True) for override in self.overrides]
        return yaml.safe_dump({"overrides": data}, sort_keys=False)


class Sensitivity(BaseModel):
    """SQNR in dB at the model's outputs for all of it quantized, for one side alone, and layer by layer.

    ``print`` shows it as a table.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: str
    target: str
    samples: int
    all_db: float | None = Field(default=None, description="weights and activations of every layer quantized")
    weights_only_db: float | None = None
    activations_only_db: float | None = None
    layers: list[LayerSensitivity] = []
    proposal: Proposal = Proposal()
    seconds: float = 0.0

    @property
    def ranked(self) -> list[LayerSensitivity]:
        """The layers, the most harmful first: those that leave the least signal when they alone are quantized."""
        return sorted(self.layers, key=lambda layer: float("inf") if layer.alone_db is None else layer.alone_db)

    def __str__(self) -> str:
        """A table, the most harmful layers first, 100 columns wide."""
        from rich.console import Console

        from ..report.render import sensitivity_view

        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        console.print(sensitivity_view(self))
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
