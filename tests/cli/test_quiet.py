"""``-q``: nothing but the result; ``--sensitivity``: in the report."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from bitsmith.cli import app


def test_quiet_and_sensitivity(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "out"), "-q", "--sensitivity", "--no-latency"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "certificate: PASSED" in result.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(data["sensitivity"]["layers"]) == 8
    assert "plot-sensitivity" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
