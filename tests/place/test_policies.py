"""Where each placement puts its Quantizers, and what they have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from policy_nets import (
    Attention,
    Concat,
    Depthwise,
    Residual,
    SqueezeExcite,
    placed,
    quantized_values,
    reads,
)
from torch import Tensor, nn

from bitsmith.capture.ops import op_of, quantizer_of
from bitsmith.grid import IntFormat
from bitsmith.place.layers import QuantLayer
from bitsmith.place.plan import operands

NETS: list[type[nn.Module]] = [Residual, Concat, SqueezeExcite, Depthwise, Attention]
POLICIES = ["runtime", "fx", "layerwise", "flexml"]

# Value: whether it cannot be negative. onnxruntime's int8 convolution has no float output, its linear has.
RUNTIME: dict[type[nn.Module], dict[str, bool]] = {
    Residual: {"x": False, "relu": True, "conv2": False, "relu_1": True, "adaptive_avg_pool2d": True},
    Concat: {"x": False, "relu": True, "right": False, "cat": False, "join": False},
    SqueezeExcite: {
        "x": False,
        "relu": True,
        "adaptive_avg_pool2d": True,
        "relu_1": True,
        "excite": False,
        "sigmoid": True,
        "mul": True,
        "out": False,
    },
    Depthwise: {"x": False, "relu6": True, "relu6_1": True, "project": False},
    Attention: {"x": False, "q": False, "k": False, "v": False, "softmax": True, "matmul_1": False},
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("placement", ["runtime", "fx"])
def test_runtime_and_fx_quantize_what_integer_kernels_read(placement: str, net: type[nn.Module]) -> None:
    graph, _ = placed(net, placement)
    assert quantized_values(graph) == RUNTIME[net]


@pytest.mark.parametrize("net", NETS)
def test_flexml_quantizes_the_outputs_as_well(net: type[nn.Module]) -> None:
    graph, _ = placed(net, "flexml")
    last = {Residual: "fc", Attention: "out"}.get(net)
    assert quantized_values(graph) == RUNTIME[net] | ({last: False} if last else {})


LAYERWISE: dict[type[nn.Module], dict[str, bool]] = {
    Residual: {"x": False, "relu": True, "flatten": True},
    Concat: {"x": False, "cat": False},
    SqueezeExcite: {"x": False, "adaptive_avg_pool2d": True, "relu_1": True, "mul": True},
    Depthwise: {"x": False, "relu6": True, "relu6_1": True},
    Attention: {"x": False, "q": False, "transpose": False, "softmax": True, "v": False, "matmul_1": False},
}


@pytest.mark.parametrize("net", NETS)
def test_layerwise_quantizes_inputs_and_weights_of_compute_layers_alone(net: type[nn.Module]) -> None:
    graph, found = placed(net, "layerwise")
    assert quantized_values(graph) == LAYERWISE[net]
    assert found.groups == []
    for node in graph.graph.nodes:
        if op_of(node).role == "compute":
            assert all(quantizer_of(source) is not None for source in operands(node))
        elif quantizer_of(node) is None and node.op == "call_function":
            assert all(quantizer_of(source) is None for source in node.all_input_nodes)


def test_layerwise_gives_each_reader_a_quantizer_of_its_own() -> None:
    graph, _ = placed(Concat, "layerwise")
    left, right = (
        next(quantizer_of(n.args[0]) for n in graph.graph.nodes if n.name == name) for name in ("left", "right")
    )
    assert left is not None
    assert left is not right


@pytest.mark.parametrize("placement", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_no_quantizer_stands_where_no_integer_kernel_needs_it(net: type[nn.Module], placement: str) -> None:
    graph, _ = placed(net, placement)

    def is_needed(node: Any) -> bool:
        for user in node.users:
            op = op_of(user)
            if op.role in ("compute", "rescale") or user.op == "output":
                return True
            if (op.role == "move" or quantizer_of(user) is not None) and is_needed(user):
                return True
        return False

    for node in graph.graph.nodes:
        if quantizer_of(node) is not None and node.meta["observe"]:
            assert is_needed(node), node.name
    outputs = next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes
    for node in outputs:
        if quantizer_of(node) is not None and placement != "flexml":
            assert op_of(node.args[0]).name == "conv"  # onnxruntime's int8 convolution has no float output


@pytest.mark.parametrize("placement", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_every_compute_layer_is_quantized(net: type[nn.Module], placement: str) -> None:
    graph, found = placed(net, placement)
    compute = [node for node in graph.graph.nodes if op_of(node).role == "compute"]
    assert found.layers == compute
    for node in compute:
        if node.op == "call_module":
            layer = graph.get_submodule(str(node.target))
            assert isinstance(layer, QuantLayer)
            assert layer.weight_quantizer is not None
            assert layer.bias_quantizer is not None


def test_operators_between_quantized_values_read_codes() -> None:
    graph, _ = placed(SqueezeExcite, "runtime")
    assert reads(graph, "mul") == ["Q:relu", "Q:sigmoid"]
    assert reads(graph, "sigmoid") == ["Q:excite"]
    assert reads(graph, "adaptive_avg_pool2d") == ["Q:relu"]
    graph, _ = placed(Residual, "runtime")
    assert reads(graph, "add") == ["Q:relu", "Q:conv2"]
    assert reads(graph, "relu_1") == ["add"]


def test_a_relu_module_used_twice_has_two_quantizers() -> None:
    graph, _ = placed(Residual, "runtime")
    first, second = (
        next(quantizer_of(n) for n in graph.graph.nodes if quantizer_of(n) is not None and str(n.args[0]) == name)
        for name in ("relu", "relu_1")
    )
    assert first is not second


def test_a_layer_used_twice_has_one_weight_and_two_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.conv(x)))

    graph, found = placed(Twice(), "runtime")
    first, second = (graph.get_submodule(str(node.target)) for node in found.layers)
    assert isinstance(first, QuantLayer)
    assert isinstance(second, QuantLayer)
    assert first is not second
    assert first.layer is second.layer
    assert quantized_values(graph) == {"x": False, "relu": True, "conv_1": False}


class TestSharing:
    def test_fx_shares_the_scale_of_the_operands_of_an_add(self) -> None:
        graph, found = placed(Residual, "fx")
        (group,) = found.groups
        assert group.kind == "add"
        names = [n for n, m in graph.named_modules() if any(m is member for member in group.members)]
        assert names == ["quantizers.relu", "quantizers.conv2"]

    def test_fx_shares_the_grid_of_the_operands_and_the_result_of_a_concat(self) -> None:
        graph, found = placed(Concat, "fx")
        (group,) = found.groups
        assert group.kind == "cat"
        names = [n for n, m in graph.named_modules() if any(m is member for member in group.members)]
        assert names == ["quantizers.relu", "quantizers.right", "quantizers.cat"]

    def test_runtime_shares_nothing(self) -> None:
        assert placed(Residual, "runtime")[1].groups == []
        assert placed(Concat, "runtime")[1].groups == []

    def test_groups_with_a_common_member_are_one(self) -> None:
        """The value of ``a`` is added twice and joined once: all that it meets shares one grid."""

        class Meeting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
                self.d, self.e = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.a(x)
                return self.d(x + self.b(x)) + self.e(torch.cat([x, self.c(x)], 1))

        graph, found = placed(Meeting(), "fx")
        assert [group.kind for group in found.groups] == ["cat"]
        (group,) = found.groups
        names = {n for n, m in graph.named_modules() if any(m is member for member in group.members)}
        assert names == {"quantizers.a", "quantizers.b", "quantizers.c", "quantizers.cat"}

    def test_multiplications_and_pools_share_nothing(self) -> None:
        assert placed(SqueezeExcite, "fx")[1].groups == []


def test_what_only_moves_elements_keeps_its_codes() -> None:
    """A max pool and a reshape: the same Quantizer stands behind each, so that runtimes keep the integers."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    graph, _ = placed(net, "runtime")
    behind = [n for n in graph.graph.nodes if n.name in ("relu_quantized", "max_pool2d_quantized", "flatten_quantized")]
    assert len(behind) == 3
    assert len({id(quantizer_of(n)) for n in behind}) == 1
    assert [n.meta["observe"] for n in behind] == [True, False, False]


def test_floats_between_floats_stay_float() -> None:
    """Nothing integer reads a softmax at the end, so nothing before it is quantized for it."""
    net = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1))
    graph, _ = placed(net, "runtime", shape=(2, 8))
    assert quantized_values(graph) == {"input_1": False}


def test_a_target_without_a_float_output_has_the_last_linear_quantized() -> None:
    from bitsmith.targets import get_target

    target = get_target("onnxruntime").model_copy(update={"float_output": frozenset()})
    graph, _ = placed(nn.Sequential(nn.Linear(8, 4)), "runtime", shape=(2, 8), target=target)  # type: ignore[arg-type]
    assert len(quantized_values(graph)) == 2


def test_weights_alone_need_no_activation_quantizers() -> None:
    import bitsmith as bs

    recipe = bs.Recipe(weights=bs.load_recipe("int8").weights)
    graph, found = placed(Residual, "runtime", recipe=recipe)
    assert quantized_values(graph) == {}
    assert len(found.layers) == 3


def test_activations_of_four_bits_are_four_bits_everywhere() -> None:
    from bitsmith.recipe import bits_recipe

    graph, _ = placed(Residual, "runtime", recipe=bits_recipe(3, 4))
    formats = {quantizer_of(n).spec.format for n in graph.graph.nodes if quantizer_of(n) is not None}  # type: ignore[union-attr]
    assert formats == {IntFormat(4, signed=False)}


def test_the_model_computes_the_same_before_grids_are_set() -> None:
    torch.manual_seed(0)
    net = SqueezeExcite().eval()
    graph, _ = placed(net, "runtime")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(graph(x), net(x))
