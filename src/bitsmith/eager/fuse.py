"""Fusing layers with the batch norm and the activation behind them, in a model of modules."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture import evaluation_mode, read_batches
from ..capture.hooked import COMPUTE_LAYERS
from ..capture.inputs import Arguments
from ..errors import DataError
from ..prepare.fold_batch_norm import fold_into

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


class _Fused(nn.Module):
    """Mixin before a layer's type: the layer, then an activation."""

    activation: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's function, then the activation's."""
        y: Tensor = self.activation(super().forward(*args, **kwargs))
        return y


class ConvAct1d(_Fused, nn.Conv1d):
    """A Conv1d with its activation."""


class ConvAct2d(_Fused, nn.Conv2d):
    """A Conv2d with its activation."""


class ConvAct3d(_Fused, nn.Conv3d):
    """A Conv3d with its activation."""


class ConvTransposeAct1d(_Fused, nn.ConvTranspose1d):
    """A ConvTranspose1d with its activation."""


class ConvTransposeAct2d(_Fused, nn.ConvTranspose2d):
    """A ConvTranspose2d with its activation."""


class ConvTransposeAct3d(_Fused, nn.ConvTranspose3d):
    """A ConvTranspose3d with its activation."""


class LinearAct(_Fused, nn.Linear):
    """A Linear with its activation."""


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvAct1d, nn.Conv2d: ConvAct2d, nn.Conv3d: ConvAct3d,
    nn.ConvTranspose1d: ConvTransposeAct1d, nn.ConvTranspose2d: ConvTransposeAct2d,
    nn.ConvTranspose3d: ConvTransposeAct3d, nn.Linear: LinearAct,
}  # fmt: skip


def fuse_modules(
    model: nn.Module, groups: Sequence[str] | Sequence[Sequence[str]] | None = None, *, example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` in which layers are one with the batch norm and the activation behind them.

    ``groups`` names modules that follow each other, such as ``[["conv", "bn", "relu"], ["fc", "relu2"]]``: a
    convolution, transposed convolution or linear, then a batch norm, an activation (ReLU, ReLU6, Hardtanh), or both.
    Without ``groups`` they are found by watching the model run on ``example_inputs``. The first module of a group
    becomes the fused one, under its own name, and the others become ``torch.nn.Identity``; the function is the same.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> [type(layer).__name__ for layer in fuse_modules(net, ["0", "1", "2"])]
    ['ConvAct2d', 'Identity', 'Identity']
    """
    model = model if inplace else copy.deepcopy(model)
    if groups is None:
        if example_inputs is None:
            raise DataError("fuse_modules needs groups of module names, or example_inputs to find them by")
        with evaluation_mode(model):
            groups = find_groups(model, read_batches(model, [example_inputs])[0])
    elif groups and isinstance(groups[0], str):
        groups = [groups]  # type: ignore[list-item]
    for group in groups:
        _fuse(model, list(group))
    return model


def _fuse(model: nn.Module, names: list[str]) -> None:
    try:
        modules: list[Any] = [model.get_submodule(name) for name in names]
    except AttributeError as error:
        raise DataError(f"cannot fuse {names}: {error}") from error
    first, rest = modules[0], modules[1:]
    norm = rest.pop(0) if rest and isinstance(rest[0], NORMS) else None
    activation = rest.pop(0) if rest and isinstance(rest[0], ACTIVATIONS) else None
    if type(first) not in FUSED or rest or (norm is None and activation is None):
        types = ", ".join(type(module).__name__ for module in modules)
        raise DataError(
            f"cannot fuse {names} ({types}): a group is a convolution, transposed convolution or linear, then a batch "
            "norm, a ReLU, ReLU6 or Hardtanh, or both"
        )
    fused = copy.copy(first)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(fused, kind, dict(getattr(first, kind)))
    if norm is not None:
        if norm.training:
            raise DataError(
                f"cannot fuse {names}: the batch norm is in train mode, where its statistics move; call model.eval()"
            )
        if norm.running_mean is None:
            raise DataError(f"cannot fuse {names}: the batch norm keeps no statistics (track_running_stats=False)")
        fold_into(fused, norm)
    if activation is not None:
        fused.__class__ = FUSED[type(first)]
        fused.activation = activation
    for name, module in zip(names, [fused, *[nn.Identity() for _ in names[1:]]]):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def find_groups(model: nn.Module, arguments: Arguments) -> list[list[str]]:
    """Layers, batch norms and activations that follow each other with nothing else reading what is between."""
    flow = _Flow(model)
    with flow, torch.no_grad():
        outputs = model(*arguments[0], **arguments[1])
    flow.read(torch.utils._pytree.tree_leaves(outputs), "output")
    flow.close()
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in names.items():
        paths[module].append(name)

    def follower(module: nn.Module, types: tuple[type[nn.Module], ...]) -> nn.Module | None:
        readers = flow.readers[module]
        after = readers[0] if len(readers) == 1 else None
        once = isinstance(after, types) and flow.calls[after] == 1 and len(paths[after]) == 1
        return after if once and isinstance(after, nn.Module) else None

    groups = []
    for module in list(flow.calls):
        if type(module) not in FUSED or flow.calls[module] != 1 or len(paths[module]) != 1:
            continue
        chain = [module]
        for types in (NORMS, ACTIVATIONS):
            if (after := follower(chain[-1], types)) is not None:
                chain.append(after)
        if len(chain) > 1 and not any(isinstance(m, NORMS) and m.running_mean is None for m in chain):
            groups.append([paths[m][0] for m in chain])
    return groups


class _Flow(TorchFunctionMode):
    """Which leaf module, or what else, reads what each leaf module yields."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[nn.Module, int] = defaultdict(int)
        self.readers: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        self._maker: dict[int, nn.Module] = {}  # by the id of a tensor
        self._alive: list[Any] = []  # keeps ids from being used again
        self._inside = 0
        leaves = [m for m in model.modules() if not any(m.children()) or isinstance(m, (*COMPUTE_LAYERS, *NORMS))]
        self._handles = [leaf.register_forward_pre_hook(self._enter, with_kwargs=True) for leaf in leaves]
        self._handles += [leaf.register_forward_hook(self._leave) for leaf in leaves]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            self.read(torch.utils._pytree.tree_leaves((args, kwargs)), module)
        self._inside += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if self._inside:
            return
        self.calls[module] += 1
        for leaf in torch.utils._pytree.tree_leaves(output):
            self._maker[id(leaf)] = module
            self._alive.append(leaf)

    def read(self, values: list[Any], reader: nn.Module | str) -> None:
        """Note that ``reader`` reads ``values``."""
        for value in values:
            if isinstance(value, Tensor) and (maker := self._maker.get(id(value))) is not None:
                self.readers[maker].append(reader)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note reads by functions that no leaf module makes."""
        if not self._inside:
            self.read(torch.utils._pytree.tree_leaves((args, kwargs)), "function")
        return func(*args, **(kwargs or {}))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
