"""A small trained network and its data: scikit-learn's 8 x 8 digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import MissingExtraError
from .net import DigitsNet

__all__ = ["WEIGHTS", "DigitsNet", "digits", "digits_net", "one_thread"]

WEIGHTS = Path(__file__).with_name("digits.safetensors")
TRAIN_SAMPLES = 1000
_SPLIT_SEED = 0


def digits_net() -> DigitsNet:
    """The network with its trained weights, in eval mode."""
    net = DigitsNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(train images, labels), (test images, labels)``: 1,000 and 797 samples, split by a fixed seed.

    Images are float32 ``(N, 1, 8, 8)`` from 0 to 1.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "the demo's digits come with scikit-learn, which is not installed: pip install 'bitsmith[demo]'"
        ) from error
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16.0  # (N, 1, 8, 8)
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    train, test = order[:TRAIN_SAMPLES], order[TRAIN_SAMPLES:]
    return (x[train], y[train]), (x[test], y[test])


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread for a while.

    Layers this small gain nothing from more, and lose a hundredfold where other programs use the cores: each
    layer then waits for a thread that does not get its turn.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
