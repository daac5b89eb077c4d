"""What quantizers that train have in common: start, freezing, formats and state."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..grid import FloatFormat, Format, Grid, IntFormat, Quantizer, RangeRule, TensorSpec
from ..ranges import Histogram, activation_grid, solve_grid, weight_grid
from ..ranges.statistics import extremes
from .kernels import Clipping, StraightThrough, code_ends

_LEAST_BITS, _MOST_BITS = 2, 16


class TrainingQuantizer(Quantizer):
    """A Quantizer whose grid follows training; ``make_quantizer`` makes the kinds.

    It starts from a calibrated grid (``initialize``) or from the first tensor that it sees. ``grid`` is what
    ``forward`` quantizes to in eval mode; in train mode a moving average then takes in the batch. ``freeze`` fixes the
    grid: from then on learned numbers get no gradient (under ``torch.distributed`` gradients of zeros, since
    DistributedDataParallel waits for every parameter), and the grid stays, whatever an optimizer does with them.

    An unsigned grid from 0 of values known to be non-negative does what a ReLU in front would do, forward and backward:
    ``subsumes_relu``. All state is in buffers and Parameters; a fresh module loads the ``state_dict`` of any other of
    its kind.
    """

    kind: ClassVar[str]
    margin: ClassVar[float] = 0.0  # how many steps beyond the last code the gradient of x still passes
    frozen: Tensor
    started: Tensor
    codes: Tensor  # least code, greatest code, zero point of a symmetric grid; of no meaning for small floats

    def __init__(
        self, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
    ) -> None:
        super().__init__(spec, non_negative=non_negative)
        self.of_weight = of_weight
        self._check_spec()
        default = (1 if spec.granularity == "group" else 0) if of_weight else 1
        given = axis if spec.granularity == "channel" else None
        self.along = spec.axis if spec.axis is not None else default if given is None else given
        if non_negative and spec.auto_unsigned and isinstance(spec.format, IntFormat):
            self.format = IntFormat(spec.format.bits, signed=False)
        shape = () if spec.granularity == "tensor" else (0,)
        self.scale = torch.ones(shape)  # once frozen; always there, so that copies have the same buffers
        self.zero_point = torch.zeros(shape, dtype=torch.int32)
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("codes", torch.zeros(3, dtype=torch.int64))
        self._note_format(0)
        self._fixed: tuple[Tensor, int, Clipping] | None = None

    # What it starts from

    def initialize(self, grid: Grid) -> None:
        """Start from ``grid``, which calibration found; other widths than the spec's keep its clipping range.

        Raises ``RecipeError`` where the grid is not of the spec's kind (integer or small float, signed, granularity).
        """
        self._check_grid(grid)
        zero = grid.zero_point
        fixed = 0 if zero is None or not zero.numel() or not self._is_symmetric(grid) else int(zero.flatten()[0])
        if isinstance(grid.format, IntFormat) and isinstance(self.spec.format, IntFormat):
            bits, wanted = grid.format.bits, self.spec.format.bits
            low, high = clipping_range(grid, symmetric=self._is_symmetric(grid))
            self.format = grid.format
            self._note_format(fixed)
            if bits != wanted:
                self._set_width(wanted)
                grid = self._solve(low, high, grid.axis)
        self.started.fill_(True)
        self._begin_again(grid)

    def _begin_again(self, grid: Grid) -> None:
        """Start from a grid of ``self.format``; what is frozen is so again."""
        frozen = bool(self.frozen)
        self.frozen.fill_(False)
        self._keep(grid)
        self._begin(grid)
        if frozen:
            self.freeze()

    def _start_from(self, x: Tensor) -> bool:
        """Start from the first tensor; False where all of it is 0, which says nothing."""
        if not self.of_weight and not bool((x > 0).any() if self.non_negative else x.any()):
            return False
        spec = self.spec.model_copy(update={"range": self._first_rule()})
        if self.of_weight:
            grid = weight_grid(x, spec, self.along)
        elif self.spec.granularity == "tensor" and spec.range.name == "mse":
            statistic = Histogram(spec.range.bins)
            statistic.update(x.relu() if self.subsumes_relu else x)
            grid = activation_grid(statistic, spec, non_negative=self.non_negative)
        else:
            axis = self.along if self.spec.granularity == "channel" else None
            low, high = extremes(x, axis)
            if self.non_negative:
                low, high = torch.zeros_like(low), high.clamp(min=0.0)
            grid = solve_grid(low, high, spec, non_negative=self.non_negative, axis=axis)
        self.initialize(grid)
        self.synchronize()
        return True

    def _first_rule(self) -> RangeRule:
        return RangeRule(name="mse")

    # The forward pass

    @property
    def subsumes_relu(self) -> bool:
        """Whether forward and backward are those of a ReLU and this quantizer behind it."""
        least, zero = self.codes.tolist()[::2]
        unsigned = isinstance(self.format, IntFormat) and not self.format.signed
        return self.non_negative and unsigned and least == zero == 0

    @property
    def grid(self) -> Grid | None:
        """The grid that ``forward`` quantizes to in eval mode; None before there is one."""
        if not self.started:
            return None
        self._follow_codes()
        if self.frozen:
            return self._grid_of(self.scale)  # type: ignore[arg-type]
        return self._current()

    def _grid_of(self, scale: Tensor) -> Grid:
        """The grid of a scale, and of the zero point that is kept."""
        zero_point = self.zero_point if self._has_zero_point else None
        return Grid(self.format, scale, zero_point, self._grid_axis(), self.spec.group_size)

    def _keep(self, grid: Grid) -> None:
        zero = grid.zero_point
        self.scale = grid.scale.detach().clone()
        self.zero_point = torch.zeros_like(grid.scale, dtype=torch.int32) if zero is None else zero

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, with gradients to ``x`` and to what is learned."""
        if x.dtype != torch.float32:
            return self(x.float()).to(x.dtype)  # type: ignore[no-any-return]
        if not self.started and not self._start_from(x.detach()):
            return x.relu() if self.subsumes_relu else x
        if not self.frozen:
            return self._train(x)
        grid = self.require_grid()
        key = grid.scale, grid.scale._version  # what a frozen grid clips is found once
        if self._fixed is None or self._fixed[0] is not key[0] or self._fixed[1] != key[1]:
            self._fixed = *key, self._clipping(grid)
        idle = self.parameters(recurse=False) if _is_distributed() else ()
        return StraightThrough.apply(x, grid, self._fixed[2], None, *idle)  # type: ignore[no-any-return,no-untyped-call]

    def _clipping(self, grid: Grid) -> Clipping:
        return Clipping.of(grid, margin=self.margin, relu=self.subsumes_relu)

    # What a schedule does

    def freeze(self) -> None:
        """Fix the grid as it is now; before there is one, as it will start."""
        if self.started:
            self._keep(self.require_grid())
        self.frozen.fill_(True)

    def unfreeze(self) -> None:
        """Let the grid follow training again, from where it is."""
        grid = self.grid
        self.frozen.fill_(False)
        if grid is not None:
            self._begin(grid)

    def set_bits(self, bits: int) -> None:
        """Go on with codes of another width; the scale follows, so that the clipping range stays."""
        if isinstance(self.format, FloatFormat):
            raise RecipeError(
                f"bit widths of {self.format} cannot change: a small float has exponent and mantissa bits; "
                "gradual widths need an integer format"
            )
        _check_bits(bits)
        grid = self.grid
        ends = None if grid is None else clipping_range(grid, symmetric=self._is_symmetric(grid))
        self._set_width(bits)
        if grid is None or ends is None:
            return
        self._begin_again(self._solve(*ends, grid.axis))

    def synchronize(self) -> None:
        """Average what this quantizer watches over all processes, where ``torch.distributed`` is initialized."""
        if not _is_distributed():
            return
        for value in self._shared():
            total = value.detach().clone()
            torch.distributed.all_reduce(total)
            value.data.copy_(total / torch.distributed.get_world_size())

    # Each kind's own

    def _begin(self, grid: Grid) -> None:
        """Take the start from ``grid``, which is of ``self.format``."""
        raise NotImplementedError

    def _current(self) -> Grid:
        """The grid while it is not frozen."""
        raise NotImplementedError

    def _train(self, x: Tensor) -> Tensor:
        """The forward pass while the grid is not frozen."""
        raise NotImplementedError

    def _shared(self) -> list[Tensor]:
        """What ``synchronize`` averages."""
        return []

    # Formats

    def _grid_axis(self) -> int | None:
        return None if self.spec.granularity == "tensor" else self.along

    def _is_symmetric(self, grid: Grid) -> bool:
        from_zero = isinstance(grid.format, IntFormat) and not grid.format.signed and self.non_negative
        return self.spec.symmetric or from_zero

    def _note_format(self, zero: int) -> None:
        if isinstance(self.format, IntFormat):
            self.codes.copy_(torch.tensor([self.format.qmin, self.format.qmax, zero]))
        self._take_codes()

    def _follow_codes(self) -> None:
        """Take the format from the buffer where somebody wrote to it, as averages of models do."""
        if self.codes._version != self._seen_codes:
            self._take_codes()

    def _take_codes(self) -> None:
        least, greatest, zero = self.codes.tolist()
        if isinstance(self.format, IntFormat) and (least, greatest) != (self.format.qmin, self.format.qmax):
            signed = least < 0
            bits = greatest.bit_length() + int(signed)
            self.format = IntFormat(bits, signed=signed, narrow=least != (-(1 << (bits - 1)) if signed else 0))
            self._follow_format()
        symmetric = self.spec.symmetric or (
            self.non_negative and isinstance(self.format, IntFormat) and not self.format.signed
        )
        self._has_zero_point = isinstance(self.format, IntFormat) and (not symmetric or bool(zero))
        self._seen_codes = self.codes._version

    def _set_width(self, bits: int) -> None:
        assert isinstance(self.format, IntFormat)
        fmt, zero = self.format, int(self.codes[2])
        self.format = IntFormat(bits, signed=fmt.signed, narrow=fmt.narrow)
        self._note_format(1 << (bits - 1) if zero > fmt.qmin else self.format.qmin if zero else 0)
        self._follow_format()

    def _follow_format(self) -> None:
        """The spec has the format's width."""
        if isinstance(self.format, IntFormat) and isinstance(self.spec.format, IntFormat):
            old = self.spec.format
            fmt: Format = IntFormat(self.format.bits, signed=old.signed, narrow=old.narrow)
            self.spec = self.spec.model_copy(update={"format": fmt})

    def _solve(self, low: Tensor, high: Tensor, axis: int | None) -> Grid:
        """The grid of this quantizer's format that covers ``low .. high``."""
        plain, fmt = self.spec.format, self.format
        from_zero, moved = self.non_negative, False
        if isinstance(plain, IntFormat) and isinstance(fmt, IntFormat) and plain.signed and not fmt.signed:
            from_zero = from_zero or (self.spec.symmetric and not int(self.codes[2]))
            moved = not (from_zero and self.spec.auto_unsigned)
        return solve_grid(low, high, self.spec, non_negative=from_zero, unsigned_codes=moved, axis=axis)

    # Checks

    def _check_spec(self) -> None:
        spec = self.spec
        if spec.dynamic:
            raise RecipeError(
                "a dynamic spec finds its range in every tensor anew, so there is none to train: use dynamic: false, "
                "or leave this tensor out of quantization-aware training"
            )
        if spec.granularity == "group" and not self.of_weight:
            raise RecipeError("activations have no ranges per group: use granularity 'tensor' or 'channel'")
        if isinstance(spec.format, IntFormat):
            _check_bits(spec.format.bits)

    def _check_grid(self, grid: Grid) -> None:
        mine, its = self.spec.format, grid.format
        if type(mine) is not type(its) or (isinstance(its, FloatFormat) and mine != its):
            raise RecipeError(
                f"training was asked for {mine} and cannot start from a grid of {its}: calibrate with the same format"
            )
        unsigned = isinstance(self.format, IntFormat) and not self.format.signed
        if unsigned and isinstance(its, IntFormat) and its.signed:
            raise RecipeError(
                f"training was asked for unsigned codes ({self.format}) and cannot start from a signed grid ({its}): "
                "calibrate with the same spec"
            )
        if (grid.scale.ndim == 0) != (self.spec.granularity == "tensor") or grid.group_size != self.spec.group_size:
            raise RecipeError(
                f"training was asked for granularity {self.spec.granularity!r} (group size {self.spec.group_size}) and "
                f"cannot start from {grid.scale.numel()} scales of shape {tuple(grid.scale.shape)} (group size "
                f"{grid.group_size}): calibrate with the same spec"
            )
        if grid.axis is not None:
            self.along = grid.axis

    # State

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take shapes and format from the state too: it may come from a module that has started, or not."""
        for name, own in [*self._parameters.items(), *self._buffers.items()]:
            value = state_dict.get(f"{prefix}{name}")
            if value is None or (own is not None and own.shape == value.shape):
                continue
            device = self.started.device
            if isinstance(own, nn.Parameter):
                own.data = torch.empty_like(value, device=device)
            else:
                self._buffers[name] = torch.empty_like(value, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._take_codes()

    def extra_repr(self) -> str:
        """Kind, format and grid in one line."""
        grid = self.grid
        shown = Quantizer(self.spec)
        shown.format = self.format
        if grid is not None:
            shown.set_grid(Grid(grid.format, grid.scale.detach(), grid.zero_point, grid.axis, grid.group_size))
        return f"{self.kind}{', frozen' if self.frozen else ''}, {shown.extra_repr()}"


def clipping_range(grid: Grid, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The real ends of a grid, float64, shaped like its scale; of a symmetric signed one ``-qmax .. qmax`` steps.

    >>> low, high = clipping_range(Grid(IntFormat(8), torch.tensor(0.5)), symmetric=True)
    >>> float(low), float(high)
    (-63.5, 63.5)
    """
    scale = grid.scale.detach().double()
    least, greatest = (scale.new_tensor(end) if isinstance(end, float) else end for end in code_ends(grid))
    if symmetric and bool((least < 0).all()):
        least = -greatest
    return least * scale, greatest * scale


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_bits(bits: int) -> None:
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise RecipeError(
            f"{bits} bits cannot be trained: quantization-aware training takes {_LEAST_BITS} to {_MOST_BITS} bits; "
            "wider values need no training"
        )
