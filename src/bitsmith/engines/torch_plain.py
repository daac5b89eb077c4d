"""Int8 layers on plain bytes, as torch.jit can script them (which reads annotations as objects, not as text)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..integer.torch_laws import twice_inverted
from .torch_kernels import LayerCodes, Stored

Geometry = tuple[list[int], list[int], list[int], int]
PlainState = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Geometry, tuple[float, int, float, int], str, bool, bool, bool
]  # fmt: skip


class PlainLayer(nn.Module):
    """Convolution or linear layer; with ``output`` None its result is float. A file keeps it unpacked."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    packed: Tensor
    geometry: Geometry
    grids: tuple[float, int, float, int]
    post: str
    is_linear: bool
    is_float: bool
    training: bool

    def __init__(
        self, layer: Any, codes: LayerCodes, source: Stored, output: Stored | None, *, relu: bool = False
    ) -> None:
        super().__init__()
        channels = codes.weight.shape[0]
        self.weight, self.bias = codes.weight, codes.bias
        self.weight_scale = codes.scale.expand(channels).contiguous()
        self.weight_zero = torch.zeros(channels, dtype=torch.int32)
        self.is_linear = isinstance(layer, nn.Linear)
        self.geometry = ([1], [0], [1], 1)
        if not self.is_linear:
            self.geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        scale, zero = (1.0, 0) if output is None else (output.scale, output.zero_point)
        source_scale = float(twice_inverted(torch.tensor(source.scale)))  # as the packed kernels see it
        self.grids = (source_scale, source.zero_point, scale, zero)
        self.post = "relu" if relu else "none"
        self.is_float = output is None
        self.packed = self.pack()

    def pack(self) -> Tensor:
        """The weight as oneDNN wants it."""
        stride, padding, dilation, groups = self.geometry
        if self.is_linear:
            packed: Tensor = torch.ops.onednn.qlinear_prepack(self.weight, None)
        else:
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.weight_scale, self.grids[0], self.grids[1], stride, padding, dilation, groups, None
            )
        return packed

    @torch.jit.export
    def on_bytes(self, x: Tensor) -> Tensor:
        """Run the kernel on stored codes; codes or float out."""
        stride, padding, dilation, groups = self.geometry
        x_scale, x_zero, scale, zero = self.grids
        dtype = torch.float32 if self.is_float else torch.uint8
        if self.is_linear:
            y: Tensor = torch.ops.onednn.qlinear_pointwise(
                x, x_scale, x_zero, self.packed, self.weight_scale, self.weight_zero, self.bias, scale, zero, dtype,
                self.post, [], "",
            )  # fmt: skip
        else:
            y = torch.ops.onednn.qconv_pointwise(
                x, x_scale, x_zero, self.packed, self.weight_scale, self.weight_zero, self.bias, stride, padding,
                dilation, groups, scale, zero, dtype, self.post, [], "",
            )  # fmt: skip
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel on a quantized tensor."""
        y = self.on_bytes(torch.int_repr(x))
        return y if self.is_float else torch._make_per_tensor_quantized_tensor(y, self.grids[2], self.grids[3])

    @torch.jit.export
    def __getstate__(self) -> PlainState:
        """What a file keeps: the packed weight is made anew where it is loaded."""
        return (
            self.weight, self.weight_scale, self.weight_zero, self.bias, self.geometry, self.grids, self.post,
            self.is_linear, self.is_float, self.training,
        )  # fmt: skip

    @torch.jit.export
    def __setstate__(self, state: PlainState) -> None:
        """Load, and pack."""
        self.weight, self.weight_scale, self.weight_zero, self.bias = state[0], state[1], state[2], state[3]
        self.geometry, self.grids, self.post = state[4], state[5], state[6]
        self.is_linear, self.is_float, self.training = state[7], state[8], state[9]
        self.packed = self.pack()


class QuantizedOnBytes(nn.Module):
    """A scripted PlainLayer under its layer's own name."""

    def __init__(
        self, layer: Any, codes: LayerCodes, source: Stored, output: Stored | None, *, relu: bool = False
    ) -> None:
        super().__init__()
        self.name = f"Quantized{type(layer).__name__}" + ("ReLU" if relu else "")
        self.description = f"{layer.extra_repr()}, {'float output' if output is None else output}"
        self.plain = torch.jit.script(PlainLayer(layer, codes, source, output, relu=relu))

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel on a quantized tensor."""
        return self.plain(x)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{self.name}({self.description})"
