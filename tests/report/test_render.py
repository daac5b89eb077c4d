"""Reports and results as tables."""

from __future__ import annotations

import io

from rich.console import Console

from bitsmith.report.model import Coverage, LayerReport, Report
from bitsmith.report.render import certificate_table, count, coverage_line, report_view, size


def shown(what: object, width: int = 80) -> str:
    """What a terminal of that width shows."""
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def layer(name: str, sqnr: float | None, note: str = "") -> LayerReport:
    """A convolution."""
    return LayerReport(name=name, type="Conv2d", weight_bits=8, macs=10, integer=True, sqnr_db=sqnr, note=note)


def test_the_weakest_layers_are_marked() -> None:
    report = Report(layers=[layer("a", 30.0), layer("b", 10.0), layer("c", None), layer("d", 20.0), layer("e", 40.0)])
    marked = [line.split()[0] for line in shown(report_view(report)).splitlines() if "weakest" in line]
    assert marked == ["a", "b", "d"]


def test_notes_that_repeat_are_told_once() -> None:
    report = Report(
        layers=[layer(f"conv{i}", 20.0, "runs in float") for i in range(8)],
        notes=[f"batch norm bn{i} folded into conv{i}" for i in range(8)],
    )
    text = " ".join(shown(report_view(report)).split())
    assert "note: 8 batch norms folded into their neighbours" in text
    assert "conv4, conv5 and 2 more: runs in float" in text


def test_many_notes_are_cut() -> None:
    text = shown(report_view(Report(notes=[f"remark {i}" for i in range(15)])))
    assert "remark 9" in text
    assert "and 5 more notes in report.json" in text


def test_names_with_brackets_are_not_markup() -> None:
    assert "[bold]x[/bold]" in shown(report_view(Report(layers=[layer("[bold]x[/bold]", 1.0)])))


def test_coverage_tells_quantized_from_integer() -> None:
    line = coverage_line(Report(coverage=Coverage(total_macs=4, quantized_macs=4, integer_macs=1)))
    assert line.startswith("25.0 % of 4 multiply-accumulates run in integers on the target (100.0 %")
    other = Coverage(total_macs=4, quantized_macs=4, integer_macs=1, runtime="another")
    assert "run in integers in another, which checks the files (100.0 %" in coverage_line(Report(coverage=other))
    assert coverage_line(Report()) == "0.0 % of 0 multiply-accumulates run in integers"


def test_numbers_have_three_digits() -> None:
    assert [count(n) for n in (0, 999, 1000, 12_345, 999_000, 41_100_000)] == [
        "0", "999", "1.00 k", "12.3 k", "999 k", "41.1 M",
    ]  # fmt: skip
    assert size(999) == "999 B"


def test_a_report_prints_as_a_table_of_100_columns() -> None:
    layers = [layer(f"layer{i}.conv", 20.0 + i, "a remark that goes on and on " * 5) for i in range(5)]
    report = Report(recipe="int8", target="onnxruntime", placement="runtime", samples=1000, layers=layers)
    lines = str(report).splitlines()
    assert lines[0] == "int8 for onnxruntime, placement runtime, 1,000 calibration samples"
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("layer0.conv") and "weakest" in line for line in lines)
    assert "\x1b" not in str(report)
    assert repr(report).startswith("Report(recipe='int8', target='onnxruntime'")
    assert "multiply-accumulates" in str(Report())


def test_the_certificates_float_size_is_named_after_what_it_counts() -> None:
    """The table of results shows the float file, which is larger than its parameters."""
    text = " ".join(shown(certificate_table({"file_bytes": 30, "float_bytes": 100})).split())
    assert text == "bytes of the file 30 bytes of the float parameters 100"
