"""The report as one HTML file: tables from a template, plots by Plotly, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..files import write_text
from . import render
from .warn import warnings_for

if TYPE_CHECKING:
    from ..evaluate.job import JobResult

_ASSETS = Path(__file__).parent / "assets"
_MOST_BARS = 400  # layers with histograms in one page


def write_page(result: JobResult, path: str | Path) -> Path:
    """Write ``report.html``; MissingExtraError where Plotly or Jinja2 is not installed."""
    headings, rows = render.summary_rows(result)
    certificate = result.certificate or {}
    page = _template("report.html").render(
        **_frame(f"{result.report.recipe or 'quantized'} for {result.report.target or 'no target'}", _data(result)),
        result=result,
        report=result.report,
        headings=headings,
        rows=rows,
        cards=_cards(result),
        layers=_layer_rows(result),
        warnings=warnings_for(result),
        notes=[*result.notes, *result.report.notes],
        coverage=render.coverage_line(result.report),
        certificate=render.certificate_rows(certificate),
    )
    return _write(path, page)


def write_pareto(
    rows: Sequence[Mapping[str, Any]], path: str | Path, *, cost: str = "bits", value: str = "top1",
    label: str = "recipe", title: str = "Accuracy against bits", float_value: float | None = None,
) -> Path:  # fmt: skip
    """One HTML file that plots ``value`` (more is better) against ``cost`` (less is better) of a sweep's rows.

    Rows are mappings; those without a number for either are listed, not drawn. The rows that no other beats in both
    are joined by a line (``pareto_front``); ``float_value`` is the float model's, a line across. All fields are in a
    sortable table.
    """
    drawn = [row for row in rows if _is_number(row.get(cost)) and _is_number(row.get(value))]
    front = pareto_front([(float(row[cost]), float(row[value])) for row in drawn])
    points = [
        {"x": row[cost], "y": row[value], "label": str(row.get(label, "")), "front": index in front}
        for index, row in enumerate(drawn)
    ]
    data = {"pareto": {"points": points, "cost": cost, "value": value, "float": float_value}}
    first = [name for name in (label, value, cost) if any(name in row for row in rows)]  # what a phone shows
    columns = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    filled = {column: [row[column] for row in rows if row.get(column) is not None] for column in columns}
    page = _template("sweep.html").render(
        **_frame(title, data), rows=rows, columns=columns, count=len(rows), left_out=len(rows) - len(drawn),
        numeric=[column for column, values in filled.items() if all(map(_is_number, values))],
    )  # fmt: skip
    return _write(path, page)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points (cost, value) that no other beats: none costs no more and is worth more, or costs less.

    >>> sorted(pareto_front([(8, 90.0), (4, 85.0), (6, 84.0), (8, 91.0)]))
    [1, 3]
    """
    front: set[int] = set()
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.add(index)
    return front


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _write(path: str | Path, page: str) -> Path:
    path = Path(path)
    write_text(path, page)
    return path


@cache
def _plotly() -> str:
    """Plotly's script, compressed: 2 MB instead of 5 in every page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError(_missing("Plotly")) from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _template(name: str) -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError(_missing("Jinja2")) from error
    environment = Environment(
        loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": render.count, "number": _number}
    return environment.get_template(name)


def _missing(what: str) -> str:
    return f"report.html is drawn with {what}, which is not installed: pip install 'bitsmith[report]'"


def _frame(title: str, data: Any) -> dict[str, Any]:
    """What every page holds; JSON inside a script element must not close it."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return {
        "title": title,
        "data": Markup(text),
        "plotly": Markup(_plotly()),
        "style": Markup((_ASSETS / "page.css").read_text(encoding="utf-8")),
        "script": Markup((_ASSETS / "page.js").read_text(encoding="utf-8")),
    }


def _data(result: JobResult) -> dict[str, Any]:
    """What the plots need."""
    pictures = None if result.pictures is None else result.pictures.model_dump(mode="json")
    if pictures is not None:
        for key in ("weights", "activations", "channels"):
            pictures[key] = pictures[key][:_MOST_BARS]
    return {
        "layers": [
            {
                "name": layer.name,
                "propagated": layer.sqnr_db,
                "local": _local(result, layer.name),
                "weight": layer.weight_sqnr_db,
            }
            for layer in result.report.layers
        ],
        "pictures": pictures,
        "sensitivity": None if result.sensitivity is None else result.sensitivity.model_dump(mode="json"),
    }


def _local(result: JobResult, name: str) -> float | None:
    if result.pictures is not None and result.pictures.local_sqnr_db:
        return result.pictures.local_sqnr_db.get(name)
    layers = [] if result.sensitivity is None else result.sensitivity.layers
    return next((layer.local_db for layer in layers if layer.name == name), None)


def _layer_rows(result: JobResult) -> list[dict[str, Any]]:
    """The table of layers, one row each."""
    pictures = result.pictures
    weights = {h.tensor: h for h in pictures.weights} if pictures else {}
    inputs = {layer: h for h in pictures.activations for layer in h.layers} if pictures else {}
    seconds: dict[str, float] = {}
    for step in result.report.steps:
        seconds[step.layer] = seconds.get(step.layer, 0.0) + step.seconds
    return [
        {
            "layer": layer,
            "weights": weights.get(layer.name),
            "input": inputs.get(layer.name),
            "local": _local(result, layer.name),
            "seconds": seconds.get(layer.name),
        }
        for layer in result.report.layers
    ]


def _cards(result: JobResult) -> list[tuple[str, str, str, str]]:
    """The numbers at the top: what, the number, a remark, and good, bad or nothing."""
    cards = []
    if result.certificate is not None:
        passed = result.passed
        verdict = str(result.certificate.get("verdict", "")).partition(": ")[2].partition(";")[0]
        cards.append(("certificate", "passed" if passed else "failed", verdict, "good" if passed else "bad"))
    final = result.metrics.get("deployed") or result.metrics.get("simulated")
    exact = result.metrics.get("float")
    if final is not None and exact is not None and final.top1 is not None and exact.top1 is not None:
        change = final.top1 - exact.top1
        remark = f"float {exact.top1:.2f} %, {change:+.2f} points on {final.samples:,} samples"
        cards.append(("top-1", f"{final.top1:.2f} %", remark, ""))
    if result.sizes.get("float"):
        ratio = result.sizes["float"] / result.sizes["quantized"]
        sizes = f"{render.size(result.sizes['quantized'])} instead of {render.size(result.sizes['float'])}"
        cards.append(("file", f"{ratio:.1f} x smaller", sizes, ""))
    coverage = result.report.coverage
    here = f", in {coverage.runtime}" if coverage.is_checked_elsewhere else ""
    for batch, times in list(result.latency.items())[:1]:
        found = times["quantized"]
        speed = f"{found.median_ms:.3g} ms instead of {times['float'].median_ms:.3g} ms, batch {batch}"
        word = f"{found.ratio:.2f} x as fast"
        cards.append(("speed" + here, word, speed, "bad" if found.ratio < 1 and not here else ""))
    if coverage.total_macs:
        remark = f"of {render.count(coverage.total_macs)} multiply-accumulates" + here
        cards.append(("in integers", f"{coverage.fraction:.1%}", remark, ""))
    if result.report.output_sqnr_db is not None:
        remark = "signal to noise at the outputs"
        cards.append(("SQNR", f"{result.report.output_sqnr_db:.1f} dB", remark, ""))
    return cards


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
