"""The Python in docs/dynamic.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "dynamic.md"


def test_the_page_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert (tmp_path / "tagger.onnx").is_file()
    assert namespace["run"](namespace["x"]).shape == namespace["y"].shape  # type: ignore[operator,attr-defined]
