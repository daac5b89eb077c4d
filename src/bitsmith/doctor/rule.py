"""A rule: one small function with an id, and what it needs to look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from .model import Finding, Severity
from .subject import Subject

Need = Literal["model", "graph", "optimizer", "training", "calibration", "file", "tidl", "tidl calibration"]
_GIVE = {
    "optimizer": "give optimizer=",
    "training": "give optimizer= and training=TrainingPlan(...)",
    "calibration": "give calibration=",
    "file": "give file=, an ONNX file for a TIDL target",
    "graph": "the model cannot be read as a graph (D21)",
}


@dataclass(frozen=True)
class Note:
    """What a rule yields; ``where`` is an operator of the graph or a name."""

    severity: Severity
    where: fx.Node | str
    why: str
    todo: str


Check = Callable[[Subject], Iterator[Note]]


@dataclass(frozen=True)
class Rule:
    """``needs`` ``"tidl"`` is a graph and a target with TI's import rules."""

    id: str
    title: str
    needs: Need
    check: Check

    def missing(self, subject: Subject) -> str | None:
        """Why this rule cannot look, or None; a rule of another target than the subject's has nothing to miss."""
        needs_graph = self.needs not in ("model", "optimizer", "training", "file")
        if self.needs == "file" and (subject.file is None or subject.device is None):
            return _GIVE["file"]
        if self.needs in ("optimizer", "training") and subject.optimizer is None:
            return _GIVE[self.needs]
        if self.needs == "training" and subject.training is None:
            return _GIVE["training"]
        if "calibration" in self.needs and subject.batches is None:
            return _GIVE["calibration"]
        if needs_graph and subject.capture_error is not None:
            return _GIVE["graph"]
        return None

    def run(self, subject: Subject) -> Iterator[Finding]:
        """All findings of this rule."""
        if self.needs.startswith("tidl") and subject.device is None:
            return
        for note in self.check(subject):
            node = note.where if isinstance(note.where, fx.Node) else None
            yield Finding(
                rule=self.id, title=self.title, severity=note.severity,
                where=subject.where(node) if node is not None else str(note.where),
                source=subject.source(node) if node is not None else "", why=note.why, todo=note.todo,
            )  # fmt: skip


RULES: dict[str, Rule] = {}


def rule(id: str, title: str, needs: Need) -> Callable[[Check], Check]:
    """Register a function as a rule."""

    def register(check: Check) -> Check:
        assert id not in RULES, f"two rules are called {id}"
        RULES[id] = Rule(id, title, needs, check)
        return check

    return register
