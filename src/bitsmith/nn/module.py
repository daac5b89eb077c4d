"""What all quantized layers share: specs given by keyword, Quantizers for parameters, inputs and outputs."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from ..calibrate.watching import WatchingQuantizer, WeightQuantizer
from ..capture.marks import LayerSpecs
from ..errors import RecipeError
from ..grid import TensorSpec
from ..recipe import Recipe, load_recipe

Spec = TensorSpec | str | Path | Recipe | None  # a recipe stands for the spec that it has for such tensors
Place = Spec | bool  # True: quantized, as the recipe of the whole says
_Module = TypeVar("_Module", bound=nn.Module)
_KEYWORDS = ("recipe", "weights", "inputs", "outputs")


def spec_of(given: Spec, role: str) -> TensorSpec | None:
    """The TensorSpec that a keyword means: itself, or what the recipe has for ``role``."""
    if given is None or isinstance(given, TensorSpec):
        return given
    if isinstance(given, bool):
        raise RecipeError(f"{role} takes a TensorSpec or a recipe, not {given}")
    spec: TensorSpec | None = getattr(load_recipe(given), role)
    return spec


def place_of(given: Place, *, non_negative: bool = False) -> WatchingQuantizer | None:
    """The Quantizer of a value, or None where it is left in float."""
    if given is None or given is False:
        return None
    spec = None if given is True else spec_of(given, "activations")
    return WatchingQuantizer(spec, non_negative=non_negative)


def adopt(cls: type[_Module], layer: nn.Module) -> _Module:
    """A module of type ``cls`` with the parameters and settings of ``layer``, which shares no container with it."""
    new = cls.__new__(cls)
    new.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return new


def _take_out(owner: nn.Module, name: str) -> None:
    owner._modules[name] = nn.Identity() if isinstance(owner, nn.ModuleDict) else None


class QuantModule(nn.Module):
    """A module with Quantizers in it. ``specs`` are those of its parameters; None where the recipe's hold.

    Until it is calibrated it computes in float; then it computes on its grids, with straight-through gradients.
    """

    specs: LayerSpecs = LayerSpecs()
    assigned: Recipe | None = None

    def assign(self, recipe: Recipe) -> None:
        """Take from ``recipe`` what the module carries no spec for itself; what neither has a spec for stays float."""
        for module in self.modules():
            for name, child in module._modules.items():
                spec = recipe.weights if isinstance(child, WeightQuantizer) else recipe.activations
                if isinstance(child, WeightQuantizer | WatchingQuantizer) and (spec or child.carried):
                    child.assign(child.carried or spec)  # type: ignore[arg-type]
                elif isinstance(child, WatchingQuantizer):
                    _take_out(module, name)
        self.assigned = recipe
        self.specs = LayerSpecs(self.specs.weights or recipe.weights, self.specs.bias or recipe.bias)

    def leave_in_float(self) -> None:
        """Take all Quantizers of values out, and let weights be."""
        for module in self.modules():
            for name, child in module._modules.items():
                if isinstance(child, WatchingQuantizer):
                    _take_out(module, name)
        self.specs = LayerSpecs()


class WeightedModule(QuantModule):
    """Mixin before a ``torch.nn`` layer with a weight: the same signature, and four keywords more.

    ``weights``, ``inputs``, ``outputs``: a TensorSpec, or a recipe (name, Recipe, YAML file) that has one; True for
    an input or output means the spec of the recipe that the whole model is quantized by. ``recipe`` gives weights,
    bias and inputs at once. A weight without a spec takes that recipe's too; an input or output without one is left
    as it is. ``activation`` is computed before the output is quantized.
    """

    weight: nn.Parameter
    weight_quantizer: WeightQuantizer
    input_quantizer: WatchingQuantizer | None
    output_quantizer: WatchingQuantizer | None
    activation: nn.Module | None
    channel_axis = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        layers = [
            base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules") and base is not nn.Module
        ]
        if not layers:
            return
        own = inspect.signature(layers[0])  # help() and editors show the float layer's arguments
        keywords = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=None) for k in _KEYWORDS]
        cls.__signature__ = own.replace(parameters=[*own.parameters.values(), *keywords])  # type: ignore[attr-defined]

    def __init__(
        self, *args: Any, recipe: str | Path | Recipe | None = None, weights: Spec = None, inputs: Place = None,
        outputs: Place = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._attach(recipe, weights, inputs, outputs, None)

    @classmethod
    def from_float(
        cls, layer: nn.Module, *, recipe: str | Path | Recipe | None = None, weights: Spec = None,
        inputs: Place = None, outputs: Place = None, activation: nn.Module | None = None,
    ) -> Self:  # fmt: skip
        """The quantized layer around a float layer's own parameters.

        >>> from bitsmith.nn import QuantLinear
        >>> layer = nn.Linear(4, 2)
        >>> QuantLinear.from_float(layer, weights="int8").weight is layer.weight
        True
        """
        new = adopt(cls, layer)
        new._attach(recipe, weights, inputs, outputs, activation)
        return new

    def _attach(
        self, recipe: str | Path | Recipe | None, weights: Spec, inputs: Place, outputs: Place,
        activation: nn.Module | None,
    ) -> None:  # fmt: skip
        own = None if recipe is None else load_recipe(recipe)
        spec = spec_of(weights, "weights") or (own.weights if own else None)
        self.specs = LayerSpecs(spec, own.bias if own else None)
        self.weight_quantizer = WeightQuantizer(spec, self.channel_axis)
        given = own.activations if own and inputs is None else inputs
        self.input_quantizer = place_of(given)
        self.activation = activation
        self.output_quantizer = place_of(outputs, non_negative=is_non_negative(activation))

    def compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """The layer's own function."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The layer's function with input, weight and output on their grids."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = self.compute(x, self.weight_quantizer(self.weight), *args)
        if self.activation is not None:
            y = self.activation(y)
        return y if self.output_quantizer is None else self.output_quantizer(y)


def is_non_negative(activation: nn.Module | None) -> bool:
    """Whether a module's outputs cannot be below 0."""
    if isinstance(activation, nn.Hardtanh):  # ReLU6 among them
        return activation.min_val >= 0
    return isinstance(activation, nn.ReLU | nn.Sigmoid | nn.Hardsigmoid | nn.Softmax)
