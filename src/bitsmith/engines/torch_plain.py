"""Int8 convolution on plain bytes, as torch.jit can script it (which reads annotations as objects, not as text)."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..integer.torch_laws import twice_inverted
from .torch_kernels import LayerCodes, Stored

PlainState = tuple[
    Tensor, Tensor, Tensor, Optional[Tensor], tuple[list[int], list[int], list[int], int], tuple[float, int, float, int],
    str, bool, bool,
]  # fmt: skip


class PlainConv(nn.Module):
    """Convolution on plain bytes; with ``output`` None its result is float. Torch scripts it, and packs on loading."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Optional[Tensor]
    packed: Tensor
    geometry: tuple[list[int], list[int], list[int], int]
    grids: tuple[float, int, float, int]
    post: str
    is_float: bool
    training: bool

    def __init__(
        self, layer: Any, codes: LayerCodes, source: Stored, output: Optional[Stored], *, relu: bool = False
    ) -> None:
        super().__init__()
        channels = codes.weight.shape[0]
        self.weight, self.bias = codes.weight, codes.bias
        self.weight_scale = codes.scale.expand(channels).contiguous()
        self.weight_zero = torch.zeros(channels, dtype=torch.int32)
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
        return torch.ops.onednn.qconv_prepack(
            self.weight, self.weight_scale, self.grids[0], self.grids[1], stride, padding, dilation, groups, None
        )  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel."""
        stride, padding, dilation, groups = self.geometry
        x_scale, x_zero, scale, zero = self.grids
        dtype = torch.float32 if self.is_float else torch.uint8
        y: Tensor = torch.ops.onednn.qconv_pointwise(
            torch.int_repr(x), x_scale, x_zero, self.packed, self.weight_scale, self.weight_zero, self.bias, stride,
            padding, dilation, groups, scale, zero, dtype, self.post, [], "",
        )  # fmt: skip
        return y if self.is_float else torch._make_per_tensor_quantized_tensor(y, scale, zero)

    @torch.jit.export
    def __getstate__(self) -> PlainState:
        """What a file keeps: the packed weight is made anew where it is loaded."""
        return (
            self.weight, self.weight_scale, self.weight_zero, self.bias, self.geometry, self.grids, self.post,
            self.is_float, self.training,
        )  # fmt: skip

    @torch.jit.export
    def __setstate__(self, state: PlainState) -> None:
        """Load, and pack."""
        self.weight, self.weight_scale, self.weight_zero, self.bias = state[0], state[1], state[2], state[3]
        self.geometry, self.grids, self.post = state[4], state[5], state[6]
        self.is_float, self.training = state[7], state[8]
        self.packed = self.pack()
