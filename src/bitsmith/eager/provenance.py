"""Is what a quantized layer reads on a grid? Found by watching one run, so that a forgotten stub is told by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..calibrate.watching import WatchingQuantizer
from ..errors import PlacementError
from ..nn.module import WeightedModule
from .stubs import DeQuantStub, FloatFunctional

# What leaves codes on their grid: it moves them, clips them at the code of 0, or averages some of them.
_KEEPS = {"reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "contiguous",
          "clone", "detach", "max_pool1d", "max_pool2d", "max_pool3d", "_max_pool1d", "_max_pool2d", "_max_pool3d",
          "relu", "relu_", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
          "__getitem__", "__get__", "chunk", "split", "unbind", "narrow", "select", "expand", "repeat", "movedim",
          "swapaxes", "pixel_shuffle", "channel_shuffle", "pad", "to", "mean", "avg_pool1d", "avg_pool2d",
          "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}  # fmt: skip
_UNMADE = "the model's input, or a parameter"


class Provenance(TorchFunctionMode):
    """While it is entered, a layer whose input is on no grid raises a PlacementError that names it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.on_grid = WeakIdKeyDictionary()  # of tensors
        self.maker: Any = WeakIdKeyDictionary()  # tensor -> what made it
        self._stack: list[str] = []
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(name)
            if _needs_codes(module):
                self._require(name, module, [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)])

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self._stack.pop()
            if isinstance(module, WatchingQuantizer | DeQuantStub):
                output = output.view_as(output)  # the caller may still hold the tensor that went in
                if isinstance(module, WatchingQuantizer):
                    self.on_grid[output] = True
                else:
                    self.maker[output] = f"the DeQuantStub {name!r}"
            return output

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        self._handles.append(module.register_forward_hook(leave))

    def _require(self, name: str, module: nn.Module, values: list[Tensor]) -> None:
        for value in values:
            if value not in self.on_grid:
                source = self.maker.get(value, _UNMADE)
                raise PlacementError(
                    f"{name or 'the model'!r} ({type(module).__name__}) reads a value that is on no grid; it comes "
                    f"from {source}. Put a bitsmith.QuantStub in front of it (bitsmith.FloatFunctional for arithmetic "
                    f"between quantized values), or leave it in float: model.{name}.recipe = None"
                )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note what it makes of values on grids."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = inputs[0] if name in _KEEPS and inputs else None
        keeps = moved is not None and moved in self.on_grid
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            if keeps:
                self.on_grid[leaf] = True
            elif not (leaf in self.on_grid and any(leaf is value for value in inputs)):
                where = self._stack[-1] if self._stack else ""
                made = f"{name}() in {where!r}" if where else f"{name}() in the model's forward"
                self.maker[leaf] = made if moved is None else self.maker.get(moved, _UNMADE)
        return result

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _needs_codes(module: nn.Module) -> bool:
    """Whether a module computes on codes, and does not make them itself."""
    if isinstance(module, FloatFunctional):
        return module.output_quantizer is not None
    is_table = isinstance(module, nn.Embedding)
    return isinstance(module, WeightedModule) and module.input_quantizer is None and not is_table
