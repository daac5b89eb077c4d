"""The Python in docs/report.md and docs/sensitivity.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["report.md", "sensitivity.md"])
def test_the_page_s_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), namespace)


def test_every_key_of_report_json_is_on_the_page() -> None:
    from bitsmith.evaluate.job import JobResult

    text = (DOCS / "report.md").read_text(encoding="utf-8")
    schema = JobResult.model_json_schema()
    keys = {
        key
        for name in ("LayerReport", "Coverage", "StepReport", "RangeReport", "Report", "Pictures", "Histogram")
        for key in schema["$defs"][name]["properties"]
    }
    written = set(re.findall(r"[`.](\w+)", text))
    assert sorted((keys | schema["properties"].keys()) - written) == []
