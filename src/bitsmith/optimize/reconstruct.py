"""Block reconstruction: learn a block's rounding, biases and activation scales so that its output is the float one.

Sources: Li et al., BRECQ (arXiv 2102.05426), with the plain squared error in place of its Fisher weights; Wei et al.,
QDrop (arXiv 2203.05740); AdaRound's parametrisation (arXiv 2004.10568); LSQ's scales (arXiv 1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..steps import Reconstruct
from .soft_rounding import beta_at
from .trainable import TrainableBlock

Report = Callable[[int, int], None]  # (iterations done, in all)
_REPORTS = 20


@dataclass
class Batch:
    """A minibatch: all that the block reads, its sources as the float stream has them, and its targets."""

    values: dict[fx.Node, Any]
    exact: dict[fx.Node, Tensor]
    targets: list[Tensor]


def reconstruct(block: TrainableBlock, batches: Iterator[Batch], options: Reconstruct, report: Report) -> None:
    """Learn, and leave the result in the block's layers and Quantizers.

    ``batches`` yields as many minibatches as there are iterations.
    """
    rounding = block.rounding
    groups: list[dict[str, Any]] = [{"params": [rounding.v]}]
    if options.lr_bias and block.shift:
        groups.append({"params": list(block.shift.values()), "lr": options.lr_bias, "peak": options.lr_bias})
    if options.lr_scale and len(block.start):
        groups.append({"params": [block.log_scale], "lr": options.lr_scale, "peak": options.lr_scale})
    optimizer = torch.optim.Adam(groups, fused=True)
    norms: list[float] = []
    total = options.iterations
    for iteration, batch in enumerate(batches):
        if iteration == 0:
            norms = _first_run(block, batch)
        progress = iteration / total
        optimizer.param_groups[0]["lr"] = options.rate(progress)
        for group in optimizer.param_groups[1:]:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * progress))
            for parameter in group["params"]:
                parameter.grad = None
        rounding.refresh()
        loss = _loss(block, batch, norms, options)
        torch.autograd.backward(loss)
        beta = beta_at(progress, options.warmup, options.beta_start, options.beta_end)
        rounding.pull_back(0.0 if beta is None else options.regulariser, beta or 2.0)
        optimizer.step()
        rounding.project()
        if iteration % max(1, total // _REPORTS) == 0:
            report(iteration, total)
    block.write_back()


def _loss(block: TrainableBlock, batch: Batch, norms: list[float], options: Reconstruct) -> Tensor:
    values = dict(batch.values)
    if options.drop:
        for source, exact in batch.exact.items():
            values[source] = torch.lerp(exact, values[source], block.kept_like(exact))
    device = batch.targets[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        outputs = block(values)
    errors = [(out.float() - exact).square().mean() / norm for out, exact, norm in zip(outputs, batch.targets, norms)]
    return torch.stack(errors).sum()


@torch.no_grad()
def _first_run(block: TrainableBlock, batch: Batch) -> list[float]:
    """The error with nearest rounding, by which the loss is divided; also sets the biases' units."""
    soft, noise = block.rounding.v.clone(), block.noise
    block.noise = None
    block.rounding.v.copy_(torch.where(block.rounding.fraction > 0.5, 20.0, -20.0))
    block.rounding.refresh()
    values = dict(batch.values)
    outputs = block(values)
    block.set_units(values)
    block.rounding.v.copy_(soft)
    block.noise = noise
    errors = [float((out - exact).square().mean()) for out, exact in zip(outputs, batch.targets)]
    return [max(error, 1e-12) for error in errors]
