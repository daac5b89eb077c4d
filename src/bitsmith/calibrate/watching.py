"""A Quantizer that finds its own grid: for models that their user runs, where no walk can."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, NonFiniteError
from ..grid import Grid, IntFormat, Quantizer, TensorSpec
from ..ranges import Statistic, activation_grid, activation_statistic, weight_grid

# What stands in for a recipe's specs until there is a recipe: those of "int8".
_INT8 = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
_INT8_WEIGHTS = TensorSpec(format=IntFormat(8), granularity="channel")


def _plain(thing: Any) -> dict[str, Any]:
    """The attributes of a statistic, and of what it consists of."""
    return {key: _plain(value) if _consists(value) else value for key, value in vars(thing).items()}


def _take(thing: Any, state: dict[str, Any]) -> None:
    if vars(thing).keys() != state.keys():
        raise CalibrationError(
            f"what was saved is not the statistic of this range rule: it holds {sorted(state)}, not "
            f"{sorted(vars(thing))}. Prepare the model with the recipe that it was saved with"
        )
    for key, value in vars(thing).items():
        if _consists(value):
            _take(value, state[key])
        else:
            setattr(thing, key, state[key].clone() if isinstance(state[key], Tensor) else state[key])


def _consists(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, Tensor)


class WatchingQuantizer(Quantizer):
    """A Quantizer that, between ``watch`` and ``fix``, passes values on and remembers their range.

    ``spec`` None is a place that takes the recipe's spec (``assign``). The statistic is that of the spec's range rule,
    a monoid: ``merge`` takes in what another process saw. A Quantizer of your own overrides ``observe``, ``solve``
    or ``forward``; ``bitsmith.testing.check_quantizer`` says whether it keeps the contract.

    >>> quantizer = WatchingQuantizer(TensorSpec(format=IntFormat(8)))
    >>> quantizer.watch()
    >>> _ = quantizer(torch.tensor([-1.27, 1.0]))
    >>> quantizer.fix()
    >>> quantizer(torch.tensor([0.014, 3.0]))
    tensor([0.0100, 1.2700])
    """

    def __init__(self, spec: TensorSpec | None = None, *, non_negative: bool = False) -> None:
        super().__init__(spec or _INT8, non_negative=non_negative)
        self.carried = spec  # what the model's author wrote; None: the recipe's
        self.statistic: Statistic | None = None
        self.batches = 0
        self.least_code: Tensor | None
        self.register_buffer("least_code", None)  # tells a signed from an unsigned grid in a state_dict

    def assign(self, spec: TensorSpec) -> None:
        """Take the recipe's spec, unless the place carries its own."""
        self.spec = self.carried or spec
        if self.scale is None:
            self.format = self.spec.format

    def watch(self) -> None:
        """Forget the grid and start to watch."""
        self.scale = self.zero_point = self.least_code = None
        self.format, self.axis = self.spec.format, None
        self.statistic, self.batches = activation_statistic(self.spec), 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of values."""
        if self.statistic is None:
            raise CalibrationError("this Quantizer is not watching: call watch() first")
        self.statistic.update(x)
        self.batches += 1

    def solve(self, *, non_negative: bool = False, unsigned_codes: bool = False) -> Grid:
        """The grid of what was seen; the options are those of ``bitsmith.ranges.solve_grid``."""
        if self.statistic is None:
            raise CalibrationError("this Quantizer never watched: call watch() and run batches first")
        return activation_grid(
            self.statistic, self.spec, non_negative=non_negative or self.non_negative, unsigned_codes=unsigned_codes
        )

    def merge(self, other: Self) -> None:
        """Take in what ``other`` saw after this one."""
        if self.statistic is None or other.statistic is None:
            raise CalibrationError("both Quantizers must be watching to be merged")
        self.statistic = self.statistic.merge(other.statistic)
        self.batches += other.batches

    def watched(self) -> dict[str, Any]:
        """What was seen, as numbers and tensors that ``torch.save`` takes; ``resume`` goes on from there."""
        return {"batches": self.batches, "statistic": None if self.statistic is None else _plain(self.statistic)}

    def resume(self, watched: dict[str, Any]) -> None:
        """Go on from what another process had seen by the same spec."""
        self.watch()
        self.batches = int(watched["batches"])
        _take(self.statistic, watched["statistic"])

    def fix(self, *, unsigned_codes: bool = False) -> None:
        """Take the grid of what was seen."""
        self.set_grid(self.solve(unsigned_codes=unsigned_codes))

    def set_grid(self, grid: Grid) -> None:
        """Stop watching; from here on ``forward`` quantizes."""
        super().set_grid(grid)
        self.statistic = None
        self.least_code = torch.tensor(grid.format.qmin) if isinstance(grid.format, IntFormat) else None

    def forward(self, x: Tensor) -> Tensor:
        """While watching the value itself; with a grid its quantized value, with a straight-through gradient."""
        if self.statistic is not None:
            try:
                self.observe(x.detach())
            except NonFiniteError as error:
                raise NonFiniteError(
                    "a watched value holds NaN or infinity: look at the model on this batch; a division, a log or an "
                    "overflow upstream makes them"
                ) from error
            return x
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float model's state_dict has no grids, and changes none; a calibrated one brings its own."""
        if (scale := state_dict.get(f"{prefix}scale")) is not None:
            fmt, least = self.spec.format, state_dict.get(f"{prefix}least_code")
            if isinstance(fmt, IntFormat) and least is not None:
                fmt = IntFormat(fmt.bits, signed=int(least) < 0, narrow=fmt.narrow)
            zero = state_dict.get(f"{prefix}zero_point")
            device = self.scale.device if self.scale is not None else scale.device
            self.set_grid(Grid(fmt, scale.to(device), None if zero is None else zero.to(device)))


class WeightQuantizer(Quantizer):
    """The Quantizer of a parameter: its grid follows the parameter as training moves it, once it is ``enabled``.

    Source: Jacob et al., Quantization and Training of Neural Networks (arXiv 1712.05877), section 3.1: weight ranges
    are those of the weights themselves.

    >>> quantizer = WeightQuantizer(TensorSpec(format=IntFormat(8)))
    >>> quantizer.enabled = True
    >>> quantizer(torch.tensor([1.27, 0.014]))
    tensor([1.2700, 0.0100])
    """

    of_parameter = True

    def __init__(self, spec: TensorSpec | None = None, axis: int = 0) -> None:
        super().__init__(spec or _INT8_WEIGHTS)
        self.carried = spec
        self.along = axis
        self.enabled = False
        self._seen: tuple[int, int] | None = None

    def assign(self, spec: TensorSpec) -> None:
        """Take the recipe's spec, unless the layer carries its own."""
        self.spec = self.carried or spec
        self.format, self._seen = self.spec.format, None

    def forward(self, x: Tensor) -> Tensor:
        """The parameter on its grid, with a straight-through gradient; in float until ``enabled``."""
        if not self.enabled:
            return x
        kept = isinstance(x, nn.Parameter) and not x.is_inference()  # others may be new tensors in old memory
        version = (x.data_ptr(), x._version) if kept else None
        if self.scale is None or version is None or version != self._seen:
            self.set_grid(weight_grid(x.detach(), self.spec, self.along))
            self._seen = version
        return super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The grid is made of the parameter, which the same state_dict brings: only whether there was one matters."""
        self._seen = None
        if f"{prefix}scale" in state_dict:
            self.enabled, self.scale = True, state_dict[f"{prefix}scale"]
            self.zero_point = state_dict.get(f"{prefix}zero_point")
