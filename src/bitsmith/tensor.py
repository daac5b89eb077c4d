"""A tensor of integers that knows which real numbers they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, NonFiniteError, RecipeError
from .files import atomic_write
from .grid import Grid, IntFormat, TensorSpec, dequantize, quantize
from .ranges import MinMax, solve_grid

_KIND = "bitsmith.QuantizedTensor"
_INT32_MAX = 2**31 - 1


class QuantizedTensor:
    """Integers with a scale and a zero point: ``real = (codes - zero_point) * scale``.

    ``codes`` are integers of any shape; ``scale`` (float32) and ``zero_point`` (int32) are 0-dimensional, or have one
    element per channel of ``axis``. Sums and products are exact: ``+`` and ``-`` want equal scales, ``*`` and ``@``
    multiply them, and all yield 32 bits; ``requantize`` brings the result to another grid. What the integers
    cannot express is a RecipeError, never a silent rounding.

    >>> x = QuantizedTensor.from_float(torch.tensor([-1.0, 0.5, 1.27]), scale=0.01)
    >>> x.int_repr()
    tensor([-100,   50,  127], dtype=torch.int8)
    >>> (x + x).dequantize()
    tensor([-2.0000,  1.0000,  2.5400])
    >>> (x * x).scale
    tensor(1.0000e-04)
    """

    __slots__ = ("_codes", "grid")

    def __init__(self, codes: Tensor, grid: Grid) -> None:
        fmt = grid.format
        if not isinstance(fmt, IntFormat) or codes.is_floating_point() or codes.dtype == torch.bool:
            raise RecipeError(f"a QuantizedTensor holds integers, but the codes are {codes.dtype} on {fmt}")
        _check_grid(codes.shape, grid)
        if codes.numel() and not fmt.qmin <= int(codes.min()) <= int(codes.max()) <= fmt.qmax:
            raise RecipeError(
                f"codes from {int(codes.min())} to {int(codes.max())} do not fit {fmt} ({fmt.qmin} to {fmt.qmax})"
            )
        self._codes = codes.to(grid.code_dtype)
        self.grid = grid

    @classmethod
    def from_float(
        cls, x: Tensor, scale: Tensor | float | None = None, zero_point: Tensor | int | None = None, *,
        bits: int = 8, signed: bool = True, axis: int | None = None, symmetric: bool = True,
    ) -> Self:  # fmt: skip
        """Quantize ``x``; without ``scale`` the grid covers its least to its greatest value, per channel of ``axis``.

        ``bits`` is 2 to 32 (stored in 8, 16 or 32); ``symmetric=False`` finds a zero point as well.

        >>> QuantizedTensor.from_float(torch.eye(2), axis=0, bits=16).scale.shape
        torch.Size([2])
        """
        if not bool(x.isfinite().all()):
            raise NonFiniteError("the tensor holds NaN or infinite values: integers have neither")
        try:
            fmt = IntFormat(bits, signed=signed)
        except ValueError as error:
            raise RecipeError(f"bits={bits!r}: a QuantizedTensor has 2 to 32 bits") from error
        axis = None if axis is None else axis % max(x.ndim, 1)
        if scale is None:
            if zero_point is not None:
                raise RecipeError("a zero_point goes with a scale: give both, or symmetric=False to have both found")
            statistic = MinMax(axis)
            statistic.update(x)
            seen = statistic.finish()
            spec = TensorSpec(format=fmt, symmetric=symmetric, granularity="tensor" if axis is None else "channel")
            grid = solve_grid(seen.lo, seen.hi, spec, axis=axis)
        else:
            scale = torch.as_tensor(scale, dtype=torch.float32)
            zero = None if zero_point is None else torch.as_tensor(zero_point, dtype=torch.int32).expand(scale.shape)
            grid = Grid(fmt, scale, zero, axis if scale.ndim else None)
        _check_grid(x.shape, grid)
        return cls(quantize(x, grid), grid)

    # What it is

    @property
    def scale(self) -> Tensor:
        """The step between codes, float32: one, or one per channel."""
        return self.grid.scale

    @property
    def zero_point(self) -> Tensor:
        """The code of 0.0, int32, shaped like the scale."""
        zero = self.grid.zero_point
        return torch.zeros_like(self.scale, dtype=torch.int32) if zero is None else zero

    @property
    def axis(self) -> int | None:
        """The axis of the scales; None for one scale."""
        return self.grid.axis

    @property
    def bits(self) -> int:
        """The width of a code."""
        return self.grid.format.bits

    @property
    def shape(self) -> torch.Size:
        """The shape of the codes."""
        return self._codes.shape

    def int_repr(self) -> Tensor:
        """The codes, in the smallest integer dtype that holds their format."""
        return self._codes

    def dequantize(self) -> Tensor:
        """The real numbers, float32."""
        return dequantize(self._codes, self.grid)

    def __repr__(self) -> str:
        sign = "int" if self.grid.format.signed else "uint"  # type: ignore[union-attr]
        scale = f"scale={float(self.scale):.6g}" if not self.scale.ndim else f"{self.scale.numel()} scales"
        where = "" if self.axis is None else f", axis={self.axis}"
        return f"QuantizedTensor({sign}{self.bits}, shape={tuple(self.shape)}, {scale}{where})"

    # Arithmetic

    def requantize(
        self, scale: Tensor | float, zero_point: Tensor | int | None = None, *, bits: int = 8, signed: bool = True
    ) -> QuantizedTensor:
        """The same numbers rounded to another grid (saturating), per tensor or along the same axis.

        >>> x = QuantizedTensor.from_float(torch.tensor([1.0, 2.0]), scale=0.5)
        >>> (x * x).requantize(0.25).int_repr()
        tensor([ 4, 16], dtype=torch.int8)
        """
        scale = torch.as_tensor(scale, dtype=torch.float32)
        return QuantizedTensor.from_float(
            self.dequantize(), scale, zero_point, bits=bits, signed=signed, axis=self.axis if scale.ndim else None
        )

    def __add__(self, other: QuantizedTensor) -> QuantizedTensor:
        self._check_same_scale(other, "+")
        return _exact(self._centred() + other._centred(), self.scale, self.axis, "sum")

    def __sub__(self, other: QuantizedTensor) -> QuantizedTensor:
        self._check_same_scale(other, "-")
        return _exact(self._centred() - other._centred(), self.scale, self.axis, "difference")

    def __neg__(self) -> QuantizedTensor:
        return _exact(-self._centred(), self.scale, self.axis, "negative")

    def __mul__(self, other: QuantizedTensor) -> QuantizedTensor:
        if self.axis is not None or other.axis is not None:
            raise RecipeError(
                "* wants one scale per operand, since two scales per channel may lie on different axes: dequantize, or "
                "requantize(scale) to one scale first"
            )
        return _exact(self._centred() * other._centred(), self.scale * other.scale, None, "product")

    def __matmul__(self, other: QuantizedTensor) -> QuantizedTensor:
        if self.axis is not None or other.axis not in (None, len(other.shape) - 1):
            raise RecipeError(
                "@ wants one scale on the left and one, or one per column, on the right, but the axes of the scales "
                f"are {self.axis} and {other.axis}: scales along the summed axis cannot be taken out of the sum"
            )
        product = self._centred() @ other._centred()
        return _exact(product, self.scale * other.scale, None if other.axis is None else product.ndim - 1, "product")

    def _centred(self) -> Tensor:
        """Codes less their zero point, int64."""
        zero = self.zero_point.long()
        if zero.ndim:
            zero = zero.view([-1 if axis == self.axis else 1 for axis in range(self._codes.ndim)])
        return self._codes.long() - zero

    def _check_same_scale(self, other: QuantizedTensor, sign: str) -> None:
        if self.axis != other.axis or not torch.equal(self.scale, other.scale):
            raise RecipeError(
                f"{sign} wants equal scales, but they are {_show(self.scale)} and {_show(other.scale)}: "
                "requantize one operand to the other's scale"
            )

    # Files

    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file; it appears whole or not at all."""
        fmt = self.grid.format
        assert isinstance(fmt, IntFormat)
        described = {"bits": fmt.bits, "signed": fmt.signed, "narrow": fmt.narrow, "axis": self.axis}
        with atomic_write(path := Path(path)) as part:
            tensors = {"codes": self._codes, "scale": self.scale, "zero_point": self.zero_point}
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, part,
                {"kind": _KIND, "format": json.dumps(described)},
            )  # fmt: skip
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that ``save`` wrote; CheckpointError where it is something else or damaged.

        >>> import tempfile
        >>> x = QuantizedTensor.from_float(torch.randn(3, 4), axis=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     y = QuantizedTensor.load(x.save(folder + "/x.safetensors"))
        >>> bool((x.dequantize() == y.dequantize()).all())
        True
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != _KIND:
                    raise CheckpointError(
                        f"{path} holds no QuantizedTensor: give a file that QuantizedTensor.save wrote"
                    )
                described = json.loads(metadata["format"])
                codes, scale, zero = (file.get_tensor(name) for name in ("codes", "scale", "zero_point"))
            axis = described.pop("axis")
            grid = Grid(IntFormat(**described), scale, zero if bool(zero.any()) else None, axis)
            return cls(codes, grid)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecipeError) as error:
            raise CheckpointError(f"{path} cannot be read as a QuantizedTensor: {error}") from error


def _exact(codes: Tensor, scale: Tensor, axis: int | None, what: str) -> QuantizedTensor:
    """A result in 32 bits, or an error where it does not fit."""
    largest = int(codes.abs().max()) if codes.numel() else 0
    if largest > _INT32_MAX:
        raise RecipeError(f"the {what} reaches {largest}, beyond 32 bits: requantize the operands to fewer bits first")
    return QuantizedTensor(codes, Grid(IntFormat(32), scale, None, axis))


def _check_grid(shape: torch.Size, grid: Grid) -> None:
    scale = grid.scale
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise RecipeError(f"scales are positive and finite, not {_show(scale)}")
    if not scale.ndim:
        return
    if grid.axis is None or not 0 <= grid.axis < len(shape) or scale.shape != (shape[grid.axis],):
        raise RecipeError(
            f"{tuple(scale.shape)} scales do not fit a tensor of shape {tuple(shape)} along axis {grid.axis}: give one "
            "scale, or one per channel and their axis"
        )
    if grid.zero_point is not None and grid.zero_point.shape != scale.shape:
        raise RecipeError(f"{tuple(grid.zero_point.shape)} zero points do not fit {tuple(scale.shape)} scales")


def _show(scale: Tensor) -> str:
    return f"{float(scale):.6g}" if not scale.ndim else f"{scale.numel()} from {float(scale.min()):.6g}"
