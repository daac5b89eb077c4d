"""The pages in a real browser: everything drawn, nothing loaded, no complaint on the console."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.errors import DataError, MissingExtraError
from bitsmith.evaluate.job import JobResult
from bitsmith.evaluate.latency import Latency
from bitsmith.evaluate.metrics import Metrics
from bitsmith.recipe import bits_recipe
from bitsmith.report.model import LayerReport
from bitsmith.report.page import pareto_front, write_page, write_pareto
from bitsmith.report.warn import warnings_for
from bitsmith.report.write import look_at
from docs.screenshots import Browser, find_chromium

ROWS = [
    {"recipe": f"w{w}a{a} </script><b>", "bits": w, "top1": None if w == 3 else 99.0 - 60 / w**2 - 20 / a**2, "seed": 0}
    for w in (2, 3, 4, 8)
    for a in (4, 8)
]


class Net(nn.Module):
    """A name that is markup, a residual, and a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last((self.second(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def result() -> JobResult:
    """A job's result with everything that a page can show."""
    torch.manual_seed(0)
    net, data = Net(), [torch.randn(64, 3, 8, 8)]
    recipe = bits_recipe(4, 8, name="four bits </script>", overrides=(bs.Override(match="last", exclude=True),))
    q = bs.quantize(net, data, recipe)
    times = {"float": Latency(median_ms=1.0, fastest_ms=1.0, rounds=5)}
    times["quantized"] = Latency(median_ms=2.0, fastest_ms=2.0, rounds=5, ratio=0.5)
    return JobResult(
        report=q.report, recipe_yaml=recipe.to_yaml(), pictures=look_at(q, data, net),
        sensitivity=bs.sensitivity(net, data, recipe, samples=16), sizes={"float": 100, "quantized": 30},
        certificate={"passed": False, "verdict": "FAILED: it differs"}, latency={"1": times},
        metrics={"float": Metrics(top1=90.0, samples=9), "deployed": Metrics(top1=80.0, samples=9)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with Browser(executable) as opened:
        yield opened


@pytest.fixture
def quiet(browser: Browser) -> Iterator[Browser]:
    """The browser; afterwards its console must be empty and nothing but files must have been asked for."""
    browser.errors.clear()
    browser.requests.clear()
    yield browser
    browser.run("0")  # lets events arrive
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file://", "data:", "blob:null"))] == []


def drawn(browser: Browser) -> dict[str, int]:
    """For each plot the number of marks in it: bars, lines and points."""
    marks = ".bars path, path.js-line, .points path"
    count = f"e => [e.id, e.querySelectorAll('{marks}').length]"
    script = f"Object.fromEntries([...document.querySelectorAll('.plot')].map({count}))"
    return dict(browser.run(script))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_is_drawn(quiet: Browser, result: JobResult, tmp_path: Path, width: int, dark: bool) -> None:
    quiet.open(write_page(result, tmp_path / "report.html"), width, dark=dark)
    plots = drawn(quiet)
    assert set(plots) == {"plot-sqnr", "plot-weights", "plot-inputs", "plot-channels", "plot-sensitivity"}
    assert all(plots.values()), plots
    assert quiet.run("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    assert quiet.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    picture = quiet.screenshot(tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_layers_sort_and_show_their_histograms(quiet: Browser, result: JobResult, tmp_path: Path) -> None:
    quiet.open(write_page(result, tmp_path / "report.html"), 1280)
    column = "[...document.querySelectorAll('#layers thead th')].findIndex(h => h.textContent === 'SQNR dB')"
    cells = f"[...document.querySelectorAll('#layers tbody tr')].map(r => r.cells[{column}].textContent)"
    for descending in (False, True):
        quiet.run(f"document.querySelectorAll('#layers thead th')[{column}].click()")
        values = [float(text) for text in quiet.run(cells) if text != "-"]
        assert values == sorted(values, reverse=descending)
        assert len(values) >= 2
    quiet.run("document.querySelector('tr[data-layer=second]').click()")
    assert quiet.run("document.getElementById('layer').value") == "second"
    title = quiet.run("document.querySelector('#plot-weights .gtitle').textContent")
    assert title.startswith("Weight: 4 bits")


def test_the_theme_can_be_switched(quiet: Browser, result: JobResult, tmp_path: Path) -> None:
    quiet.open(write_page(result, tmp_path / "report.html"), 1280)
    background = "getComputedStyle(document.body).backgroundColor"
    before = quiet.run(background)
    quiet.run("document.getElementById('theme').click()")
    assert quiet.run(background) != before


@pytest.mark.parametrize("width", [1280, 390])
def test_a_sweep_is_drawn(quiet: Browser, tmp_path: Path, width: int) -> None:
    quiet.open(write_pareto(ROWS, tmp_path / "sweep.html"), width)
    assert drawn(quiet)["plot-pareto"] >= 6
    page = write_pareto(ROWS, tmp_path / "compared.html", float_value=92.5)
    quiet.open(page, width)
    assert "float model" in quiet.run("document.querySelector('#plot-pareto .legend').textContent")
    assert quiet.run("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    quiet.run("document.querySelectorAll('#rows thead th')[1].click()")
    last = quiet.run("[...document.querySelectorAll('#rows tbody tr')].at(-1).cells[1].textContent")
    assert last == ""  # what has no number comes last
    assert quiet.run("document.querySelector('#rows td').textContent").endswith("</script><b>")


def test_a_page_is_one_file_with_everything_in_it(result: JobResult, tmp_path: Path) -> None:
    page = write_page(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 3
    assert "default-src 'none'" in page
    assert "four bits &lt;/script&gt;" in page
    assert len(page) < 3_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_without_anything_is_still_a_page(tmp_path: Path) -> None:
    page = write_page(JobResult(report=bs.quantize(Net(), [torch.randn(8, 3, 8, 8)]).report), tmp_path / "r.html")
    assert "plot-sqnr" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["plotly.offline", "jinja2"])
def test_a_missing_extra_is_named(
    package: str, result: JobResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmith.report import page

    page._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitsmith\[report\]'"):
        write_page(result, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_warnings_come_with_remedies(result: JobResult) -> None:
    found = {warning.what: warning.remedy for warning in warnings_for(result)}
    assert list(found)[:2] == ["FAILED: it differs", "top-1 is 10.00 points below the float model"]
    assert "slower than the float one" in list(found)[-1]
    assert all(found.values())


def test_the_speed_of_what_checks_a_device_s_files_is_no_warning(result: JobResult) -> None:
    coverage = result.report.coverage.model_copy(update={"runtime": "onnxruntime"})
    report = result.report.model_copy(update={"coverage": coverage})
    elsewhere = result.model_copy(update={"report": report})
    assert any("slower" in warning.what for warning in warnings_for(result))
    assert not any("slower" in warning.what for warning in warnings_for(elsewhere))


@pytest.mark.parametrize(("bits", "integer"), [(4, False), (4, True), (8, False)])
def test_slow_files_of_packed_weights_are_told_of_bytes(result: JobResult, bits: int, integer: bool) -> None:
    layer = LayerReport(name="b", type="Conv2d", macs=1, weight_bits=bits, input_bits=8, integer=integer)
    report = result.report.model_copy(update={"layers": [layer]})
    remedy = warnings_for(result.model_copy(update={"report": report}))[-1].remedy
    assert ("keep 4-bit weights in bytes (--opset 20" in remedy) is (bits == 4 and not integer)


def test_write_report_gives_a_page_or_its_data(tmp_path: Path) -> None:
    q = bs.quantize(Net(), [torch.randn(16, 3, 8, 8)])
    assert bs.write_report(q, tmp_path / "a.html", [torch.randn(4, 3, 8, 8)]).stat().st_size > 1_000_000
    data: dict[str, Any] = json.loads(bs.write_report(q, tmp_path / "a.json", [torch.randn(4, 3, 8, 8)]).read_text())
    assert JobResult.model_validate(data).pictures is not None
    assert data["pictures"]["samples"] == 4
    with pytest.raises(DataError, match=r"must end in \.html"):
        bs.write_report(q, tmp_path / "a.pdf")
    with pytest.raises(DataError, match="has no report"):
        bs.write_report(Net(), tmp_path / "a.html")


def test_the_front_is_what_no_other_beats() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [tuple(map(float, point)) for point in torch.randint(0, 6, (40, 2), generator=generator)]
    beaten = {
        i
        for i, (cost, value) in enumerate(points)
        if any((c <= cost and v > value) or (c < cost and v >= value) for c, v in points)
    }
    front = pareto_front(points)  # type: ignore[arg-type]
    assert front.isdisjoint(beaten)
    assert {points[i] for i in front} == {p for i, p in enumerate(points) if i not in beaten}


def test_every_key_of_report_json_is_on_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    schema = JobResult.model_json_schema()
    keys = {
        key
        for name in ("LayerReport", "Coverage", "StepReport", "RangeReport", "Report", "Pictures", "Histogram")
        for key in schema["$defs"][name]["properties"]
    }
    written = set(re.findall(r"[`.](\w+)", text))
    assert sorted((keys | schema["properties"].keys()) - written) == []
