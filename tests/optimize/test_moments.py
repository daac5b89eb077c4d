"""Second moments against the patches that unit weights cut out; rows against the layers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitsmith.optimize.moments import Moments, as_rows, as_weight

LAYERS = {
    "linear": (nn.Linear(5, 4), (7, 5)),
    "linear over sequences": (nn.Linear(5, 4), (2, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d, strided": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv1d, kernel as long as the input": (nn.Conv1d(2, 3, 5), (3, 2, 6)),
    "conv2d, same size": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 8, 7)),
    "conv2d, no padding": (nn.Conv2d(3, 4, 3), (2, 3, 8, 7)),
    "conv2d, wide padding": (nn.Conv2d(3, 4, (3, 2), padding=(1, 3), dilation=(2, 1)), (2, 3, 8, 7)),
    "conv2d, dilated": (nn.Conv2d(3, 4, 3, padding=1, dilation=2), (2, 3, 8, 9)),
    "conv2d, strided rows": (nn.Conv2d(3, 4, 3, padding=1, stride=(2, 1)), (2, 3, 8, 7)),
    "conv2d, strided": (nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 8, 7)),
    "conv2d, 'same'": (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 8, 7)),
    "conv2d, 'valid'": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 8, 7)),
    "conv2d, reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 7)),
    "conv2d, circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 7)),
    "conv2d, replicate 'same'": (nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"), (2, 3, 8, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 4)),
    "conv3d, same size": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), (2, 3, 5, 4)),
    "transposed 2d, cropped": (nn.ConvTranspose2d(3, 4, 3, padding=3), (2, 3, 6, 7)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 3, 3)),
}


def outputs(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's output without bias as (groups, rows, count)."""
    parameters = {"weight": weight, "bias": torch.zeros_like(layer.bias)}
    y = torch.func.functional_call(layer, parameters, (x,)).detach()
    y = y.reshape(-1, y.shape[-1]).T if isinstance(layer, nn.Linear) else y.transpose(0, 1).flatten(1)
    return y.reshape(getattr(layer, "groups", 1), -1, y.shape[-1])


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """(groups, columns, count): the outputs for weights that have a single 1 in their first row of each group."""
    rows = as_rows(layer, layer.weight.detach())
    columns = []
    for column in range(rows.shape[2]):
        one = torch.zeros_like(rows)
        one[:, 0, column] = 1
        columns.append(outputs(layer, as_weight(layer, one), x)[:, 0])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_weight_in_another_shape(name: str) -> None:
    layer, shape = LAYERS[name]
    rows, x = as_rows(layer, layer.weight.detach()), torch.randn(shape)
    assert torch.equal(as_weight(layer, rows), layer.weight)
    torch.testing.assert_close(rows @ patches(layer, x), outputs(layer, layer.weight, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels last"])
def test_moments_are_those_of_the_patches(name: str, memory_format: str) -> None:
    layer, shape = LAYERS[name]
    if memory_format == "channels last" and len(shape) != 4:
        pytest.skip("only four axes have channels last")
    chunks = [(torch.randn(shape), torch.randn(shape)) for _ in range(2)]
    moments = Moments(layer, cross=True)
    h, g = torch.zeros_like(moments.h), torch.zeros_like(moments.h)
    for x, exact in chunks:
        if memory_format == "channels last":
            x = x.to(memory_format=torch.channels_last)
        moments.update(x, exact)
        p, e = patches(layer, x).double(), patches(layer, exact).double()
        h, g = h + p @ p.mT, g + p @ e.mT
    torch.testing.assert_close(moments.h, h, rtol=1e-4, atol=1e-4)
    assert moments.g is not None
    torch.testing.assert_close(moments.g, g, rtol=1e-4, atol=1e-4)
