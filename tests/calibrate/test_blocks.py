"""Blocks end exactly where one value that quantization touches is alive, found here by brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitsmith.calibrate.blocks import cut_by_layer, cut_into_blocks
from bitsmith.calibrate.stages import cut_into_stages
from bitsmith.capture import capture
from bitsmith.capture.ops import op_of, quantizer_of
from bitsmith.place.place import place
from bitsmith.recipe import load_recipe
from bitsmith.targets import get_target


class Net(nn.Module):
    """Four layers, put together by ``wiring``."""

    def __init__(self, wiring: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(x, self.a, self.b, self.c, self.d)


def chain(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    return d(F.relu(c(F.relu(b(F.relu(a(x)))))))


def residual(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    y = F.relu(a(x))
    return d(F.relu(y + c(F.relu(b(y)))))


def concat(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    y = F.relu(a(x))
    z = torch.cat([F.relu(b(y)), F.relu(c(y))], 1)
    return d(z[:, 2:6])


def nested(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    y = F.relu(a(x))
    z = F.relu(b(y))
    return F.relu(y + F.relu(z + d(F.relu(c(z)))))


def with_a_mask(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    mask = (x > 0).float()
    return d(F.relu(c(F.relu(b(F.relu(a(x))) * mask))) * mask)


def sizes(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
    n = x.size(0)
    y = F.relu(b(F.relu(a(x)))).view(n, 4, -1)
    return d(F.relu(c(y.view(n, 4, 8, 8))))


WIRINGS = [chain, residual, concat, nested, with_a_mask, sizes]


def placed(wiring: Callable[..., Tensor], placement: str = "runtime") -> fx.GraphModule:
    graph = capture(Net(wiring).eval(), (torch.randn(4, 4, 8, 8),))
    recipe = load_recipe("int8").model_copy(update={"placement": placement})
    place(graph, recipe, get_target("onnxruntime"))
    return graph


def touched(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a Quantizer or a layer is among a tensor and all it comes from."""
    if node not in memo:
        own = quantizer_of(node) is not None or op_of(node).role == "compute"
        memo[node] = own or any(touched(source, memo) for source in node.all_input_nodes)
    return memo[node]


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_cuts_are_where_removing_one_value_parts_the_graph(wiring: Callable[..., Tensor], placement: str) -> None:
    graph = placed(wiring, placement)
    stages = cut_into_stages(graph)
    blocks = cut_into_blocks(graph, stages)
    assert [stage for block in blocks for stage in block.stages] == stages
    memo: dict[fx.Node, bool] = {}
    order = list(graph.graph.nodes)
    for index in range(1, len(stages)):
        before = {n for stage in stages[:index] for n in stage.nodes} | {n for n in order if n.op == "placeholder"}
        crossing = {
            source
            for node in order
            if node not in before
            for source in node.all_input_nodes
            if source in before and isinstance(source.meta.get("val"), Tensor) and touched(source, memo)
        }
        block = next(block for block in blocks if stages[index] in block.stages)
        if block.stages[0] is stages[index]:
            assert set(block.sources) == crossing
            assert len(crossing) == 1
        elif len(crossing) == 1:  # joined since there are no layers on one side
            place = block.stages.index(stages[index])
            sides = block.stages[:place], block.stages[place:]
            assert not all(any(stage.layer is not None for stage in side) for side in sides)


def test_a_residual_branch_is_in_one_block() -> None:
    graph = placed(residual)
    blocks = cut_into_blocks(graph, cut_into_stages(graph))
    assert [[str(s.compute.target) for s in b.layers] for b in blocks if b.layers] == [["a"], ["b", "c"], ["d"]]
    assert [b.name for b in blocks if b.layers] == ["a", "b to c", "d"]


@pytest.mark.parametrize(("layers", "expected"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_neighbours_are_joined_up_to_so_many_layers(layers: int, expected: int) -> None:
    graph = placed(chain)
    blocks = cut_into_blocks(graph, cut_into_stages(graph), layers)
    assert len([block for block in blocks if block.layers]) == expected
    assert all(len(block.layers) <= layers for block in blocks)


def test_masks_and_sizes_pass_by() -> None:
    for wiring in (with_a_mask, sizes):
        graph = placed(wiring, "layerwise")  # where the mask is no quantized operand
        blocks = cut_into_blocks(graph, cut_into_stages(graph))
        assert len([block for block in blocks if block.layers]) == 4
        assert any(block.sides for block in blocks[1:])


@pytest.mark.parametrize("wiring", WIRINGS)
def test_layer_by_layer_each_stage_stands_alone(wiring: Callable[..., Tensor]) -> None:
    graph = placed(wiring)
    stages = cut_into_stages(graph)
    blocks = cut_by_layer(graph, stages)
    assert [block.stages for block in blocks] == [[stage] for stage in stages]
    assert all(block.ends == [block.stages[0].end] for block in blocks if block.layers)
