"""The Python in the guide runs, in order, and its recipe in YAML is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bitsmith.recipe import Recipe

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_guide_s_python_runs() -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, str(GUIDE), "exec"), namespace)
    assert namespace["q"].report.coverage.fraction == 1.0  # type: ignore[attr-defined]
    assert [layer.weight_bits for layer in namespace["q4"].report.layers] == [4, 8]  # type: ignore[attr-defined]


def test_the_guide_s_yaml_is_a_recipe() -> None:
    recipe = Recipe.from_yaml(blocks("yaml")[0])
    assert recipe.overrides[0].match == "last"


def test_the_torch_page_s_python_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = GUIDE.with_name("torch-engine.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "torch-engine.md", "exec"), {})


@pytest.mark.parametrize("page", ["tidl.md", "doctor.md"])
def test_the_pages_of_doctor_and_tidl_run(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.with_name(page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), namespace)
