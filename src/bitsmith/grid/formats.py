"""The numbers that one element of a tensor may take: integers and small floats."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class IntFormat:
    """Integers of ``bits`` bits: the codes ``qmin .. qmax``.

    ``narrow`` drops the most negative code, so that a signed range is symmetric.

    >>> IntFormat(8).qmin, IntFormat(8).qmax
    (-128, 127)
    >>> IntFormat(4, signed=False).qmax
    15
    >>> IntFormat(8, narrow=True).qmin
    -127
    """

    bits: int = Field(ge=1, le=32)
    signed: bool = True
    narrow: bool = False
    kind: Literal["int"] = Field(default="int", repr=False)

    @property
    def qmin(self) -> int:
        """The least code."""
        if not self.signed:
            return int(self.narrow)
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - int(self.signed))) - 1


@dataclass(frozen=True, config=_STRICT)
class FloatFormat:
    """Small floats: one sign bit, ``exponent_bits`` and ``mantissa_bits``, with subnormals, saturating.

    ``reserved`` says which codes of the top exponent are not numbers: ``"none"`` (all are numbers),
    ``"nan"`` (only the all-ones code: OCP E4M3), ``"ieee"`` (the whole top exponent is infinity and NaN:
    OCP E5M2, IEEE half). The exponent bias is ``2**(exponent_bits - 1) - 1``.

    Source: OCP 8-bit Floating Point Specification (OFP8) 1.0; IEEE 754.

    >>> FloatFormat(4, 3, reserved="nan").max_value
    448.0
    >>> FloatFormat(5, 2, reserved="ieee").max_value
    57344.0
    """

    exponent_bits: int = Field(ge=1, le=8)
    mantissa_bits: int = Field(ge=0, le=23)
    reserved: Literal["none", "nan", "ieee"] = "none"
    kind: Literal["float"] = Field(default="float", repr=False)

    @property
    def bits(self) -> int:
        """Bits of one number, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The exponent's bias."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max_value(self) -> float:
        """The greatest number; what is larger saturates to it."""
        top = (1 << self.exponent_bits) - 1 - self.bias
        mantissa = 2.0 - 2.0**-self.mantissa_bits
        if self.reserved == "ieee":
            top -= 1
        elif self.reserved == "nan":
            mantissa -= 2.0**-self.mantissa_bits
        return float(mantissa * 2.0**top)

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number and of all subnormals."""
        return 1 - self.bias


Format = IntFormat | FloatFormat
FP8_E4M3 = FloatFormat(4, 3, reserved="nan")
FP8_E5M2 = FloatFormat(5, 2, reserved="ieee")
