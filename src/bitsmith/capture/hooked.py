"""A model that no tracer can follow: its compute layers quantize their own inputs while its own code runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError, ExportError
from ..grid import Quantizer
from ..integer.program import Program
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..recipe import Recipe
from ..report.model import Report
from ..targets import Target
from .inputs import Arguments, positional

COMPUTE_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
Watcher = Callable[[str, nn.Module, Tensor, Tensor], None]  # (name, layer, input, output)


class OwnInputLayer(QuantLayer):
    """A QuantLayer that quantizes its own input too; whatever else is asked of it, its layer answers.

    The bias stays in float: it is added to the accumulator, whose grid is far finer than it needs.
    """

    input_quantizer: Quantizer | None

    def __init__(self, layer: nn.Module, input_quantizer: Quantizer | None, weight_quantizer: Quantizer | None) -> None:
        super().__init__(layer, weight_quantizer)
        self.input_quantizer = input_quantizer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # such as in_features, which user code reads

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own function on grids."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return super().forward(x, *args, **kwargs)


class HookedModel(QuantizedModel):
    """A quantized model without a graph: it simulates, and cannot be exported or verified."""

    def __init__(
        self, module: nn.Module, recipe: Recipe, target: Target, report: Report, signature: inspect.Signature,
        reason: str = "",
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.module = module
        self.recipe, self.target, self.report = recipe, target, report
        self.signature, self.reason = signature, reason
        self._program = None
        self.eval()

    def _refuse(self) -> NoReturn:
        raise ExportError(
            "captured by module hooks: no graph to export; the model runs and can be evaluated, but a file, "
            "its verification and the integer executor need a graph. What keeps it from one: "
            f"{self.reason or 'unknown'}"
        )

    @property
    def graph(self) -> fx.GraphModule:  # type: ignore[override]
        """There is none: an ExportError that says why."""
        self._refuse()

    @property
    def program(self) -> Program:
        """There is none: an ExportError that says why."""
        self._refuse()

    def integer_executor(self) -> Program:
        """There is none: an ExportError that says why."""
        self._refuse()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The simulated outputs, in float."""
        args, kwargs = positional(self.signature, args, kwargs)
        with torch.no_grad():
            return self.module(*args, **kwargs)


def clone(model: nn.Module) -> nn.Module:
    """A copy of the user's model in eval mode, without gradients."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # whatever the user's modules hold
        raise CaptureError(
            f"{type(model).__name__} cannot be read as a graph, nor copied for module hooks ({error}): keep "
            "handles, locks and non-leaf tensors out of the model's attributes"
        ) from error
    return copied.eval().requires_grad_(False)


def compute_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's convolutions and linears by name, in the order of their definition."""
    never_called = nn.modules.linear.NonDynamicallyQuantizableLinear  # attention reads its weight instead
    layers = {n: m for n, m in model.named_modules() if isinstance(m, COMPUTE_LAYERS)}
    return {name: layer for name, layer in layers.items() if not isinstance(layer, never_called)}


@contextmanager
def watching(layers: dict[str, nn.Module], watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` see every call of ``layers`` while the model runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            watcher(name, module, args[0] if args else next(iter(kwargs.values())), output)

        return see

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, arguments: Arguments) -> Any:
    """One batch through the model."""
    with torch.no_grad():
        return model(*arguments[0], **arguments[1])


def replace_layer(model: nn.Module, layer: nn.Module, wrapped: nn.Module) -> None:
    """Put ``wrapped`` wherever the model holds ``layer``."""
    for owner in list(model.modules()):
        if isinstance(owner, QuantLayer):
            continue
        for name, child in list(owner._modules.items()):
            if child is layer:
                owner._modules[name] = wrapped
