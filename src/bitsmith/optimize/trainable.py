"""A block whose rounding, biases and activation scales can be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..capture.ops import module_of, quantizer_of
from ..grid import Grid, IntFormat, Quantizer, fake_quantize
from ..place.layers import QuantLayer
from ..steps import Form
from .learned_scale import LearnedScale, code_range, dense
from .soft_rounding import SoftRounding

_NOISE = 1 << 22  # random bits that are drawn once; each use starts somewhere else


class TrainableBlock:
    """Runs a block's nodes with soft weights, learned biases and learned activation scales.

    ``frozen`` layers keep their weights and biases, ``shared`` tells which Quantizers have one scale (None: one that
    must not change here). ``drop`` is the share of activations that pass unquantized; ``originals`` are the weights, by
    layer, from before an earlier step rounded them.
    """

    def __init__(
        self, graph: fx.GraphModule, nodes: list[fx.Node], ends: list[fx.Node], *, form: Form,
        frozen: Callable[[QuantLayer], bool], shared: Callable[[Quantizer], int | None], drop: float, seed: int,
        originals: dict[int, Tensor],
    ) -> None:  # fmt: skip
        self.graph, self.nodes, self.ends, self.drop = graph, nodes, ends, drop
        layers = [m for n in nodes if isinstance(m := module_of(n), QuantLayer) and not frozen(m)]
        self.layers = {id(m): m for m in layers if _is_integer(m.weight_quantizer)}
        weights = [(m.weight, _grid(m.weight_quantizer)) for m in self.layers.values()]
        known = [originals.get(key, m.weight).to(m.weight.device) for key, m in self.layers.items()]
        self.rounding = SoftRounding(weights, form, known)
        self.weights = dict(zip(self.layers, self.rounding.weights))
        self.biases = {key: m.bias.detach().clone() for key, m in self.layers.items() if m.bias is not None}
        self.shift = {key: torch.zeros_like(bias, requires_grad=True) for key, bias in self.biases.items()}
        self.unit = dict.fromkeys(self.biases, 1.0)
        self._find_scales(shared)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = self._draw() if drop else None

    def _find_scales(self, shared: Callable[[Quantizer], int | None]) -> None:
        self.quantizers: dict[int, Quantizer] = {}
        self.scale_of: dict[int, int] = {}
        keys: dict[int, int] = {}
        start: list[Tensor] = []
        for node in self.nodes:
            quantizer = quantizer_of(node)
            if quantizer is None or not node.meta.get("observe") or not _is_integer(quantizer):
                continue
            grid, key = _grid(quantizer), shared(quantizer)
            if key is None or grid.scale.ndim or quantizer.spec.scale == "po2":
                continue
            self.quantizers[id(quantizer)] = quantizer
            if key not in keys:
                keys[key] = len(start)
                start.append(grid.scale.detach())
            self.scale_of[id(quantizer)] = keys[key]
        self.start = torch.stack(start) if start else torch.empty(0)
        self.log_scale = torch.zeros_like(self.start, requires_grad=True)

    def _draw(self) -> Tensor:
        device = self.rounding.v.device
        draw = torch.empty(_NOISE).uniform_(generator=self.generator)
        return (draw >= self.drop).float().to(device)

    # The forward pass

    def __call__(self, values: dict[fx.Node, Any]) -> list[Tensor]:
        """The block's ends, from what it reads; ``values`` is filled with everything else."""
        scales = self.start * self.log_scale.exp() if len(self.start) else self.start
        for node in self.nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = self._run(node, args, kwargs, scales)
        return [values[end] for end in self.ends]

    def _run(self, node: fx.Node, args: Any, kwargs: Any, scales: Tensor) -> Any:
        if node.op == "get_attr":
            return getattr(self.graph, str(node.target))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module: nn.Module = self.graph.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            return self._quantize(module, args[0], scales) if node.meta.get("observe") else args[0]
        if id(module) not in self.layers:
            return module(*args, **kwargs)
        parameters = {"weight": self.weights[id(module)]}
        if id(module) in self.biases:
            parameters["bias"] = self.biases[id(module)] + self.shift[id(module)] * self.unit[id(module)]
        return functional_call(module.layer, parameters, args, kwargs)  # type: ignore[arg-type]

    def _quantize(self, quantizer: Quantizer, x: Tensor, scales: Tensor) -> Tensor:
        x = x.float()
        grid = quantizer.grid
        if grid is None:
            return x
        if not isinstance(grid.format, IntFormat) or grid.scale.ndim:
            return fake_quantize(x, grid)
        index = self.scale_of.get(id(quantizer))
        scale = grid.scale if index is None else scales[index]
        return LearnedScale.apply(x, scale, *code_range(grid), self._kept(x))  # type: ignore[no-any-return,no-untyped-call]

    def _kept(self, x: Tensor) -> Tensor | None:
        return None if self.noise is None else self.kept_like(x)

    def kept_like(self, x: Tensor) -> Tensor:
        """Random ones (quantized) and zeros (dropped), laid out as ``x``: a window of what was drawn, from anywhere."""
        assert self.noise is not None
        count = x.numel()
        if count > len(self.noise) // 2:
            self.noise = self.noise.repeat(-(-2 * count // len(self.noise)))
        start = int(torch.randint(len(self.noise) - count + 1, (), generator=self.generator))
        return self.noise.as_strided(x.shape, dense(x).stride(), start)

    # What is learned

    def set_units(self, values: dict[fx.Node, Any]) -> None:
        """Biases are learned in standard deviations of their layer's output, as seen in one run."""
        for node in self.nodes:
            module = module_of(node)
            if id(module) in self.unit:
                self.unit[id(module)] = float(values[node].detach().float().std()) or 1.0

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the weights for good, and give layers and Quantizers what was learned."""
        for module, weight in zip(self.layers.values(), self.rounding.harden()):
            module.weight.copy_(weight)
            if id(module) in self.biases:
                assert module.bias is not None
                module.bias.copy_(self.biases[id(module)] + self.shift[id(module)] * self.unit[id(module)])
        scales = self.start * self.log_scale.exp() if len(self.start) else self.start
        for key, quantizer in self.quantizers.items():
            grid = quantizer.require_grid()
            scale = scales[self.scale_of[key]].to(grid.scale.device).clone()
            quantizer.set_grid(Grid(grid.format, scale, grid.zero_point, grid.axis, grid.group_size))


def _is_integer(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and isinstance(quantizer.format, IntFormat) and quantizer.grid is not None


def _grid(quantizer: Quantizer | None) -> Grid:
    assert quantizer is not None
    return quantizer.require_grid()
