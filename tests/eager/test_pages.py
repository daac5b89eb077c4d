"""The Python in the pages on quantizing by hand and on extending runs, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitsmith.grid.spec import RANGE_RULES
from bitsmith.ranges.rules import RULES

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str) -> dict[str, object]:
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), namespace)
    return namespace


def test_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    run("by-hand.md")
    printed = capsys.readouterr().out
    assert "'stem' (QuantConv2d) reads a value that is on no grid" in printed
    assert "[('stem', 8), ('block.conv', 4), ('head', None)]" in printed
    assert "[('1', 4), ('4', 8)]" in printed


def test_extending(capsys: pytest.CaptureFixture[str]) -> None:
    run("extending.md")
    RULES.pop("tight")
    RANGE_RULES.discard("tight")
    assert "[('1', 8), ('2', 8)]" in capsys.readouterr().out
