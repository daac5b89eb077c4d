"""Which of onnxruntime's operators an attention becomes, and that each computes what the model does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.verify.engines import open_engine


class Attention(nn.Module):
    """Four heads of 8, written as models do: ``mask``, ``causal``, ``scale``, the projections apart or as one."""

    def __init__(
        self, mask: str = "", causal: bool = False, scale: float | None = None, joint: str = "", cross: bool = False,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask, self.causal, self.scale, self.joint, self.cross = mask, causal, scale, joint, cross
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.qkv, self.out = nn.Linear(32, 96, bias=bias), nn.Linear(32, 32)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.joint:
            parts = self.qkv(x).chunk(3, -1) if self.joint == "chunk" else self.qkv(x).split([32, 32, 32], dim=2)
        else:
            parts = self.q(x), self.k(x * 2 if self.cross else x), self.v(x)
        q, k, v = (t.view(t.shape[0], t.shape[1], 4, 8).transpose(1, 2) for t in parts)
        used = ids != 0
        mask = None
        if self.mask == "tokens":
            mask = used[:, None, None, :]
        elif self.mask == "numbers":
            mask = torch.zeros(ids.shape).masked_fill(ids == 0, -1e4)[:, None, None, :]
        elif self.mask == "pairs":  # each token sees those of its own parity
            mask = (ids % 2)[:, None, :, None] == (ids % 2)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


CASES = {
    "plain": (Attention, "QAttention"),
    "joint projection": (partial(Attention, joint="chunk", bias=False), "QAttention"),
    "split projection, causal": (partial(Attention, joint="split", causal=True), "QAttention"),
    "token mask": (partial(Attention, "tokens"), "QAttention"),
    "its own scale": (partial(Attention, scale=8**-0.5), "QAttention"),
    "another scale": (partial(Attention, scale=0.3, causal=True), "MultiHeadAttention"),
    "additive mask": (partial(Attention, "numbers"), "MultiHeadAttention"),
    "mask of pairs": (partial(Attention, "pairs"), "MultiHeadAttention"),
    "keys from elsewhere": (partial(Attention, cross=True), "MultiHeadAttention"),
}


def _inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 4, (batch, length))
    ids[:, 0] = 2  # at least one token to look at
    return torch.randn(batch, length, 32), ids


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-dynamic-tensor", "int8-dynamic-token"])
@pytest.mark.parametrize(("build", "kernel"), CASES.values(), ids=CASES)
def test_attention_is_one_operator(build: Callable[[], Attention], kernel: str, recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = bs.quantize_dynamic(build().eval(), recipe, example_inputs=_inputs(3, 7))
    path = bs.export_onnx(q, tmp_path / "m.onnx")
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    by_token = recipe == "int8-dynamic-token"  # QAttention has one scale for its input
    assert counts["MultiHeadAttention" if by_token else kernel] == 1
    assert counts["Reshape"] == 0, "heads are side by side on both sides of the operator"
    engine = open_engine(path, threads=1)
    for batch, length in ((3, 7), (1, 1), (2, 19)):
        x, ids = _inputs(batch, length)
        feeds = {name: t.numpy() for name, t in zip(("x", "ids"), (x, ids)) if name in engine.inputs}
        (found,) = engine.run(feeds)
        expected = q(x, ids)
        step = float(expected.max() - expected.min()) / 255
        assert float((torch.from_numpy(found) - expected).abs().max()) < 0.02 * step


def test_a_layer_norm_is_one_kernel_and_its_sum_another(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.linear(x))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    q = bs.quantize_dynamic(Residual().eval(), example_inputs=x)
    engine = open_engine(bs.export_onnx(q, tmp_path / "m.onnx"), threads=1)
    assert engine.kernels == {"DynamicQuantizeMatMul": 1, "Sum": 1, "LayerNormalization": 1}
