"""The quantized model as a program on codes.

Compiles a calibrated graph into steps. Where the target runs an operator in integers, the step takes centred codes
and yields centred codes by the target's law; elsewhere it computes in float between dequantization and
quantization, as the runtime does. With ``carrier="integer"`` every integer step uses int32 and int64 tensors alone:
the integer executor. With ``carrier="float"`` the same integers travel in float tensors that hold them exactly: the
simulation, at the speed of a float model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.ops import module_of, op_of, quantizer_of
from ..grid import Grid, IntFormat
from ..place.layers import QuantLayer
from ..place.plan import clamp_bounds, fused_end, operands
from ..targets import Target
from . import laws, max78000, torch_laws
from .accumulate import Carrier
from .kernels import Kernel, build_kernel, fits_signed_bytes, float_pool, multiplies_on_codes, sums_in_known_order

EXACT_FLOAT = "exact float"  # computed in float by the runtime, in a way that is known to the bit
_ELEMENTWISE = {"add", "mul", "cat", "relu", "clamp"}  # IEEE 754 leaves them no freedom


@dataclass
class Step:
    """One action: ``run(env)`` returns the value of ``node``. ``grid`` is set where that value is centred codes."""

    node: fx.Node
    run: Callable[[dict[fx.Node, Any]], Any]
    grid: Grid | None = None
    kernel: str = "float"
    last_use_of: tuple[fx.Node, ...] = ()


class Program:
    """A compiled model; call it like the model.

    >>> import bitsmith as bs
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> q = bs.quantize(net, [torch.randn(64, 4)])
    >>> exact = Program(q.graph, q.target, carrier="integer")
    >>> x = torch.randn(5, 4)
    >>> bool((exact(x) == q(x)).all())
    True
    """

    def __init__(self, graph: fx.GraphModule, target: Target, carrier: Carrier = "float") -> None:
        self.graph, self.target, self.carrier = graph, target, carrier
        self.code_dtype = torch.float32 if carrier == "float" else torch.int32
        self.grids: dict[fx.Node, Grid] = {}
        self.steps: list[Step] = []
        self.kernels: dict[fx.Node, str] = {}
        self._compile()
        self._mark_last_uses()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; inputs and outputs are those of the float model."""
        with torch.no_grad():
            env = self.run(*args, **kwargs)
        return env["output"]

    def run(self, *args: Any, keep: bool = False, **kwargs: Any) -> dict[Any, Any]:
        """All values by node (only the outputs unless ``keep``); codes are centred."""
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        placeholders = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        env: dict[Any, Any] = dict(zip(placeholders, leaves))
        for step in self.steps:
            env[step.node] = step.run(env)
            if not keep:
                for node in step.last_use_of:
                    env.pop(node, None)
        output = next(n for n in self.graph.graph.nodes if n.op == "output")
        flat = fx.map_arg(output.args[0], lambda n: self.real(n, env))
        env["output"] = self.graph.graph._codegen.process_outputs(flat)
        return env

    def real(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """A node's value in real numbers."""
        value = env[node]
        grid = self.grids.get(node)
        return value if grid is None else laws.dequantize_centred(value, grid)

    def integer_source(self, node: fx.Node) -> fx.Node | None:
        """The operator that a Quantizer's step executes in integers, or None."""
        return self._sources.get(node)

    # Compilation

    def _compile(self) -> None:
        fused = self._fused_into_quantizers()
        for node in self.graph.graph.nodes:
            if node.op in ("placeholder", "output") or node in fused:
                continue
            step = self._quantizer_step(node) if quantizer_of(node) is not None else self._operator_step(node)
            if step.grid is not None:
                self.grids[node] = step.grid
            self.steps.append(step)
            self.kernels[node] = step.kernel

    def _fused_into_quantizers(self) -> dict[fx.Node, fx.Node]:
        """Operators (with their activation functions) whose quantizer's step executes them in integers."""
        self._sources: dict[fx.Node, fx.Node] = {}
        self._activations: dict[fx.Node, list[fx.Node]] = {}
        coded: dict[fx.Node, Grid] = {}
        fused: dict[fx.Node, fx.Node] = {}
        for node in self.graph.graph.nodes:
            quantizer = quantizer_of(node)
            if quantizer is None or not isinstance(quantizer.require_grid().format, IntFormat):
                continue
            grid = quantizer.require_grid()
            coded[node] = grid
            chain = [node.args[0]]
            while op_of(chain[-1]).role == "activation" and len(chain[-1].users) == 1:
                chain.append(operands(chain[-1])[0])
            source = chain[-1]
            if any(len(n.users) != 1 for n in chain) or not self._clamps_are_covered(chain[:-1], grid):
                continue
            if self._runs_in_integers(source, coded, grid):
                self._sources[node], self._activations[source] = source, chain[:-1]
                fused.update(dict.fromkeys(chain, node))
        return fused

    def _clamps_are_covered(self, activations: list[fx.Node], grid: Grid) -> bool:
        """Whether the target clamps alike: a bound within half a step of an end of the grid rounds to it."""
        if self.target.law == "max78000":
            return max78000.clamp_codes(activations, grid) is not None
        scale = float(grid.scale)
        low, high = (code * scale for code in laws.code_range(grid))
        bounds = [clamp_bounds(node) for node in activations]
        return all(low > least - scale / 2 and high < greatest + scale / 2 for least, greatest in bounds)

    def _runs_in_integers(self, source: fx.Node, coded: dict[fx.Node, Grid], *outputs: Grid) -> bool:
        op = op_of(source)
        float_bias = self.target.law == "torch"  # which its kernels add
        if op.role not in ("compute", "rescale") or not _is_integer_layer(source, float_bias=float_bias):
            return False
        inputs = [coded.get(node) for node in operands(source)]
        layer = module_of(source)
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
            grid = layer.weight_quantizer.grid
            inputs.append(grid)
            if float_bias and grid is not None and grid.zero_point is not None and not fits_signed_bytes(layer):
                return False
        return self.target.runs_in_integers(op.name, *inputs, *outputs)

    def _has_exact_product(self, node: fx.Node) -> bool:
        """Whether a product that stays float has operands of 8 bits and less.

        It is then summed exactly, as integers. A runtime that sums it in float comes to the same within rounding.
        """
        grids = [self.grids.get(source) for source in operands(node)]
        return _is_integer_layer(node) and all(grid is not None and grid.format.bits <= 8 for grid in grids)

    def _multiplies_on_codes(self, node: fx.Node) -> bool:
        """Whether the file feeds codes to the runtime's float kernel, and scales what it sums: exact, at its speed.

        Not where a Quantizer follows an operator that the runtime can fuse: it might run that on integers.
        """
        op, readers = op_of(node), list(fused_end(node).users)
        if op.name not in self.target.float_on_codes or quantizer_of(operands(node)[0]) is None:
            return False
        if op.name in self.target.integer_operators and len(readers) == 1 and quantizer_of(readers[0]) is not None:
            return False
        return self._has_exact_product(node) and multiplies_on_codes(node, self.grids[operands(node)[0]])

    @property
    def layers_on_codes(self) -> frozenset[fx.Node]:
        """Layers that the runtime computes in float, exactly: on the codes of input and weight."""
        return frozenset(
            n for n, kernel in self.kernels.items() if kernel == EXACT_FLOAT and op_of(n).role == "compute"
        )

    def _quantizer_step(self, node: fx.Node) -> Step:
        quantizer = quantizer_of(node)
        assert quantizer is not None
        grid = quantizer.require_grid()
        source = self._sources.get(node)
        if source is not None:
            kernel = self._kernel(source, grid)
            return Step(node, kernel.run, grid, kernel.name)
        value: Any = node.args[0]
        if not isinstance(grid.format, IntFormat):
            return Step(node, lambda env: quantizer(self.real(value, env)), None, "fake_quantize")
        if self._is_same_grid(value, grid):
            return Step(node, lambda env: env[value], grid, "codes")
        dtype = self.code_dtype
        law = torch_laws.quantize_centred if self.target.law == "torch" else laws.quantize_centred
        return Step(node, lambda env: law(self.real(value, env), grid, dtype), grid, "quantize")

    def _is_same_grid(self, value: fx.Node, grid: Grid) -> bool:
        known = self.grids.get(value)
        return known is not None and known.scale is grid.scale

    def _kernel(self, source: fx.Node, output: Grid | None, *, on_codes: bool = False) -> Kernel:
        inputs = [self.grids[node] for node in operands(source)]
        if self.target.law == "max78000":
            activations = self._activations.get(source, [])
            return max78000.build_kernel(source, activations, inputs, output, self.carrier, self.target)
        if self.target.law == "torch" and self._runs_in_integers(source, self.grids):
            return torch_laws.build_kernel(source, inputs, output, self.carrier)
        return build_kernel(source, inputs, output, self.carrier, on_codes=on_codes)

    def _operator_step(self, node: fx.Node) -> Step:
        op = op_of(node)
        if op.role == "compute":
            integer = op.name in self.target.float_output and self._runs_in_integers(node, self.grids)
            on_codes = not integer and self._multiplies_on_codes(node)
            if integer or self._has_exact_product(node):
                kernel = self._kernel(node, None, on_codes=on_codes)
                return Step(node, kernel.run, None, kernel.name if integer else EXACT_FLOAT if on_codes else "float")
        if op.role == "move" and operands(node)[0] in self.grids and self._followed_by_itself(node):
            return Step(node, lambda env: self._call(node, env, codes=True), self.grids[operands(node)[0]], "codes")
        return self._float_step(node)

    def _float_step(self, node: fx.Node) -> Step:
        """An operator that the runtime computes in float; exact where we know in which order, or order is no matter."""
        name = op_of(node).name
        ordered = self.target.exact and self.target.law == "onnxruntime"
        if ordered and name in ("avg_pool", "global_avg_pool") and sums_in_known_order(node):
            pool, source = float_pool(node), operands(node)[0]
            return Step(node, lambda env: pool(self.real(source, env)), kernel=EXACT_FLOAT)
        exact = self.target.exact and name in _ELEMENTWISE and node.kwargs.get("alpha", 1) == 1
        return Step(node, lambda env: self._call(node, env, codes=False), kernel=EXACT_FLOAT if exact else "float")

    def _followed_by_itself(self, node: fx.Node, grid: Grid | None = None) -> bool:
        """Whether everything that reads a moved value, or a part of it, takes it on the same grid."""
        grid = grid or self.grids[operands(node)[0]]
        return all(
            ((q := quantizer_of(user)) is not None and q.scale is grid.scale)
            or (op_of(user).name == "getitem" and self._followed_by_itself(user, grid))
            for user in node.users
        )

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], *, codes: bool) -> Any:
        as_float = codes and op_of(node).name == "resize_nearest"  # torch resizes no int32; float32 holds the codes

        def read(n: fx.Node) -> Any:
            return self.real(n, env) if not codes else env[n].float() if as_float else env[n]

        if node.op == "get_attr":
            return getattr(self.graph, str(node.target))
        args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
        if node.op == "call_function":
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            return result.to(self.code_dtype) if as_float else result
        return self.graph.get_submodule(str(node.target))(*args, **kwargs)

    def _mark_last_uses(self) -> None:
        last: dict[fx.Node, Step] = {}
        output = next(n for n in self.graph.graph.nodes if n.op == "output")
        for step in self.steps:
            source = self._sources.get(step.node)
            for node in [*step.node.all_input_nodes, *(source.all_input_nodes if source else [])]:
                last[node] = step
        for node in output.all_input_nodes:
            last.pop(node, None)
        for node, step in last.items():
            step.last_use_of = (*step.last_use_of, node)


def _is_integer_layer(node: fx.Node, *, float_bias: bool = False) -> bool:
    """Whether the weight of a layer, and its bias unless that may be float, are integers (true for what has none)."""
    if node.op != "call_module":
        return True
    layer = module_of(node)
    if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None:
        return False
    grid = layer.weight_quantizer.grid
    has_integer_bias = float_bias or layer.bias is None or layer.bias_quantizer is not None
    return grid is not None and isinstance(grid.format, IntFormat) and grid.group_size is None and has_integer_bias


def codes_of(value: Tensor, grid: Grid) -> Tensor:
    """Stored codes from centred ones."""
    return (value.to(torch.int64) + laws.zero_point(grid)).to(grid.code_dtype)
