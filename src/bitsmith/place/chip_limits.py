"""What a chip refuses: every layer held against the limits, each violation with what would fit."""

from __future__ import annotations

from torch import Tensor, fx

from ..capture.ops import op_of
from ..errors import PlacementError
from ..targets import Target
from ..targets.target import ChipLimits
from .chip import Lowering
from .chip_layer import ChipLayer
from .chip_memory import ChipPlan, passes, plan_memory
from .plan import layer_name


def plan_chip(graph: fx.GraphModule, target: Target) -> ChipPlan:
    """The layers and memory of a graph on ``target``; PlacementError lists everything that does not fit."""
    assert target.limits is not None
    lowering = Lowering(graph, target.limits)
    layers = lowering.run()
    problems = [*lowering.problems, *(p for layer in layers for p in violations(layer, target.limits))]
    plan = ChipPlan(layers)
    if layers and not lowering.problems:
        problems += _chip_violations(layers, target.limits)
        plan = plan_memory(layers, target.limits)
        problems += plan.problems
    if problems:
        problems = list(dict.fromkeys(problems))
        listed = "".join(f"\n- {problem}" for problem in problems)
        count = f"{len(problems)} violation{'s' * (len(problems) > 1)}"
        raise PlacementError(f"the model does not fit on {target.name} ({count}):{listed}")
    return plan


def refuse_float(kernels: dict[fx.Node, str], target: Target) -> None:
    """Raise PlacementError where a compiled program computes something in float that the chip has to do."""
    moves = {"reshape", "max_pool"}
    left = [
        node
        for node, kernel in kernels.items()
        if kernel == "float" and isinstance(node.meta.get("val"), Tensor) and op_of(node).name not in moves
    ]
    if left:
        names = ", ".join(repr(layer_name(node)) for node in left[:8])
        raise PlacementError(
            f"{target.name} has no float unit, but {names} cannot run on codes: a clamp (ReLU6, Hardtanh) has to end "
            "where the codes do, which scales that are powers of two prevent, and every operand needs a scale"
        )


def weights_note(plan: ChipPlan, limits: ChipLimits) -> str:
    """How full the chip is, in a sentence."""
    words = sum(plan.kernel_words)
    share = words / (limits.processors * limits.kernel_words)
    return (
        f"{len(plan.layers)} of {limits.layers} layers, {words * 9:,} bytes of weight memory ({share:.0%}; the fullest "
        f"processor {max(plan.kernel_words) / limits.kernel_words:.0%})"
    )


def violations(layer: ChipLayer, limits: ChipLimits) -> list[str]:
    """What one layer asks for that the chip has not."""
    found = [*_sizes(layer, limits), *_pooling(layer, limits), *_convolution(layer, limits)]
    return [f"layer {layer.name!r}: {problem}" for problem in found]


def _sizes(layer: ChipLayer, limits: ChipLimits) -> list[str]:
    found = []
    for side, shape in (("reads", layer.read), ("writes", layer.written)):
        if shape[0] > limits.channels:
            found.append(f"{side} {shape[0]} channels; the chip has {limits.channels}")
        if max(shape[1:]) > limits.rows_and_columns:
            found.append(f"{side} {shape[1]} x {shape[2]} pixels; the chip has {limits.rows_and_columns} at most")
    if layer.flatten and layer.read[1] * layer.read[2] > limits.flattened:
        found.append(
            f"flattens {layer.read[1]} x {layer.read[2]} pixels of each channel; the chip flattens {limits.flattened}. "
            "Pool before it"
        )
    return found


def _pooling(layer: ChipLayer, limits: ChipLimits) -> list[str]:
    if layer.pool is None:
        return []
    found = []
    if len(set(layer.pool.stride)) > 1:
        found.append(f"pools with stride {_times(layer.pool.stride)}; strides are the same in both directions")
    if max(layer.pool.kernel) > limits.pool or max(layer.pool.stride) > limits.pool:
        found.append(
            f"pools {_times(layer.pool.kernel)} with stride {layer.pool.stride[0]}; the chip pools up to "
            f"{limits.pool} x {limits.pool}. Pool in two steps"
        )
    most = limits.unfused_pool_passes
    if layer.op == "none" and most is not None and passes(layer.read[0], limits) > most and max(layer.pooled) > 1:
        found.append(
            f"pools {layer.read[0]} channels without a convolution; the chip pools {most * limits.processors} so. Let "
            "a convolution read the result, or pool down to one pixel"
        )
    return found


def _convolution(layer: ChipLayer, limits: ChipLimits) -> list[str]:
    if layer.op in ("none", "linear"):
        return []
    found, sizes = [], limits.kernels[layer.op]
    if any(size not in sizes for size in layer.kernel) or len(set(layer.kernel)) > 1:
        flat = layer.op == "conv1d"
        fits = f"{sizes[0]} to {sizes[-1]}" if flat else " and ".join(f"{size} x {size}" for size in sizes)
        found.append(f"kernel {_times(layer.kernel)}; {layer.op} has {fits}. Larger kernels can be several of 3 x 3")
    if layer.padding > limits.padding:
        found.append(f"pads by {layer.padding}; the chip pads by 0 to {limits.padding}")
    elif layer.padding and layer.padding >= min(layer.kernel):
        found.append(f"pads by {layer.padding} with kernel {_times(layer.kernel)}; padding is smaller than the kernel")
    longest = limits.dilation_1d if layer.op == "conv1d" else 1
    if layer.dilation > longest:
        found.append(f"dilation {layer.dilation}; {layer.op} has {longest} at most")
    if layer.eltwise is not None and layer.op == "conv1d":
        found.append("reads a sum; one-dimensional convolutions do not")
    return found


def _chip_violations(layers: list[ChipLayer], limits: ChipLimits) -> list[str]:
    found = []
    if len(layers) > limits.layers:
        extra = sum(layer.node is None for layer in layers)
        found.append(
            f"{len(layers)} layers, of which {extra} pool, add, or copy operands; the chip has {limits.layers}. "
            "Leave out blocks"
        )
    groups = [limits.bias_bytes] * (limits.processors // limits.processors_per_group)
    for layer in sorted((x for x in layers if x.bias), key=lambda x: -x.written[0]):
        fullest = max(range(len(groups)), key=lambda g: groups[g])
        if layer.written[0] > groups[fullest]:
            found.append(
                f"layer {layer.name!r}: {layer.written[0]} biases do not fit into what the others leave of "
                f"{limits.bias_bytes} bytes in each of {len(groups)} groups. Leave out biases, or use fewer channels"
            )
        else:
            groups[fullest] -= layer.written[0]
    for layer in layers[:-1]:
        if layer.wide:
            found.append(f"layer {layer.name!r} hands on its accumulator, which only the last layer can")
    return found


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
