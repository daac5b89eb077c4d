"""The steps a recipe may list, each with its options; what they do is in ``prepare/`` and ``optimize/``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal["prepare", "weights", "blocks", "bias"]


Damping = Annotated[float, Field(gt=0.0, le=100.0)] | Literal["auto"]
_DAMPING = "added to the diagonal, as a share of its mean; auto: of 0.01, 0.1, 1, 10 the best for samples held out"
_SCALES = (
    "how many scales to try, from the range rule's own down to half of it; the least output error wins; "
    "None: 11 where weights have scales per group, else 1"
)


class _Step(BaseModel):
    """``stage`` is when a step runs; ``samples`` how many samples the quantized stream should follow for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[Stage]
    samples: ClassVar[int] = 128
    changes_bias: ClassVar[bool] = False  # layers without a bias get one
    name: str

    def __str__(self) -> str:
        options = self.model_dump(exclude={"name"}, exclude_defaults=True)
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else self.name


class FoldBatchNorm(_Step):
    """Fold batch norms into the layers beside them."""

    stage: ClassVar[Stage] = "prepare"
    name: Literal["fold_batch_norm"] = "fold_batch_norm"


class Equalize(_Step):
    """Cross-layer equalization (arXiv 1906.04721, section 4.1): one range for the layers on both sides of a channel.

    With ``objective`` "noise" the scales are those that leave the least noise at the outputs, to first order, and
    ``iterations`` and ``merge_bias`` have no meaning. Channels that reach a clip such as ReLU6 stay as they are,
    unless ``clips`` is "trade": then a clip may cut a channel elsewhere where that costs less than it gains, and the
    function is no longer quite the same.
    """

    stage: ClassVar[Stage] = "prepare"
    name: Literal["equalize"] = "equalize"
    iterations: int = Field(default=20, ge=1, le=1000, description="sweeps; it stops when nothing moves any more")
    merge_bias: bool = Field(default=False, description="let the bias of a channel count in its range")
    objective: Literal["range", "noise"] = "range"
    clips: Literal["keep", "trade"] = "keep"

    @model_validator(mode="after")
    def _consistent(self) -> Equalize:
        if self.clips == "trade" and self.objective == "range":
            raise ValueError("equalize: clips 'trade' weighs noise, so it belongs to objective 'noise'")
        if self.objective == "noise" and (given := {"iterations", "merge_bias"} & self.model_fields_set):
            raise ValueError(f"equalize: {', '.join(sorted(given))} belong to objective 'range'")
        return self


class EqualizeActivations(_Step):
    """Activation equalization, SmoothQuant (arXiv 2211.10438): from outlying activations into the weights."""

    stage: ClassVar[Stage] = "prepare"
    name: Literal["equalize_activations"] = "equalize_activations"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["search"] = Field(
        default="search", description="how much moves into the weights, 0 to 1; 'search': least output error, per layer"
    )
    insert: bool | None = Field(
        default=None,
        description="multiply where nothing before a layer can be scaled; None: under 'layerwise' everywhere, else "
        "only what is computed in float",
    )


class SplitChannels(_Step):
    """Outlier channel splitting (arXiv 1901.09504): channels with large weights become two with half of them each."""

    stage: ClassVar[Stage] = "prepare"
    name: Literal["split_channels"] = "split_channels"
    ratio: float = Field(default=0.02, gt=0.0, le=1.0, description="share of the channels that is split, rounded up")
    side: Literal["input", "output"] = Field(default="input", description="whose weights are halved")


class ColumnByColumn(_Step):
    """What the algorithms have in common that round weights column by column."""

    stage: ClassVar[Stage] = "weights"
    samples: ClassVar[int] = 512
    act_order: bool = Field(default=True, description="round the columns of the strongest inputs first")
    scales: int | None = Field(default=11, ge=1, le=64, description=_SCALES)
    block_size: int = Field(default=64, ge=1, description="columns whose effect on the rest is put off; memory only")
    accumulator_bits: int | None = Field(
        default=None, ge=4, le=64, description="no sum of products may leave this many bits, whatever the inputs"
    )


class Gptq(ColumnByColumn):
    """GPTQ (arXiv 2210.17323): round weights column by column; later columns make up for the error."""

    name: Literal["gptq"] = "gptq"
    scales: int | None = Field(default=None, ge=1, le=64, description=_SCALES)
    damping: Damping = Field(default=0.01, description=_DAMPING)
    asymmetric: bool = Field(
        default=False, description="make up for the error of the layer's inputs as well (arXiv 2504.02692)"
    )
    inputs: Literal["quantized", "float"] = Field(
        default="quantized", description="take the Hessian of what arrives through the quantized layers before, or not"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Gptq:
        if self.asymmetric and self.inputs == "float":
            raise ValueError("gptq: asymmetric makes up for the error of quantized inputs, so inputs cannot be float")
        return self


class Gpfq(ColumnByColumn):
    """GPFQ (arXiv 2201.11113): follow the float layer's output column by column, from quantized inputs."""

    name: Literal["gpfq"] = "gpfq"


class Qronos(ColumnByColumn):
    """Qronos (arXiv 2505.11695): take back the error of the layers before, then spread that of each column as GPTQ."""

    name: Literal["qronos"] = "qronos"
    damping: Damping = Field(default=0.01, description=_DAMPING)


Form = Literal["hard_sigmoid", "sigmoid", "linear"]


class _Learned(_Step):
    """What learning to round needs, by layer or by block.

    ``form`` is how a number between rounding down and up depends on what is learned: a stretched and clipped sigmoid
    (AdaRound, equation 23), a plain sigmoid, or ``linear``: rounded in the forward pass with a straight-through
    gradient (SignRound, arXiv 2309.05516). The first two are driven to 0 or 1 by ``regulariser``, whose exponent
    falls from ``beta_start`` to ``beta_end`` after the first ``warmup`` of the iterations. ``dtype`` bfloat16
    computes the forward pass so; ``device`` None stays where the model is.
    """

    stage: ClassVar[Stage] = "weights"
    samples: ClassVar[int] = 1024
    changes_bias: ClassVar[bool] = True
    form: Form = "hard_sigmoid"
    iterations: int = Field(default=1000, ge=1)
    lr: float | None = Field(default=None, gt=0.0, description="None: 0.05; for 'linear' 2 / iterations, falling to 0")
    regulariser: float = Field(default=20.0, ge=0.0, description="against a loss that is 1 for nearest rounding")
    beta_start: float = Field(default=20.0, ge=2.0)
    beta_end: float = Field(default=2.0, ge=1.0)
    warmup: float = Field(default=0.2, ge=0.0, lt=1.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    seed: int = 0

    def rate(self, progress: float) -> float:
        """The learning rate of the rounding when ``progress`` of the iterations are done."""
        if self.form == "linear":
            return (self.lr or 2.0 / self.iterations) * (1.0 - progress)
        return self.lr or 0.05


class LearnedRounding(_Learned):
    """AdaRound (arXiv 2004.10568): learn layer by layer which weights to round up.

    ``target`` is the layer's ``output``, whose squared error over all samples is a quadratic form of the weights (no
    minibatches: every iteration sees all the data), or what its ``activation`` function and Quantizer make of it,
    learned on minibatches of ``batch_size`` (default 32). ``inputs`` are of the quantized or the float stream.
    """

    name: Literal["learned_rounding"] = "learned_rounding"
    target: Literal["output", "activation"] = "output"
    inputs: Literal["quantized", "float"] = "quantized"
    batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _minibatches(self) -> LearnedRounding:
        if self.target == "output" and (self.batch_size is not None or self.dtype != "float32" or self.seed):
            raise ValueError(
                "batch_size, dtype and seed belong to target 'activation': the output's error over all samples is "
                "summed once, in float64"
            )
        return self


class Reconstruct(_Learned):
    """Block reconstruction (BRECQ, arXiv 2102.05426) with QDrop (arXiv 2203.05740).

    The rounding of a block's weights, its biases and the scales of its activations are learned together, so that
    the block's output is that of the float model. ``drop`` is how often an activation is left unquantized while
    learning. Blocks end where one value is alive; neighbours are joined while they have ``layers`` layers or less.
    A learning rate of 0 leaves biases or scales as they are. Where the quantized stream follows fewer than
    ``least_samples`` nothing is learned, and the report says so: of few samples a block learns the peculiarities.
    Behind a step that rounds layer by layer (GPTQ ...) it learns which weights to take back one step towards where they
    came from, on the scales that step has found.
    """

    stage: ClassVar[Stage] = "blocks"
    name: Literal["reconstruct"] = "reconstruct"
    layers: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    least_samples: int = Field(default=1, ge=1)
    drop: float = Field(default=0.5, ge=0.0, lt=1.0)
    lr_bias: float = Field(default=1e-3, ge=0.0, description="in standard deviations of the layer's output")
    lr_scale: float = Field(default=1e-3, ge=0.0, description="of the scale's logarithm")


class BiasCorrection(_Step):
    """Take the mean error of a layer's output out of its bias (arXiv 1906.04721, section 4.2)."""

    stage: ClassVar[Stage] = "bias"
    changes_bias: ClassVar[bool] = True
    name: Literal["bias_correction"] = "bias_correction"


class ReestimateBatchNorm(_Step):
    """Give every output channel its float mean and variance back: batch-norm statistics after quantization."""

    stage: ClassVar[Stage] = "bias"
    changes_bias: ClassVar[bool] = True
    name: Literal["reestimate_batch_norm"] = "reestimate_batch_norm"


Step = Annotated[
    FoldBatchNorm
    | Equalize
    | EqualizeActivations
    | SplitChannels
    | Gptq
    | Gpfq
    | Qronos
    | LearnedRounding
    | Reconstruct
    | BiasCorrection
    | ReestimateBatchNorm,
    Field(discriminator="name"),
]

_ORDER: tuple[Stage, ...] = ("prepare", "weights", "blocks", "bias")


def parse_step(value: Any) -> Any:
    """A step from its name, ``{name: options}`` or itself.

    >>> parse_step("gptq"), parse_step({"gptq": {}})
    ({'name': 'gptq'}, {'name': 'gptq'})
    """
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and "name" not in value and len(value) == 1:
        name, options = next(iter(value.items()))
        return {"name": name, **(options or {})}
    return value


def dump_step(step: _Step) -> Any:
    """A step as YAML has it: its name, or its name with the options that differ from their defaults."""
    options = step.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    return {step.name: options} if options else step.name


def check_steps(steps: tuple[_Step, ...]) -> None:
    """Refuse steps that are listed twice, in an order that cannot be followed, or that undo each other."""
    names = [step.name for step in steps]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"steps are listed twice: {', '.join(sorted(twice))}")
    if [step.stage for step in steps] != sorted((step.stage for step in steps), key=_ORDER.index):
        ordered = sorted(steps, key=lambda step: _ORDER.index(step.stage))
        raise ValueError(f"steps run in this order, list them so: {', '.join(step.name for step in ordered)}")
    for stage, does in (("weights", "round the weights"), ("bias", "correct the mean")):
        same = [step.name for step in steps if step.stage == stage]
        if len(same) > 1:
            raise ValueError(f"{' and '.join(same)} each {does}: keep one of them")
