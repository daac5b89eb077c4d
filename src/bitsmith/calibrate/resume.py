"""What a step has learned, kept in a folder as it goes, so that a killed run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import atomic_write, prepare_output_dir, write_text
from ..grid import Quantizer

_RUN = "run.json"
_FORMAT = 1  # raised when what is learned changes


class Resume:
    """A folder of finished pieces of one run: a file per block or layer, written whole or not at all.

    ``fingerprint`` is what the run computes from; a folder that holds another one's pieces is refused.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = prepare_output_dir(folder)
        run = self.folder / _RUN
        if run.exists():
            try:
                known = json.loads(run.read_text(encoding="utf-8")).get("fingerprint")
            except (OSError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{run} cannot be read ({error}): empty the folder to start afresh") from error
            if known != fingerprint:
                raise CheckpointError(
                    f"the resume folder {folder} holds a run with another model, recipe, calibration data or "
                    "version of torch: name another folder, or empty it to start afresh"
                )
        elif any(self.folder.glob("*.safetensors")):
            raise CheckpointError(f"the resume folder {folder} holds other files: name an empty folder")
        else:
            write_text(run, json.dumps({"fingerprint": fingerprint}))

    def load(self, piece: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a finished piece and what was said of it; None where it is still to be done."""
        path = self.folder / f"{piece}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                notes = json.loads((file.metadata() or {})["notes"])
                return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): delete it, and this piece is done again") from error

    def save(self, piece: str, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep a finished piece."""
        whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        with atomic_write(self.folder / f"{piece}.safetensors") as path:
            save_file(whole, path, metadata={"notes": json.dumps(notes)})


def fingerprint(graph: nn.Module, batches: Iterable[Any], options: str) -> str:
    """A hash of the graph's parameters and specs, the calibration data and the options."""
    digest = hashlib.sha256(f"{_FORMAT} {torch.__version__} {options}".encode())
    for name, module in graph.named_modules():
        if isinstance(module, Quantizer):
            digest.update(f"{name} {module.spec!r}".encode())
    for name, value in graph.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    for value in torch.utils._pytree.tree_leaves(list(batches)):
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
