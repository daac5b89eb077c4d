"""Evidence kept beside an exported file, so that it can be verified again without the model's code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..capture.inputs import Arguments
from ..errors import CheckpointError, VerificationError
from ..files import atomic_write, write_text
from ..model import QuantizedModel
from ..targets import list_targets
from .certificate import Certificate, OutputComparison, judge, judge_contract
from .engines import engine_for, engine_of, open_verifiable
from .verify import check_contract, compare_output, file_digest, flat_inputs, input_names

EVIDENCE = "evidence.safetensors"
CERTIFICATE = "certificate.json"


def save_evidence(folder: str | Path, q: QuantizedModel, certificate: Certificate, batch: Arguments) -> None:
    """Write the certificate, and a batch with what integer executor and simulation made of it."""
    folder, q = Path(folder), q.captured()
    args, kwargs = batch
    tensors = {f"input.{name}": t.contiguous() for name, t in zip(input_names(q), flat_inputs(batch))}
    for stream, run in (("integer", q.integer_executor()), ("simulation", q)):
        outputs = torch.utils._pytree.tree_leaves(run(*args, **kwargs))
        for index, value in enumerate(o for o in outputs if isinstance(o, Tensor)):
            tensors[f"{stream}.{index}"] = value.detach().cpu().contiguous()
    with atomic_write(folder / EVIDENCE) as path:
        save_file(tensors, path)
    write_text(folder / CERTIFICATE, certificate.model_dump_json(indent=2) + "\n")


def verify_folder(folder: str | Path) -> Certificate:
    """Run the file in a folder again and hold it against the evidence kept there.

    Raises VerificationError where the folder holds no evidence or another file than the one that was certified.
    """
    folder = Path(folder)
    recorded, tensors = _read(folder)
    path = folder / recorded.file
    for name, digest in {recorded.file: recorded.sha256, **recorded.companions}.items():
        present = folder / Path(name).name
        if not present.is_file():
            raise VerificationError(f"{present}, which the certificate is about, is not there: export it again")
        if file_digest(present) != digest:
            raise VerificationError(
                f"{present} is not the file that was certified: its SHA-256 differs; export it again"
            )
    runtime = open_verifiable(path, engine_of(path, wanted=engine_for(recorded.engine)))
    if len(runtime.outputs) != len(recorded.outputs):
        raise VerificationError(f"{path} has {len(runtime.outputs)} outputs, its certificate {len(recorded.outputs)}")
    feeds = {name: np.ascontiguousarray(_tensor(tensors, f"input.{name}", folder).numpy()) for name in runtime.inputs}
    outputs = []
    for index, array in enumerate(runtime.run(feeds)):
        integer = _tensor(tensors, f"integer.{index}", folder)
        simulation = _tensor(tensors, f"simulation.{index}", folder)
        known = recorded.outputs[index]
        file = torch.from_numpy(np.asarray(array)).flatten().double()
        outputs.append(
            compare_output(known.name, known.lsb, file, integer.flatten().double(), simulation.flatten().double())
        )
    passed, verdict = judge(
        outputs, recorded.float_operators, recorded.allowed_max_lsb == 0, recorded.allowed_max_lsb,
        math.inf if recorded.allowed_mean_lsb is None else recorded.allowed_mean_lsb,
    )  # fmt: skip
    known_targets = {target.name: target for target in list_targets()}
    contract = check_contract(known_targets[recorded.target], path) if recorded.target in known_targets else []
    passed, verdict = judge_contract(contract, passed, verdict)
    return recorded.model_copy(
        update={
            "outputs": outputs,
            "contract": contract,
            "passed": passed,
            "verdict": verdict,
            "samples": _samples(outputs, tensors),
            "engine_version": runtime.version,
            "top1_agreement": None,
        }
    )


def _read(folder: Path) -> tuple[Certificate, dict[str, Tensor]]:
    for name in (CERTIFICATE, EVIDENCE):
        if not (folder / name).is_file():
            raise VerificationError(f"{folder} holds no {name}: give a folder that 'bitsmith quantize -o' wrote")
    try:
        recorded = Certificate.model_validate(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8")))
        return recorded, load_file(folder / EVIDENCE)
    except (ValidationError, ValueError, SafetensorError, OSError) as error:
        raise CheckpointError(f"the evidence in {folder} is damaged: {error}") from error


def _tensor(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise VerificationError(f"the evidence in {folder} lacks {name!r}, which the file needs")
    return tensors[name]


def _samples(outputs: list[OutputComparison], tensors: dict[str, Any]) -> int:
    return next((int(t.shape[0]) for name, t in tensors.items() if name.startswith("input.") and t.ndim), 0)
