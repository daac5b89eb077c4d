"""Small networks that placement policies treat differently, and a way to see where Quantizers stand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitsmith.capture import capture
from bitsmith.capture.ops import quantizer_of
from bitsmith.place.place import Placed, place
from bitsmith.recipe import Override, Recipe, load_recipe
from bitsmith.targets import get_target


class Residual(nn.Module):
    """conv1, relu, [conv2, + relu], pool, fc; one ReLU module for both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 4),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(x + self.conv2(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Two branches, one of them signed, and a conv over both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([F.relu(self.left(x)), self.right(x)], 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return self.out(x * torch.sigmoid(self.excite(gate)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depth(F.relu6(self.point(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.out(weights @ self.v(x))


INPUTS = {Attention: (2, 5, 8)}


def placed(
    net: type[nn.Module] | nn.Module,
    placement: Any = "runtime",
    *,
    recipe: str | Recipe = "int8",
    target: str = "onnxruntime",
    overrides: tuple[Override, ...] = (),
    shape: tuple[int, ...] | None = None,
    **fields: Any,
) -> tuple[fx.GraphModule, Placed]:
    """A network with its Quantizers in place."""
    model = net if isinstance(net, nn.Module) else net()
    x = torch.zeros(shape or INPUTS.get(type(model), (2, 3, 8, 8)))
    graph = capture(model.eval(), (x,))
    chosen = load_recipe(recipe).model_dump() | {"placement": placement, "overrides": overrides, **fields}
    return graph, place(graph, Recipe.model_validate(chosen), get_target(target))


def quantized_values(graph: fx.GraphModule) -> dict[str, bool]:
    """The values with a Quantizer of their own, by the node that makes them: True where known to be >= 0."""
    return {
        str(node.args[0]): quantizer_of(node).non_negative  # type: ignore[union-attr]
        for node in graph.graph.nodes
        if quantizer_of(node) is not None and node.meta.get("observe")
    }


def reads(graph: fx.GraphModule, name: str) -> list[str]:
    """What a node's inputs are, Quantizers looked through and marked with ``Q:``."""
    node = next(n for n in graph.graph.nodes if n.name == name)
    return [f"Q:{i.args[0]}" if quantizer_of(i) is not None else str(i) for i in node.all_input_nodes]
