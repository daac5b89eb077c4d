"""Signal to quantization noise is 10 log10 of the ratio of powers, whatever the chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitsmith.calibrate.noise import Noise


def test_noise_is_the_ratio_of_powers_in_decibels() -> None:
    rng = np.random.default_rng(0)
    exact, noise = rng.normal(size=(7, 50)), Noise()
    quantized = exact + rng.normal(size=(7, 50)) * 0.01
    for a, b in zip(exact, quantized):
        noise.update(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    expected = 10 * np.log10((exact**2).sum() / ((quantized - exact) ** 2).sum())
    assert noise.db == pytest.approx(expected, abs=1e-3)


def test_a_tenth_of_the_amplitude_is_20_decibels() -> None:
    noise = Noise()
    noise.update(torch.full((4, 4), 10.0), torch.full((4, 4), 9.0))
    assert noise.db == pytest.approx(20.0)


def test_without_noise_it_is_infinite_and_without_a_signal_there_is_none() -> None:
    noise = Noise()
    assert noise.db is None
    noise.update(torch.zeros(3), torch.ones(3))
    assert noise.db is None
    exact = Noise()
    exact.update(torch.ones(3), torch.ones(3))
    assert exact.db == math.inf


def test_memory_layouts_do_not_matter() -> None:
    x = torch.randn(2, 3, 4, 5)
    noise = Noise()
    noise.update(x, x.contiguous(memory_format=torch.channels_last) * 0.9)
    assert noise.db == pytest.approx(20.0, abs=1e-3)
