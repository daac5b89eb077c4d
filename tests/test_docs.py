"""Every code block of README and docs runs, page by page and in order, or says that it is illustrative.

``python`` blocks run and ``yaml`` blocks must be recipes or sweeps; ``console`` and ``text`` blocks show what is typed
and printed. A comment ``<!-- setup`` ... ``-->`` in a page is Python that runs before its blocks; ``<!-- illustrative
-->`` before a block leaves it out. The site is built with warnings as errors, and may ask no other host for anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from bitsmith.grid.spec import RANGE_RULES
from bitsmith.options import RECIPE_OPTIONS
from bitsmith.ranges.rules import RULES
from bitsmith.recipe import Recipe
from bitsmith.sweep import Sweep
from docs.options import PAGE, written

ROOT = Path(__file__).parents[1]
GENERATED = ("reference.md", "recipes.md", "compare.md")
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in GENERATED)]

# The README shows a job in the reader's own names.
README_SETUP = """
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
inputs = torch.randn(16, 3, 8, 8)
calibration_batches = batches = [inputs]
"""
_BLOCK = re.compile(r"(<!-- illustrative -->\n+)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.DOTALL | re.MULTILINE)
_SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)
# What pages print that their text relies on.
PRINTED = {
    "by-hand.md": [
        "'stem' (QuantConv2d) reads a value that is on no grid",
        "[('stem', 8), ('block.conv', 4), ('head', None)]",
        "[('1', 4), ('4', 8)]",
    ],
    "extending.md": ["[('1', 8), ('2', 8)]"],
    "from-torch-ao.md": ["the largest difference is 0"],
    "evaluate.md": ["['fold_batch_norm', 'gptq', 'reestimate_batch_norm']"],
    "guide.md": ["100% of the multiply-accumulates", "[4, 8]"],
    "max78000.md": ["[]\n"],
}


def setup_of(page: Path) -> str:
    if page.name == "README.md":
        return README_SETUP
    return "\n".join(_SETUP.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks(page, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rules = set(RULES)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(setup_of(page), f"{page.name} (setup)", "exec"), namespace)
        for illustrative, _, language, code in _BLOCK.findall(_SETUP.sub("", page.read_text(encoding="utf-8"))):
            if illustrative or language in ("console", "text"):
                continue
            assert language in ("python", "yaml"), f"{page.name}: a block of {language or 'no language'}: mark it"
            if language == "yaml":
                kind = Sweep if code.startswith("models:") else Recipe
                kind.model_validate(yaml.safe_load(code))
            else:
                exec(compile(code, page.name, "exec"), namespace)
    for name in set(RULES) - rules:  # that the page registered
        RULES.pop(name)
        RANGE_RULES.discard(name)
    printed = capsys.readouterr().out
    for expected in PRINTED.get(page.name, ()):
        assert expected in printed


def test_the_table_of_options_is_that_of_the_command_line() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "docs/evaluate.md lags behind the options: run python -m docs.build"
    for name in RECIPE_OPTIONS:
        assert f"`--{name}`" in page


def test_the_site_builds_and_asks_no_other_host(tmp_path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'bitsmith[docs]'")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    for name in ("mkdocs.yml", "README.md", "benchmarks/RESULTS.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for command in (["docs.build"], ["mkdocs", "build", "--strict", "--quiet"]):
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    asked = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?https?:|<link[^>]*href=[\"']?https?:[^>]*stylesheet")
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not asked.search(text), page
        assert "fonts.googleapis" not in text
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", sheet.read_text(encoding="utf-8")), sheet
