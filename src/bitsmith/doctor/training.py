"""Rules about how a model is trained: D2 to D4 and D24."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from .rule import Note, rule
from .subject import Subject

_DECAY = 1e-4
_QAT_RATE = 1e-4
_QAT_EPOCHS = (25, 50)


@rule("D2", "weight decay spares biases, norms and depthwise convolutions", "optimizer")
def weight_decay(subject: Subject) -> Iterator[Note]:
    """Decay shrinks depthwise kernels and norms toward channels of very unlike ranges."""
    assert subject.optimizer is not None
    fragile = _fragile(subject.model)
    for index, group in enumerate(subject.optimizer.param_groups):
        decay = float(group.get("weight_decay", 0.0) or 0.0)
        hit = [fragile[id(p)] for p in group["params"] if id(p) in fragile]
        if decay >= _DECAY and hit:
            yield Note(
                "warning", f"optimizer.param_groups[{index}]",
                f"weight_decay={decay:g} also shrinks {len(hit)} biases, norms or depthwise weights ({hit[0]} ...): "
                "their channels drift apart in range, which one scale cannot hold",
                "put them into a group of their own: {'params': fragile, 'weight_decay': 0}; at most 1e-5 for them",
            )  # fmt: skip


def _fragile(model: nn.Module) -> dict[int, str]:
    """Parameters that decay harms, by identity."""
    found = {}
    for name, module in model.named_modules():
        depthwise = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels > 1
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1 or depthwise:
                found[id(parameter)] = f"{name}.{key}" if name else key
    return found


@rule("D3", "the optimizer is SGD, the same type for float and QAT", "optimizer")
def optimizer_type(subject: Subject) -> Iterator[Note]:
    """Adaptive steps leave weights with heavier tails; another optimizer for QAT undoes what the first one found."""
    kind = type(subject.optimizer).__name__
    before = subject.training.float_optimizer if subject.training else None
    if before is not None and before.lower() != kind.lower():
        yield Note(
            "warning", "optimizer", f"the float model was trained with {before}, this is {kind}: QAT starts best from "
            "the state of affairs that the float training left", f"use torch.optim.{before} for QAT as well",
        )  # fmt: skip
    elif before is None and kind.lower().startswith(("adam", "nadam", "radam", "rmsprop", "adagrad")):
        yield Note(
            "warning", "optimizer", f"{kind} scales every weight's step by itself, which tends to leave outliers in "
            "weights and activations", "prefer torch.optim.SGD(lr, momentum=0.9) for models that will be quantized",
        )  # fmt: skip


@rule("D4", "QAT: small steps, 25 to 50 epochs, norms frozen at half, ranges just after", "training")
def qat_schedule(subject: Subject) -> Iterator[Note]:
    """Quantization-aware training is a fine tuning of a trained model."""
    plan = subject.training
    assert plan is not None
    assert subject.optimizer is not None
    if not plan.qat:
        return
    rate = max(float(group["lr"]) for group in subject.optimizer.param_groups)
    if rate > _QAT_RATE:
        yield Note(
            "warning", "optimizer", f"lr={rate:g} is that of a training from scratch: QAT starts from a trained model",
            "start at lr=1e-5 and let it fall along a cosine",
        )  # fmt: skip
    if plan.epochs is not None and not _QAT_EPOCHS[0] <= plan.epochs <= _QAT_EPOCHS[1]:
        yield Note(
            "warning", "training.epochs", f"{plan.epochs} epochs: fewer than 25 leave accuracy on the table, more than "
            "50 seldom gain any", "train for 25 to 50 epochs",
        )  # fmt: skip
    half = None if plan.epochs is None else plan.epochs // 2
    if half is not None and plan.freeze_bn is not None and abs(plan.freeze_bn - half) > max(1, half // 4):
        yield Note(
            "warning", "training.freeze_bn", f"batch norms freeze after {plan.freeze_bn} of {plan.epochs} epochs: they "
            "should settle first, and then stand still while the weights adapt",
            f"bitsmith.QATSchedule({plan.epochs}, freeze_bn={half})",
        )  # fmt: skip
    frozen = plan.freeze_bn if plan.freeze_bn is not None else half
    if plan.freeze_ranges is not None and frozen is not None and plan.freeze_ranges < frozen:
        yield Note(
            "warning", "training.freeze_ranges", f"ranges freeze after {plan.freeze_ranges} epochs, before the batch "
            f"norms do ({frozen}): they no longer fit what the norms become",
            f"bitsmith.QATSchedule(..., freeze_ranges={frozen + 1})",
        )  # fmt: skip


@rule("D24", "the model can be copied", "model")
def copies(subject: Subject) -> Iterator[Note]:
    """Averaging (EMA), distillation and resuming copy a model; a copy that shares or loses parts corrupts both."""
    todo = "keep tensors in parameters and buffers and remove hooks that hold the module; then use copy.deepcopy(model)"
    try:
        twin = copy.deepcopy(subject.model)
    except Exception as error:  # whatever a module's __deepcopy__ raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        severity = "error" if subject.training is not None and subject.training.averaged else "warning"
        yield Note(
            severity, type(subject.model).__name__,  # type: ignore[arg-type]
            f"copy.deepcopy(model) fails ({reason}): averaging and distillation copy the model", todo,
        )  # fmt: skip
        return
    owned = {id(p) for p in subject.model.parameters()}
    shared = [name for name, p in twin.named_parameters() if id(p) in owned]
    if shared:
        yield Note(
            "warning", shared[0], f"a copy of the model shares {len(shared)} parameters with it: an average would "
            "follow every step of the training", todo,
        )  # fmt: skip
    loose = _loose_tensors(subject.model)
    if loose and subject.training is not None and subject.training.averaged:
        yield Note(
            "warning", loose[0], f"{len(loose)} tensors are plain attributes: no state dict, average or device move "
            "sees them", "self.register_buffer(name, tensor) instead of self.name = tensor",
        )  # fmt: skip


def _loose_tensors(model: nn.Module) -> list[str]:
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
