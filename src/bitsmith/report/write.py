"""The report of a quantized model as a file: a page to look at, or its data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..capture import read_batches
from ..capture.inputs import Arguments, first_samples
from ..errors import DataError
from ..files import write_text
from .model import Report
from .page import write_page
from .pictures import Pictures, take_pictures

if TYPE_CHECKING:
    from ..sensitivity.model import Sensitivity
    from ..verify.certificate import Certificate

SAMPLES = 32  # that activations are looked at with


def write_report(
    q: nn.Module, path: str | Path, data: Iterable[Any] | None = None, *, model: nn.Module | None = None,
    certificate: Certificate | None = None, sensitivity: Sensitivity | None = None,
) -> Path:  # fmt: skip
    """Write what was done to ``q``: a page for a browser (``.html``), or the same as data (``.json``).

    The page is one file that loads nothing; it needs the extra ``report``. ``data`` are batches as ``quantize`` takes
    them: the first 32 samples give the histograms of activations and each layer's own noise; with the float ``model``
    the latter also where steps changed weights. ``certificate`` is what ``verify`` gave, ``sensitivity`` that of
    ``bitsmith.sensitivity``. Keys of the JSON are described in docs/report.md.

    >>> import tempfile, torch, bitsmith as bs
    >>> q = bs.quantize(nn.Linear(4, 2), [torch.randn(32, 4)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(q, Path(folder, "report.json")).name
    'report.json'
    """
    from ..evaluate.job import JobResult

    path = Path(path)
    if path.suffix not in (".html", ".json"):
        raise DataError(f"{path} must end in .html (a page) or .json (its data), not {path.suffix or 'nothing'!r}")
    report = getattr(q, "report", None)
    if not isinstance(report, Report):
        raise DataError(f"a {type(q).__name__} has no report: give what bitsmith.quantize made")
    result = JobResult(
        report=report, recipe_yaml=q.recipe.to_yaml(), pictures=look_at(q, data, model), sensitivity=sensitivity,  # type: ignore[operator,union-attr]
        certificate=None if certificate is None else certificate.model_dump(mode="json"),
    )  # fmt: skip
    if path.suffix == ".html":
        return write_page(result, path)
    write_text(path, result.model_dump_json(indent=2) + "\n")
    return path


def look_at(q: nn.Module, data: Iterable[Any] | None, model: nn.Module | None = None) -> Pictures:
    """The Pictures of a quantized model, with the leading samples of ``data``."""
    from ..model import QuantizedModel

    if data is None or not isinstance(q, QuantizedModel):
        return take_pictures(q)
    batches = read_batches(q if model is None else model, data, None)
    few = first_samples(batches[0], SAMPLES)
    return take_pictures(q, few, _floats(q, model, few))


def _floats(q: Any, model: nn.Module | None, few: Arguments) -> dict[str, nn.Module] | None:
    """The layers with the weights that they had before the recipe's steps rounded them."""
    from ..eager import has_stubs
    from ..sensitivity.measure import prepared_graph

    stages = {step.stage for step in q.recipe.steps if step.name != "fold_batch_norm"}
    if model is None or not stages & {"weights", "blocks"} or "prepare" in stages or has_stubs(model):
        return None  # nothing was changed, or by a rewriting that depends on the data
    graph, _ = prepared_graph(model, [few], q.recipe, q.target)
    return dict(graph.named_modules())
