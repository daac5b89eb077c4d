"""What the doctor found, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

if TYPE_CHECKING:
    from .surgery import Surgery

Severity = Literal["error", "warning", "note"]


class Finding(BaseModel):
    """One thing at one place: what is wrong, where, why it matters, and the call or code change that mends it."""

    model_config = ConfigDict(extra="forbid")

    rule: str = Field(description="D1 to D30")
    title: str
    severity: Severity = Field(description="error: will break; warning: costs accuracy or speed; note: worth knowing")
    where: str = Field(description="the layer or the operator, or what else it is about")
    source: str = Field(default="", description="file, line and text of the code that does it")
    why: str
    todo: str


class Triage(BaseModel):
    """Float, 16 bits and 8 bits on the same data: whether a loss is due to quantization at all.

    ``measure`` says what the numbers are: ``top1`` (percent right) or ``agreement`` (percent of the float answers).
    """

    model_config = ConfigDict(extra="forbid")

    measure: Literal["top1", "agreement", "sqnr_db"]
    samples: int
    float_model: float | None = Field(description="None where there is nothing to hold the float model against")
    bits_16: float
    bits_8: float
    weakest: dict[str, float] = Field(default={}, description="SQNR in dB of the weakest layers at 8 bits")
    cause: Literal["none", "quantization", "elsewhere"]
    verdict: str


class Diagnosis(BaseModel):
    """All findings; ``not_run`` says of the rules that could not look what they need."""

    model_config = ConfigDict(extra="forbid")

    model: str
    target: str
    findings: list[Finding] = []
    not_run: dict[str, str] = {}
    triage: Triage | None = None
    seconds: float = 0.0

    _subject: Any = PrivateAttr(default=None)

    @property
    def errors(self) -> list[Finding]:
        """The findings that will break something."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def healthy(self) -> bool:
        """Whether nothing will break."""
        return not self.errors

    def of(self, rule: str) -> list[Finding]:
        """The findings of one rule."""
        return [finding for finding in self.findings if finding.rule == rule]

    def fix(self, *operations: str) -> Surgery:
        """A new model with these operations done (all of them if none is named): see ``bitsmith.doctor.fix``."""
        from .surgery import fix

        subject = self._subject
        if subject is None:
            from ..errors import DataError

            raise DataError("this diagnosis was read from a file: call bitsmith.doctor.fix(model, example_inputs)")
        return fix(subject.model, subject.arguments, *operations)

    def __str__(self) -> str:
        from .view import as_text

        return as_text(self)
