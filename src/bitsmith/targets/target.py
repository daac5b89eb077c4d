"""A device or runtime as data: which numbers it takes, what it runs in integers, and by which law."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_serializer

from ..errors import RecipeError
from ..grid import FloatFormat, Grid, IntFormat, TensorSpec
from ..recipe import Override, Recipe


class ChipLimits(BaseModel):
    """What fits into a convolutional accelerator whose processors own their memories.

    ``kernel_words``: weight memory of one processor, in kernels of 9 bytes; ``data_bytes``: data memory that four
    processors share; ``bias_bytes``: of one group of 16 processors; ``kernels``: kernel sizes by operator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    processors: int = 64
    processors_per_memory: int = 4
    processors_per_group: int = 16
    kernel_words: int
    data_bytes: int
    bias_bytes: int
    channels: int = 1024
    rows_and_columns: int
    flattened: int = 256
    padding: int = 2
    pool: int = 16
    dilation_1d: int
    kernels: dict[str, tuple[int, ...]] = {"conv1d": tuple(range(1, 10)), "conv2d": (1, 3), "convtranspose2d": (3,)}
    depthwise: bool = False
    unfused_pool_passes: int | None = None
    binary_weights: bool = False

    @property
    def weight_bytes(self) -> int:
        """Weight memory of the whole chip."""
        return self.processors * self.kernel_words * 9


class TidlDevice(BaseModel):
    """What a device asks of files for TI's TIDL import, beyond numbers.

    ``po2``: scales are powers of two, without zero points, one for each tensor of weights. ``lookup_tables``:
    sigmoid, tanh, GELU, softmax and ELU run, from tables. ``deconv_16bit``: transposed convolutions run with 16 bits
    too. ``stride_3``: convolutions of 3 x 3 with stride 3 run. ``scale_type``: the compile option
    ``quantization_scale_type``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    po2: bool
    lookup_tables: bool = True
    deconv_16bit: bool = True
    stride_3: bool = True

    @property
    def scale_type(self) -> int:
        """1: powers of two; 4: asymmetric with a weight scale per channel."""
        return 1 if self.po2 else 4


class Target(BaseModel):
    """What an exported model meets.

    ``integer_operators``: operators that the runtime executes on codes, given operands of ``integer_bits``.
    ``float_output``: of those, the ones that can hand their accumulator on as float. ``float_on_codes``: layers
    with float kernels that sum products in float32 in some order, so that codes of 8 bits come out exact.
    ``unsigned_codes``: activations are stored unsigned (x86 has only u8 x s8 products). ``rescales``: add and
    concat take operands of different scales. ``exact``: the law by which integer results reach their output grid
    (``bitsmith.integer.laws``) is known to the bit, so that file and integer executor must agree on every output.
    ``law``: whose arithmetic that is. ``wide_bits``: width of an accumulator that a layer hands on as it is.
    ``keeps_scale``: operators whose result has the scale of their operands. ``shifts``: results are scaled by powers
    of two alone, of these exponents, so that weight scales follow those of the activations. ``bias_unit``: a bias of
    1 in steps of the accumulator. ``average_rounding``: average pooling rounds, instead of cutting toward zero.
    ``limits``: what fits into a chip. ``per_tensor``: operators that run in integers only where their weights share
    one scale; ``tensor_weights``: operators whose weights get one scale, whatever the recipe says.
    ``granularities``: how fine weight scales may be; ``symmetric_weights``: without zero points. ``all_ranges``: every
    tensor needs a grid, outputs included. ``same_signs``: both operands and the result of a matmul are signed.
    ``tidl``: files keep the rules of TI's import.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    engine: Literal["onnxruntime", "openvino", "torch", "ai8x", "none"]
    law: Literal["onnxruntime", "torch", "max78000"] = "onnxruntime"
    default_recipe: str = "int8"
    weight_bits: tuple[int, ...] = tuple(range(2, 17))
    activation_bits: tuple[int, ...] = tuple(range(2, 17))
    floats: bool = True
    scales: tuple[Literal["float32", "po2"], ...] = ("float32", "po2")
    symmetric_activations: bool = False
    integer_operators: frozenset[str]
    integer_bits: tuple[int, ...] = (8,)
    float_output: frozenset[str] = frozenset()
    float_on_codes: frozenset[str] = frozenset()
    unsigned_codes: bool = False
    rescales: bool = True
    exact: bool = False
    keeps_scale: frozenset[str] = frozenset()
    shifts: tuple[int, int] | None = None
    average_rounding: bool = False
    wide_bits: int | None = None
    bias_unit: int = 1
    per_tensor: frozenset[str] = frozenset()
    tensor_weights: frozenset[str] = frozenset()
    granularities: tuple[Literal["tensor", "channel", "group"], ...] = ("tensor", "channel", "group")
    symmetric_weights: bool = False
    all_ranges: bool = False
    same_signs: bool = False
    tidl: TidlDevice | None = None
    bias_bits: int = 32
    accumulator_bits: int = 32
    limits: ChipLimits | None = None
    notes: tuple[str, ...] = ()

    @field_serializer(
        "integer_operators", "float_output", "float_on_codes", "keeps_scale", "per_tensor", "tensor_weights",
        when_used="json",
    )  # fmt: skip
    def _in_order(self, names: frozenset[str]) -> list[str]:
        """Sets in one order, so that the same model is saved as the same file."""
        return sorted(names)

    @property
    def runtime(self) -> str:
        """What is asked here what runs in integers: for TI's devices onnxruntime, which checks their files."""
        return self.name if self.tidl is None else "onnxruntime"

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this target has no numbers for."""
        if self.shifts is not None and recipe.step("reestimate_batch_norm"):
            raise RecipeError(
                f"target {self.name} only shifts: step reestimate_batch_norm would give every channel a factor; use "
                "bias_correction"
            )
        parts: tuple[Recipe | Override, ...] = (recipe, *recipe.overrides)
        for part in parts:
            if part.weights is not None:
                self._check_spec("weights", part.weights, self.weight_bits)
            if part.activations is not None:
                self._check_spec("activations", part.activations, self.activation_bits)
            if part.bias is not None and part.bias.format.bits > self.bias_bits:
                raise RecipeError(
                    f"target {self.name} has biases of {self.bias_bits} bits at most, but the recipe has "
                    f"{part.bias.format.bits}"
                )
        if self.all_ranges or self.limits is not None:
            self._check_integers_alone(recipe)

    def _check_integers_alone(self, recipe: Recipe) -> None:
        missing = "activations" if recipe.activations is None else "biases" if recipe.bias is None else None
        missing = "results of layers" if recipe.placement == "layerwise" else missing
        if missing is not None:
            raise RecipeError(
                f"target {self.name} computes in integers alone, but recipe {recipe.name!r} (placement "
                f"{recipe.placement!r}) leaves {missing} in float; its own recipe is {self.default_recipe!r}"
            )

    def _check_spec(self, role: str, spec: TensorSpec, widths: tuple[int, ...]) -> None:
        if isinstance(spec.format, FloatFormat):
            if not self.floats:
                raise RecipeError(f"target {self.name} has no small floats, but the recipe's {role} are {spec.format}")
            return
        if spec.format.bits not in widths:
            raise RecipeError(
                f"target {self.name} takes {role} of {_span(widths)} bits, but the recipe has {spec.format.bits}; "
                f"its own recipe is {self.default_recipe!r}"
            )
        if spec.scale not in self.scales:
            raise RecipeError(
                f"target {self.name} takes scales {self.scales}, but the recipe's {role} have {spec.scale}"
            )
        if role == "weights" and spec.granularity not in self.granularities:
            raise RecipeError(
                f"target {self.name} takes weight scales per {' or '.join(self.granularities)}, but the recipe's are "
                f"per {spec.granularity}; its own recipe is {self.default_recipe!r}"
            )
        if role == "weights" and self.symmetric_weights and not spec.symmetric:
            raise RecipeError(
                f"target {self.name} has no zero points of weights: make the recipe's weights symmetric "
                "(weights: {symmetric: true}; for bitsmith evaluate --weight-quant-type sym), or use its own recipe, "
                f"{self.default_recipe!r}"
            )
        if role == "activations" and self.symmetric_activations and not spec.symmetric:
            raise RecipeError(
                f"target {self.name} has no zero points: make the recipe's activations symmetric, or use its own "
                f"recipe, {self.default_recipe!r}"
            )

    def runs_in_integers(self, operator: str, *grids: Grid | None) -> bool:
        """Whether the runtime executes this operator on codes of these grids."""
        widths = {*self.integer_bits, self.wide_bits}
        if operator in self.per_tensor and any(grid is not None and grid.axis is not None for grid in grids):
            return False
        return operator in self.integer_operators and all(
            grid is not None and isinstance(grid.format, IntFormat) and grid.format.bits in widths for grid in grids
        )


def _span(widths: tuple[int, ...]) -> str:
    contiguous = widths == tuple(range(widths[0], widths[-1] + 1)) and len(widths) > 2
    return f"{widths[0]} to {widths[-1]}" if contiguous else " or ".join(map(str, widths))
