"""All rules on one model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.inputs import ForwardFunction, batch_arguments, read_batches
from ..flow import check_arguments
from ..targets import Target, get_target
from . import activations, numbers, shapes, structure, training
from .model import Diagnosis
from .rule import RULES
from .subject import Subject, TrainingPlan
from .triage import as_finding, triage

_RULE_FILES = (activations, numbers, shapes, structure, training)  # importing them fills RULES
_ORDER = {"error": 0, "warning": 1, "note": 2}
RULE_COUNT = len(RULES) + 1  # with D28, the triage


def doctor(
    model: nn.Module, example_inputs: Any, *, target: str | Target = "onnxruntime",
    optimizer: torch.optim.Optimizer | None = None, training: TrainingPlan | None = None,
    calibration: Iterable[Any] | None = None, validation: Iterable[Any] | None = None, file: str | Path | None = None,
    forward: ForwardFunction | None = None,
) -> Diagnosis:  # fmt: skip
    """Examine a float model before it is quantized: thirty rules, each finding with its place, reason and remedy.

    ``example_inputs`` is one batch, as for calibration. What is given besides decides what can be looked at:
    ``optimizer`` and ``training`` (how it is trained), ``calibration`` (ranges and tails), ``calibration`` with
    ``validation`` (the triage: float, 16 and 8 bits on the same data; labelled batches give accuracy), ``file`` (an
    ONNX file for a TIDL target). Rules that cannot look are named in ``not_run``. The model is not changed.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()).eval()
    >>> diagnosis = doctor(net, torch.randn(2, 3, 8, 8))
    >>> [finding.rule for finding in diagnosis.findings], diagnosis.healthy
    (['D8'], True)
    """
    start = time.perf_counter()
    check_arguments(model)
    arguments = batch_arguments(model, example_inputs, forward)
    calibration = None if calibration is None else list(calibration)
    batches = None if calibration is None else read_batches(model, calibration, forward)
    subject = Subject(
        model, arguments, get_target(target), optimizer, training, batches, None if file is None else Path(file)
    )
    diagnosis = Diagnosis(model=type(model).__name__, target=subject.target.name)
    for rule in RULES.values():
        if (missing := rule.missing(subject)) is not None:
            diagnosis.not_run[rule.id] = missing
        else:
            diagnosis.findings += rule.run(subject)
    if calibration is None or validation is None or subject.capture_error is not None:
        diagnosis.not_run["D28"] = "give calibration= and validation="
    else:
        diagnosis.triage = triage(model, calibration, subject.target, validation)
        diagnosis.findings.append(as_finding(diagnosis.triage))
    diagnosis.findings.sort(key=lambda f: (_ORDER[f.severity], int(f.rule[1:])))
    diagnosis.seconds = time.perf_counter() - start
    diagnosis._subject = subject
    return diagnosis
