"""How one kind of tensor is quantized: a Format with a scale kind, a granularity and a range rule."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .formats import FloatFormat, Format

# Names that a RangeRule may have; ``bitsmith.ranges.register_range_rule`` adds to them.
RANGE_RULES = {"minmax", "moving_average", "percentile", "mse", "histogram_l2", "kl", "hqo", "auto"}


class RangeRule(BaseModel):
    """Which numbers the grid must cover: the name of a rule and its options.

    Names: ``minmax``, ``moving_average``, ``percentile``, ``mse``, ``histogram_l2``, ``kl`` for activations and
    ``minmax``, ``percentile``, ``mse``, ``hqo`` for weights (``bitsmith.ranges``), and those that you register there;
    ``auto`` tries several for each tensor and keeps the one with the least error at the outputs of the layers.
    ``limit`` cuts off a range that reaches further; with ``fixed`` the range is ``-limit .. limit`` whatever the rule
    finds, or ``0 .. limit`` where nothing can be negative.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "minmax"
    percentile: float = Field(default=99.999, gt=50.0, le=100.0)
    momentum: float = Field(default=0.1, gt=0.0, le=1.0)
    candidates: int = Field(default=80, ge=4, le=10_000)
    bins: int = Field(default=2048, ge=64, le=1 << 20)
    limit: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    fixed: bool = False

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RANGE_RULES:
            raise ValueError(
                f"no range rule is called {name!r}: known are {', '.join(sorted(RANGE_RULES))}; "
                "bitsmith.ranges.register_range_rule adds one of your own"
            )
        return name

    @model_validator(mode="after")
    def _fixed_at(self) -> RangeRule:
        if self.fixed and self.limit is None:
            raise ValueError("a fixed range needs its end: {limit: 4.0, fixed: true}")
        return self


class TensorSpec(BaseModel):
    """A Format plus everything that turns it into a grid for one tensor.

    ``symmetric`` fixes the zero point at 0 (an affine integer grid finds its own). With ``auto_unsigned`` a tensor
    that is known to be non-negative gets the unsigned format of the same width and zero point 0. Granularity
    ``"token"`` is a scale for each vector along the last axis, found at run time (``dynamic``).

    >>> from bitsmith.grid import IntFormat
    >>> TensorSpec(format=IntFormat(8), symmetric=True, granularity="channel").format.bits
    8
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format = Field(discriminator="kind")
    scale: Literal["float32", "po2"] = "float32"
    po2_rounding: Literal["ceil", "nearest"] = "ceil"
    symmetric: bool = True
    auto_unsigned: bool = True
    granularity: Literal["tensor", "channel", "group", "token"] = "tensor"
    axis: int | None = Field(default=None, description="channel or group axis; None: the operator's own")
    group_size: int | None = Field(default=None, ge=1)
    range: RangeRule = RangeRule()
    dynamic: bool = False

    @model_validator(mode="before")
    @classmethod
    def _format_kind(cls, data: Any) -> Any:
        """Let YAML write ``format: {bits: 8}`` without naming the kind."""
        if isinstance(data, dict) and isinstance(fmt := data.get("format"), dict) and "kind" not in fmt:
            kind = "float" if "exponent_bits" in fmt else "int"
            data = {**data, "format": {**fmt, "kind": kind}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> TensorSpec:
        if (self.group_size is not None) != (self.granularity == "group"):
            raise ValueError("group_size goes with granularity 'group', and only with it")
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity 'token' is found at run time: it goes with dynamic: true")
        if isinstance(self.format, FloatFormat) and not self.symmetric:
            raise ValueError("a float format has no zero point: symmetric must be true")
        return self
