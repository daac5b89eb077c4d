"""A diagnosis as tables for a terminal."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .model import Diagnosis, Finding

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_PLACES = 3


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    """Findings of one kind in one row, with the first places; then what was not looked at."""
    table = Table(box=None, pad_edge=False, show_lines=False)
    table.add_column("rule", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("why", overflow="fold", ratio=4)
    table.add_column("what to do", overflow="fold", ratio=3)
    for group in _grouped(diagnosis.findings):
        first = group[0]
        severity = Text(first.severity, style=_STYLES[first.severity])
        table.add_row(first.rule, severity, Text(_places(group)), Text(first.why), Text(first.todo))
    counts = {kind: sum(f.severity == kind for f in diagnosis.findings) for kind in _STYLES}
    summary = ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items() if n) or "nothing found"
    head = Text(f"{diagnosis.model} for {diagnosis.target}: {summary} ({diagnosis.seconds:.1f} s)", style="bold")
    parts: list[RenderableType] = [head, *([table] if diagnosis.findings else [])]
    by_need: dict[str, list[str]] = {}
    for rule, need in diagnosis.not_run.items():
        by_need.setdefault(need, []).append(rule)
    parts += [Text(f"not looked at: {', '.join(rules)} ({need})", style="dim") for need, rules in by_need.items()]
    return Group(*parts)


def _grouped(findings: list[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.rule, finding.severity, finding.todo), []).append(finding)
    return list(groups.values())


def _places(group: list[Finding]) -> str:
    lines = [f.where + (f"\n  {f.source}" if f.source else "") for f in group[:_PLACES]]
    more = [f"and {len(group) - _PLACES} more"] if len(group) > _PLACES else []
    return "\n".join([*lines, *more])


def as_text(diagnosis: Diagnosis, width: int = 120) -> str:
    """The view without colours."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(diagnosis_view(diagnosis))
    return buffer.getvalue().rstrip()
