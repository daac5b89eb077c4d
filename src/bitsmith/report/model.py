"""What was done, layer by layer, what it cost and gained: plain data that serializes to JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LayerReport(BaseModel):
    """One compute layer: how it is quantized and what that costs."""

    model_config = ConfigDict(extra="forbid")

    name: str
    type: str
    weight_bits: int | None = None
    input_bits: int | None = None
    output_bits: int | None = None
    macs: int = Field(default=0, description="multiply-accumulates for one sample")
    integer: bool = Field(default=False, description="whether its multiply-accumulates run in integers")
    sqnr_db: float | None = Field(default=None, description="signal to quantization noise at its output")
    weight_sqnr_db: float | None = None
    note: str = ""


class Coverage(BaseModel):
    """How many of the multiply-accumulates have both operands on grids, and how many the runtime does on codes."""

    model_config = ConfigDict(extra="forbid")

    total_macs: int = 0
    quantized_macs: int = Field(default=0, description="both operands are quantized")
    integer_macs: int = Field(default=0, description="of those, what the runtime multiplies as integers")
    float_layers: list[str] = []
    runtime: str = Field(default="the target", description="the target, or what checks its files here")

    @property
    def is_checked_elsewhere(self) -> bool:
        """Whether what runs here only checks the files of a device: its speed says nothing of the device's."""
        return self.runtime != "the target"

    @property
    def fraction(self) -> float:
        """Share of the multiply-accumulates that the runtime does in integers, 0 to 1."""
        return self.integer_macs / self.total_macs if self.total_macs else 0.0

    @property
    def quantized_fraction(self) -> float:
        """Share of the multiply-accumulates whose operands are quantized, 0 to 1."""
        return self.quantized_macs / self.total_macs if self.total_macs else 0.0


class StepReport(BaseModel):
    """What one step of the recipe did to one layer."""

    model_config = ConfigDict(extra="forbid")

    step: str
    layer: str
    error_before: float = Field(default=0.0, description="squared error of the layer's output, nearest rounding")
    error_after: float = Field(default=0.0, description="the same after the step")
    seconds: float = 0.0
    undone: bool = Field(default=False, description="the error grew: the layer was put back as it was")
    skipped: str = Field(default="", description="why the step does not apply to the layer")
    note: str = Field(default="", description="what the step had to do otherwise than asked")


class RangeReport(BaseModel):
    """Which range rule won for a tensor under ``range: auto``."""

    model_config = ConfigDict(extra="forbid")

    tensor: str
    rule: str
    errors: dict[str, float] = Field(default={}, description="squared output error of every rule over the signal")


class Report(BaseModel):
    """The whole story of one quantization; ``q.report``."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = ""
    target: str = ""
    placement: str = ""
    samples: int = 0
    coverage: Coverage = Coverage()
    output_sqnr_db: float | None = None
    chance_level: bool = Field(default=False, description="the outputs are no better than constant ones")
    layers: list[LayerReport] = []
    steps: list[StepReport] = []
    ranges: list[RangeReport] = []
    notes: list[str] = []
    seconds: dict[str, float] = {}

    def __str__(self) -> str:
        """The report as a table, 100 columns wide; ``repr`` has every field."""
        from .render import report_text

        return report_text(self)
