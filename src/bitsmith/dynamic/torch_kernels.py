"""PyTorch's dynamic int8 kernels. The only file of dynamic quantization that touches torch's private operators.

``quantized::linear_dynamic`` and ``quantized_lstm`` take and give float tensors; only their packed weights are tied
to torch's quantized tensors, which are deprecated and appear here alone.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import DataError
from ..verify.engines import Engine
from . import laws
from .layers import DynamicLinear
from .model import DynamicModel
from .recurrent_layers import DynamicRecurrent
from .weights import merged

if TYPE_CHECKING:
    from ..evaluate.latency import Latency


def _saturates() -> bool:
    """Whether pairs of u8 x s8 products are added in 16 bits, so that inputs must have 7 bits."""
    return not torch.cpu._is_vnni_supported()


def _packed(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """Weights laid out for the kernel, from their integers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated; there is no other way to pack
        zero = torch.zeros(scale.shape, dtype=torch.int64)
        if scale.ndim:
            quantized = torch._make_per_channel_quantized_tensor(codes, scale.double(), zero, 0)
        else:
            quantized = torch._make_per_tensor_quantized_tensor(codes, float(scale), 0)
        return torch.ops.quantized.linear_prepack(quantized, bias)


class TorchLinear(nn.Module):
    """A linear layer on one of torch's kernels."""

    def __init__(self, layer: DynamicLinear) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is no submodule and its weights not kept twice by name
        self.activations, self.bias = layer.activations, layer.bias
        self.reduce_range = _saturates()
        self.shape = tuple(layer.weight.shape)
        weight, scale = layer.weight, layer.weight_scale
        self.kind: str = self.activations
        self.weight: Any
        if scale is None:
            self.kind = "float16"
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), layer.bias)
        elif self.activations == "tensor":
            self.weight = _packed(weight, scale, layer.bias)
        elif self.activations == "token":
            self.weight, self.scale = weight.t(), scale
        else:
            self.weight = laws.dequantized(weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        y: Tensor
        if self.kind == "tensor":
            y = torch.ops.quantized.linear_dynamic(x, self.weight, self.reduce_range)
        elif self.kind == "float16":
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        elif self.kind == "token":
            codes, scale = laws.quantize_tokens(x)
            products = torch._int_mm(codes.to(torch.int8).reshape(-1, self.shape[1]), self.weight)
            y = products.float().mul_(self.scale).reshape(*x.shape[:-1], -1).mul_(scale)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = nn.functional.linear(x, self.weight, self.bias)
        return y

    def rows(self, start: int, end: int) -> TorchLinear:
        """The layer that yields a part of the outputs; packed at its first use."""
        name = f"rows_{start}_{end}"
        if not hasattr(self, name):
            self.add_module(name, TorchLinear(self.layer[0].rows(start, end)))
        part: TorchLinear = getattr(self, name)
        return part

    def extra_repr(self) -> str:
        """Shape and kernel."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, kernel={self.kind}"


class TorchRecurrent(nn.Module):
    """An LSTM or a GRU on torch's dynamic kernels."""

    def __init__(self, layer: DynamicRecurrent) -> None:
        super().__init__()
        self.kind, self.num_layers, self.hidden_size = layer.kind, layer.num_layers, layer.hidden_size
        self.batch_first, self.bidirectional, self.sizes = layer.batch_first, layer.bidirectional, layer.extra_repr()
        reduce_range = _saturates()
        for index in range(layer.num_layers):
            w_ih, s_ih, w_hh, s_hh, bias = layer.parameters_of(index)
            assert w_ih is not None
            assert w_hh is not None
            s_hh = None if s_hh is None else merged(s_hh)
            for d in range(len(w_ih)):
                both = torch.zeros(2, w_ih.shape[1]) if bias is None else bias[d]
                if s_ih is None or s_hh is None:
                    parts = [
                        torch.ops.quantized.linear_prepack_fp16(w[d].float(), b) for w, b in zip((w_ih, w_hh), both)
                    ]
                    cell = torch.ops.quantized.make_quantized_cell_params_fp16(*parts)
                else:
                    parts = [_packed(w[d], s[d], b) for w, s, b in ((w_ih, s_ih, both[0]), (w_hh, s_hh, both[1]))]
                    cell = torch.ops.quantized.make_quantized_cell_params_dynamic(*parts, *both, reduce_range)
                setattr(self, f"cell_{index}_{d}", cell)  # an attribute each, which torch.jit can trace

    def forward(self, x: Any, hx: Any = None) -> Any:
        """As in ``torch.nn``."""
        packed = isinstance(x, PackedSequence)
        data, sizes = (x.data, (x.batch_sizes,)) if packed else (x, ())
        batched = packed or x.ndim == 3
        if not batched:
            data = data.unsqueeze(0 if self.batch_first else 1)
        batch = int(x.batch_sizes[0]) if packed else data.shape[0 if self.batch_first else 1]
        states = self._states(hx, batch, data, batched)
        if packed and x.sorted_indices is not None:
            states = [s.index_select(1, x.sorted_indices) for s in states]
        function = torch.quantized_lstm if self.kind == "lstm" else torch.quantized_gru
        first = states if self.kind == "lstm" else states[0]
        options: dict[str, Any] = {}
        if self.kind == "lstm":
            options = {"dtype": torch.qint8, "use_dynamic": True}
        layout = () if packed else (self.batch_first,)
        cells = [getattr(self, f"cell_{i}_{d}") for i in range(self.num_layers) for d in range(1 + self.bidirectional)]
        arguments = (first, cells, True, self.num_layers, 0.0, False, self.bidirectional, *layout)
        out, *last = function(data, *sizes, *arguments, **options)
        if packed:
            if x.unsorted_indices is not None:
                last = [s.index_select(1, x.unsorted_indices) for s in last]
            out = PackedSequence(out, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        elif not batched:
            out, last = out.squeeze(0 if self.batch_first else 1), [s.squeeze(1) for s in last]
        return (out, tuple(last)) if self.kind == "lstm" else (out, last[0])

    def _states(self, hx: Any, batch: int, like: Tensor, batched: bool) -> list[Tensor]:
        count = 2 if self.kind == "lstm" else 1
        if hx is None:
            zeros = like.new_zeros(self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
            return [zeros] * count
        given = list(hx) if self.kind == "lstm" else [hx]
        return given if batched else [s.unsqueeze(1) for s in given]

    def extra_repr(self) -> str:
        """Sizes and numbers."""
        return self.sizes


def _float_layer(layer: DynamicRecurrent) -> nn.Module:
    """torch's own layer on the dequantized weights, where the inputs stay float."""
    kinds: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
    options: dict[str, Any] = {}
    if layer.kind.startswith("rnn"):
        options["nonlinearity"] = layer.kind.removeprefix("rnn_")
    made: nn.Module = kinds[layer.kind](
        layer.input_size, layer.hidden_size, num_layers=layer.num_layers, bias=layer.bias_l0 is not None,
        batch_first=layer.batch_first, bidirectional=layer.bidirectional, **options,
    )  # fmt: skip
    with torch.no_grad():
        for index in range(layer.num_layers):
            w_ih, s_ih, w_hh, s_hh, bias = layer.parameters_of(index)
            assert w_ih is not None
            assert w_hh is not None
            for d in range(len(w_ih)):
                suffix = f"_l{index}" + ("_reverse" if d else "")
                for name, w, s in (("weight_ih", w_ih, s_ih), ("weight_hh", w_hh, s_hh)):
                    getattr(made, name + suffix).copy_(laws.dequantized(w[d], None if s is None else s[d]))
                if bias is not None:
                    for name, b in zip(("bias_ih", "bias_hh"), bias[d]):
                        getattr(made, name + suffix).copy_(b)
    return made.requires_grad_(False)


def _kernel(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, DynamicLinear):
        return TorchLinear(layer)
    if isinstance(layer, DynamicRecurrent):
        half = layer.weight_ih_l0_scale is None and layer.kind == "lstm"
        return TorchRecurrent(layer) if layer.activations == "tensor" or half else _float_layer(layer)
    return None


class TorchDeployed(nn.Module):
    """A dynamically quantized model on torch's int8 kernels; called like the float model.

    ``engine`` says so; ``timings`` are there where engine ``auto`` chose it.
    """

    def __init__(self, q: DynamicModel) -> None:
        super().__init__()
        if next((t.device.type for t in q.model.state_dict().values() if isinstance(t, Tensor)), "cpu") != "cpu":
            raise DataError("engine='torch' runs on the CPU: call q.cpu() first")
        memo: dict[int, Any] = {id(m): made for m in q.model.modules() if (made := _kernel(m)) is not None}
        with torch.no_grad():
            self.model = copy.deepcopy(q.model, memo).eval()
        self.engine = Engine("torch", torch.__version__, list(q.signature.parameters), [], self._by_name)
        self.timings: dict[str, Latency] = {}

    def _by_name(self, feeds: dict[str, Any]) -> list[Any]:
        outputs = self(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return [t.numpy() for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the integer kernels."""
        with torch.inference_mode():
            return self.model(*args, **kwargs)
