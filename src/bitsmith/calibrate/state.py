"""The parameters and grids of a stretch of the graph."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..grid import Grid, Quantizer
from .stages import Stage


class State:
    """What steps change in some stages: to be put back, kept in a file, or taken from there."""

    def __init__(self, stages: list[Stage]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.quantizers: dict[str, Quantizer] = {}
        for stage in stages:
            if stage.layer is not None and stage.compute is not None:
                name = str(stage.compute.target)
                self.parameters |= {f"{name}.{n}": p for n, p in stage.layer.layer.named_parameters()}
                if stage.layer.weight_quantizer is not None:
                    self.quantizers[f"{name}.weight_scale"] = stage.layer.weight_quantizer
            if stage.observes and stage.quantizer is not None:
                self.quantizers[f"{stage.end.name}.scale"] = stage.quantizer

    def copy(self) -> tuple[dict[str, Tensor], dict[str, Grid]]:
        """Values and grids as they are now."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return values, {name: grid for name, q in self.quantizers.items() if (grid := q.grid) is not None}

    def restore(self, values: dict[str, Tensor], grids: dict[str, Grid]) -> None:
        """Put a copy back."""
        for name, value in values.items():
            self.parameters[name].data.copy_(value)
        for name, grid in grids.items():
            self.quantizers[name].set_grid(grid)

    def tensors(self) -> dict[str, Tensor]:
        """Values and scales by name."""
        values, grids = self.copy()
        return values | {name: grid.scale for name, grid in grids.items()}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Values and scales from a file."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
        for name, quantizer in self.quantizers.items():
            if (grid := quantizer.grid) is not None:
                quantizer.set_grid(dataclasses.replace(grid, scale=tensors[name].to(grid.scale.device)))
