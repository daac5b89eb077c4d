"""The certificate: the exported file, run by an independent engine, held against the simulation in LSBs."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field


class OutputComparison(BaseModel):
    """One output of the model: how far file, integer executor and simulation lie apart, in LSBs.

    The LSB is the step of the output's grid; an output that leaves the model in float has no grid, and its LSB is
    an 8-bit step of its own range, (max - min) / 255.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    lsb: float
    elements: int
    max_file_vs_integer: float
    mean_file_vs_integer: float
    max_file_vs_simulation: float
    mean_file_vs_simulation: float
    max_integer_vs_simulation: float
    equal_fraction: float = Field(description="share of elements on which file and integer executor agree to the bit")


class Certificate(BaseModel):
    """Whether a file computes what was measured, by how much it differs if not, and what the runtime made of it."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str
    companions: dict[str, str] = Field(default={}, description="files that belong to it, by SHA-256")
    engine: str
    engine_version: str
    target: str
    recipe: str
    samples: int
    outputs: list[OutputComparison]
    top1_agreement: float | None = Field(default=None, description="of file with simulation, where outputs are scores")
    coverage: float = Field(description="share of the multiply-accumulates that run in integers")
    integer_kernels: dict[str, int] = {}
    float_compute_kernels: dict[str, int] = {}
    float_operators: list[str] = Field(default=[], description="operators that the target computes in float")
    file_bytes: int
    float_bytes: int = Field(description="the float model's parameters")
    allowed_max_lsb: float
    allowed_mean_lsb: float | None = Field(default=None, description="of the mean over an output; None: no bound")
    contract: list[str] = Field(default=[], description="what the target's import would refuse in the file")
    passed: bool
    verdict: str

    @property
    def max_lsb(self) -> float:
        """The largest difference between file and integer executor."""
        return max((output.max_file_vs_integer for output in self.outputs), default=0.0)

    @property
    def size_ratio(self) -> float:
        """File size against the float model's parameters."""
        return self.file_bytes / self.float_bytes if self.float_bytes else 0.0


def judge_contract(contract: list[str], passed: bool, verdict: str) -> tuple[bool, str]:
    """The verdict where the target's import has rules of its own that the file breaks."""
    if not contract:
        return passed, verdict
    return False, f"{verdict}; the target's import would refuse the file: {'; '.join(contract[:3])}"


def judge(
    outputs: list[OutputComparison], float_operators: list[str], exact: bool, allowed: float,
    allowed_mean: float = math.inf,
) -> tuple[bool, str]:  # fmt: skip
    """Verdict: to the bit where the target's law is known for every operator, within bounds elsewhere."""
    worst = max((o.max_file_vs_integer for o in outputs), default=0.0)
    mean = max((o.mean_file_vs_integer for o in outputs), default=0.0)
    drift = max((o.max_integer_vs_simulation for o in outputs), default=0.0)
    reason = "its arithmetic is known to the bit"
    if not exact:
        reason = "the runtime chooses its own rounding"
        if float_operators:
            more = " ..." if len(float_operators) > 6 else ""
            reason = f"computed in float by the runtime: {', '.join(float_operators[:6])}{more}"
    if worst > allowed:
        return False, f"FAILED: the file differs by up to {worst:.3g} LSB; allowed are {allowed:g} ({reason})"
    if mean > allowed_mean:
        return False, f"FAILED: the file differs by {mean:.3g} LSB on average; allowed are {allowed_mean:g} ({reason})"
    if drift > allowed:
        return False, f"FAILED: simulation and integer executor differ by {drift:.3g} LSB"
    if worst == 0:
        return True, "PASSED: the file computes what was measured, bit for bit"
    return True, (
        f"PASSED: the file is within {worst:.3g} LSB of what was measured, {mean:.2g} on average; allowed are "
        f"{allowed:g} ({reason})"
    )
