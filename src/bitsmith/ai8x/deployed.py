"""A checkpoint and its network description as a model: real numbers in and out, integers between."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..grid import Grid, IntFormat, quantize
from ..targets import get_target
from .checkpoint import read_checkpoint
from .devices import find_device
from .network import Network, read_network
from .simulate import ChipProgram, chip_program

Array = np.ndarray[Any, Any]
_SUFFIXES = (".pth.tar", ".pth", ".tar", ".pt")


def description_path(path: str | os.PathLike[str]) -> Path:
    """Where the network description of a checkpoint lies.

    >>> str(description_path("out/net.pth.tar"))
    'out/net.yaml'
    """
    path = Path(path)
    name = next((path.name.removesuffix(end) for end in _SUFFIXES if path.name.endswith(end)), path.name)
    return path.with_name(f"{name}.yaml")


@dataclass
class DeployedChip:
    """Files that `bitsmith.export_ai8x` wrote, on the simulated chip; what the files do not say they lie without."""

    program: ChipProgram
    network: Network
    input: str
    input_scale: float
    output_scale: float

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DeployedChip:
        """Read the checkpoint at ``path`` and the description beside it.

        Raises CheckpointError or NetworkError where a file is missing, damaged, or not of `bitsmith.export_ai8x`.
        """
        checkpoint = read_checkpoint(path)
        extras, state = checkpoint.get("extras"), checkpoint.get("state_dict")
        if not isinstance(extras, dict) or not isinstance(state, dict):
            raise CheckpointError(
                f"{Path(path)} lacks `extras` or `state_dict`: was it written by bitsmith.export_ai8x?"
            )
        try:
            device, name = str(extras["device"]), str(extras["input"])
            scales = float(extras["input_scale"]), float(extras["output_scale"])
            rounding = bool(extras["avg_pool_rounding"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{Path(path)} does not say what its codes mean: `extras` lacks {error}") from error
        if not all(0 < scale < float("inf") for scale in scales):
            raise CheckpointError(f"{Path(path)}: input_scale and output_scale must be positive numbers, not {scales}")
        network = read_network(description_path(path), find_device(device))
        if str(checkpoint.get("arch")).lower() != network.arch.lower():
            raise CheckpointError(
                f"{Path(path)} is of architecture {checkpoint.get('arch')!r}, its description of {network.arch!r}"
            )
        target = get_target(device).model_copy(update={"average_rounding": rounding})
        return cls(chip_program(state, network, target, "integer"), network, name, *scales)

    @property
    def operators(self) -> list[str]:
        """What each layer does."""
        return [
            layer.eltwise or layer.pooling or "copy" if layer.op == "none" else layer.op
            for layer in self.network.layers
        ]

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """The output for real inputs."""
        grid = Grid(IntFormat(8), torch.tensor(self.input_scale))
        codes = self(quantize(torch.from_numpy(feeds[self.input]), grid))
        return [(codes.float() * self.output_scale).numpy()]

    def __call__(self, codes: Tensor) -> Tensor:
        """The output codes for input codes."""
        return self.program(codes)
