"""Files by the suffix of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..export import export_onnx, export_pt2
from ..model import QuantizedModel


def export(q: QuantizedModel, path: str | Path, **options: Any) -> Path:
    """Write ``q`` as what the suffix of ``path`` says."""
    writers = {".onnx": export_onnx, ".pt2": export_pt2}
    suffix = Path(path).suffix
    if suffix not in writers:
        raise ExportError(
            f"{str(path)!r} does not end in {' or '.join(writers)}: for other files convert() the model, then use "
            "bitsmith.export_torchscript, export_tidl or export_ai8x"
        )
    return writers[suffix](q, path, **options)
