"""Reports, results and targets as tables for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .model import LayerReport, Report

if TYPE_CHECKING:
    from ..evaluate.job import JobResult
    from ..evaluate.metrics import Metrics
    from ..sensitivity.model import Sensitivity
    from ..targets.target import Target

_NONE = "-"
_NOTES = 10
_CONTENTS = {
    "model.onnx": "the quantized model, to deploy",
    "model.pt": "the quantized model as TorchScript",
    "model.pth.tar": "the quantized model, for the network loader",
    "model.yaml": "its network description",
    "recipe.yaml": "how it was quantized",
    "report.json": "all numbers of this run",
    "report.html": "the same to look at, in any browser",
    "certificate.json": "the proof, and the file's checksum",
    "evidence.safetensors": "samples for 'bitsmith verify'",
    "quantized.json": "for bitsmith.load: formats and scales",
    "quantized.safetensors": "for bitsmith.load: weights",
}
# The float file of the results' table also holds a graph: it is larger than the parameters alone.
_CERTIFICATE_LABELS = {"file_bytes": "bytes of the file", "float_bytes": "bytes of the float parameters"}


def layer_table(report: Report, *, weakest: int = 3, only_weakest: bool = False) -> RenderableType:
    """One line per layer: type, bits, multiply-accumulates, SQNR. The ``weakest`` by SQNR are marked."""
    weak_layers = _weakest(report.layers, weakest)
    marked = {layer.name for layer in weak_layers}
    layers = weak_layers if only_weakest else report.layers
    title = f"The {len(layers)} weakest of {len(report.layers)} layers" if only_weakest else "Layers"
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("in → out", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("SQNR dB", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for layer in layers:
        weak = layer.name in marked
        sqnr = _NONE if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        table.add_row(
            escape(layer.name),
            layer.type,
            _bits(layer.weight_bits),
            f"{_bits(layer.input_bits)} → {_bits(layer.output_bits)}",
            count(layer.macs),
            Text(sqnr, style="bold yellow" if weak else ""),
            _mark(layer, weak and not only_weakest),
        )
    return table


def report_view(report: Report) -> RenderableType:
    """The whole report: layers, coverage and notes."""
    lines = [coverage_line(report), *(f"note: {note}" for note in _all_notes(report))]
    return Group(layer_table(report), Text(""), *(Text(line) for line in lines))


def sensitivity_view(found: Sensitivity) -> RenderableType:
    """What each layer costs, the most harmful first, and which to keep at more bits."""
    title = f"Sensitivity: {found.recipe} for {found.target}, {found.samples:,} samples"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("layer", "type", "bits", "local", "propagated", "alone", "left out"):
        table.add_column(heading, overflow="fold", justify="left" if heading in ("layer", "type") else "right")
    for layer in found.ranked:
        bits = f"{_bits(layer.weight_bits)} x {_bits(layer.input_bits)}"
        numbers = (layer.local_db, layer.propagated_db, layer.alone_db, layer.left_out_db)
        table.add_row(escape(layer.name), layer.type, bits, *map(_decibels, numbers))
    sides = f"weights only {_decibels(found.weights_only_db)}, activations only {_decibels(found.activations_only_db)}"
    lines = ["SQNR in dB: local and propagated at the layer's output, alone and left out at the model's"]
    lines += [f"outputs: {_decibels(found.all_db)} dB, {sides}", f"proposal: {found.proposal.reason}"]
    yaml = [Text(found.proposal.to_yaml())] if found.proposal.overrides else []
    return Group(table, Text(""), *map(Text, lines), *yaml)


def report_text(report: Report, width: int = 100) -> str:
    """The whole report as plain text of at most ``width`` columns, for ``print``."""
    parts = [report.recipe, f"for {report.target}" if report.target else ""]
    heading = " ".join(part for part in parts if part)
    facts = [f"placement {report.placement}"] if report.placement else []
    facts += [f"{report.samples:,} calibration samples"] if report.samples else []
    facts += [f"SQNR of the outputs {report.output_sqnr_db:.1f} dB"] if report.output_sqnr_db is not None else []
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False)
    if heading or facts:
        console.print(Text(", ".join([heading] * bool(heading) + facts)), "", sep="\n")
    console.print(report_view(report))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def coverage_line(report: Report) -> str:
    """How much runs in integers, in one sentence.

    >>> from bitsmith.report.model import Coverage
    >>> coverage_line(Report(coverage=Coverage(integer_macs=3, total_macs=4, float_layers=["fc"])))
    '75.0 % of 4 multiply-accumulates run in integers; in float: fc'
    """
    coverage = report.coverage
    share = f"{100 * coverage.fraction:.1f} % of {count(coverage.total_macs)}"
    line = f"{share} multiply-accumulates run in integers"
    if coverage.quantized_macs > coverage.integer_macs:
        where = f"in {coverage.runtime}, which checks the files" if coverage.is_checked_elsewhere else "on the target"
        line += f" {where} ({100 * coverage.quantized_fraction:.1f} % have quantized operands)"
    names = coverage.float_layers
    if names:
        line += f"; in float: {listed(names)}"
    return line


def summary_table(result: JobResult) -> Table:
    """Accuracy, size and speed of the float model, the simulation and the file, side by side."""
    headings, rows = summary_rows(result)
    report = result.report
    title = f"{report.recipe or 'quantized'} for {report.target or 'no target'}"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def summary_rows(result: JobResult) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings and rows of that table."""
    headings = {"float": "float model", "simulated": "simulated", "deployed": "deployed file"}
    present = [name for name in headings if name in result.metrics]
    rows = _metric_rows([result.metrics[name] for name in present])
    file_of = {"float": "float", "deployed": "quantized"}  # which file each column is about
    if result.sizes:
        rows.append(("size of the file", [_size_cell(result.sizes, file_of.get(name)) for name in present]))
    for batch, times in result.latency.items():
        rows.append((f"latency, batch {batch}", [_latency_cell(times, file_of.get(name)) for name in present]))
        rows.append(
            (f"images/s, batch {batch}", [_rate_cell(times, file_of.get(name), int(batch)) for name in present])
        )
    return [headings[name] for name in present], rows


def certificate_line(certificate: Mapping[str, Any]) -> Text:
    """The verdict."""
    verdict = str(certificate.get("verdict", ""))
    color = "green" if certificate.get("passed") else "bold red"
    return Text("certificate: ", style="bold").append(verdict, style=f"not bold {color}")


def certificate_table(certificate: Mapping[str, Any]) -> Table:
    """Every number in a certificate."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in certificate_rows(certificate):
        table.add_row(label, escape(value))
    return table


def certificate_rows(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every number in a certificate."""
    rows = [
        (_CERTIFICATE_LABELS.get(key, key.replace("_", " ")), _plain(value))
        for key, value in certificate.items()
        if key not in ("verdict", "passed", "outputs") and value is not None and value not in ([], {})
    ]
    for output in certificate.get("outputs") or []:
        numbers = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in output.items() if key != "name"]
        rows.append(("output", f"{output.get('name')}: {', '.join(numbers)}"))
    return rows


def result_view(result: JobResult, *, layers: bool = False) -> RenderableType:
    """The end of a job: weakest layers (or all), summary, certificate, notes, and where the files are."""
    parts: list[RenderableType] = [layer_table(result.report, only_weakest=not layers), Text("")]
    if result.sensitivity is not None:
        parts += [sensitivity_view(result.sensitivity), Text("")]
    parts.append(summary_table(result))
    parts.append(Text(coverage_line(result.report)))
    if result.certificate is not None:
        parts.append(certificate_line(result.certificate))
    parts += [Text(f"{name} ").append(certificate_line(other)) for name, other in result.other_certificates.items()]
    parts += [Text(f"note: {note}", style="yellow") for note in [*result.notes, *_all_notes(result.report)]]
    if result.files:
        parts += [Text(""), _files_table(result.files)]
    return Group(*parts)


def targets_table(targets: Iterable[Target]) -> Table:
    """Targets, one line each: what they are and which numbers they take."""
    table = Table(title="Targets", title_justify="left", header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("weight bits", max_width=10)
    table.add_column("activation bits", max_width=10)
    table.add_column("scales", max_width=8)
    table.add_column("what it is", overflow="fold")
    for target in targets:
        table.add_row(
            target.name,
            span(target.weight_bits),
            span(target.activation_bits),
            ", ".join(target.scales),
            escape(target.description),
        )
    return table


def target_view(target: Target) -> RenderableType:
    """Everything that one target's data say."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in target.model_dump(mode="json").items():
        if key not in ("name", "description", "notes"):
            shown = span(value) if key.endswith("_bits") and isinstance(value, list) else _plain(value)
            table.add_row(key.replace("_", " "), escape(shown or _NONE))
    notes = [Text(f"note: {note}") for note in target.notes]
    return Group(Text(f"{target.name}: {target.description}", style="bold"), table, *notes)


def span(numbers: Sequence[int]) -> str:
    """Whole numbers in few words.

    >>> span((2, 3, 4, 5)), span((8,)), span((4, 8))
    ('2 to 5', '8', '4, 8')
    """
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def count(number: int) -> str:
    """A count in three digits.

    >>> count(950), count(1_234_567), count(4_100_000_000)
    ('950', '1.23 M', '4.10 G')
    """
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            digits = 2 if number < 10 * size else 1 if number < 100 * size else 0
            return f"{number / size:.{digits}f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes, in the units of file managers.

    >>> size(46_123)
    '46.1 kB'
    """
    return f"{count(number)}B" if number >= 1000 else f"{number} B"


def _weakest(layers: list[LayerReport], number: int) -> list[LayerReport]:
    judged = sorted((layer for layer in layers if layer.sqnr_db is not None), key=lambda layer: layer.sqnr_db or 0.0)
    return judged[:number]


def _mark(layer: LayerReport, weak: bool) -> Text:
    words = ["weakest"] * weak + ["float"] * (not layer.integer and layer.macs > 0)
    return Text(", ".join(words), style="yellow")


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    most = 6
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _decibels(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _bits(bits: int | None) -> str:
    return _NONE if bits is None else str(bits)


def _all_notes(report: Report) -> list[str]:
    folded = [note for note in report.notes if note.startswith("batch norm ")]
    notes = [note for note in report.notes if note not in folded]
    if folded:  # as many as there are layers, and none a surprise
        notes.append(f"{len(folded)} batch norms folded into their neighbours" if len(folded) > 1 else folded[0])
    by_note: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            by_note.setdefault(layer.note, []).append(layer.name)
    notes += [f"{listed(names)}: {note}" for note, names in by_note.items()]
    more = len(notes) - _NOTES
    return notes if more <= 0 else [*notes[:_NOTES], f"and {more} more notes in report.json"]


def _metric_rows(columns: list[Metrics]) -> list[tuple[str, list[str]]]:
    """The rows that at least one model has a number for."""
    rows = (
        ("top-1", "top1", "{:.2f} %"),
        ("top-5", "top5", "{:.2f} %"),
        ("your metric", "metric", "{:.4f}"),
        ("same class as float", "agreement", "{:.2f} %"),
        ("SQNR of the outputs", "sqnr_db", "{:.1f} dB"),
        ("samples", "samples", "{:,}"),
    )
    shown = []
    for label, field, form in rows:
        values = [getattr(metrics, field) for metrics in columns]
        if any(value is not None for value in values):
            shown.append((label, [_NONE if value is None else form.format(value) for value in values]))
    return shown


def _size_cell(sizes: Mapping[str, int], file: str | None) -> str:
    if file is None or file not in sizes:
        return _NONE
    ratio = f" ({sizes[file] / sizes['float']:.2f} x)" if file != "float" and sizes.get("float") else ""
    return f"{size(sizes[file])}{ratio}"


def _latency_cell(latency: Mapping[str, Any], file: str | None) -> str:
    if file is None or file not in latency:
        return _NONE
    entry = latency[file]
    speed = f" ({entry.ratio:.2f} x as fast)" if file != "float" else ""
    return f"{entry.median_ms:.3g} ms{speed}"


def _rate_cell(latency: Mapping[str, Any], file: str | None, batch: int) -> str:
    return _NONE if file is None or file not in latency else f"{1000 * batch / latency[file].median_ms:,.0f}"


def _files_table(files: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column()
    for path in files.values():
        table.add_row(escape(path), _CONTENTS.get(path.replace("\\", "/").rpartition("/")[2], ""))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    return str(value)
