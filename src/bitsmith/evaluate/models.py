"""A model by name, as the command line takes it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, CheckpointError, MissingExtraError
from .checkpoint import load_weights
from .factory import call_factory

PRETRAINED = "pretrained"
FORMS = "torchvision:NAME, timm:NAME, package.module:factory, file.py:factory or a .pt2 file"


def load_model(spec: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The float model that ``spec`` names, with ``weights`` loaded into it, in eval mode.

    ``spec`` is ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, ``file.py:factory`` (a
    function or class called without arguments) or a ``.pt2`` file; ``weights`` is a ``.safetensors``, ``.pt``
    or ``.pth`` file, or ``"pretrained"``: the weights that torchvision or timm have for the model, which alone may
    use the network, once. Without ``weights`` a library's model is random, which ``weights_note`` puts in words.

    >>> load_model("bitsmith.demo:digits_net").training
    False
    """
    if weights == PRETRAINED:
        return _pretrained(spec).eval()
    model = _build(spec)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def weights_note(spec: str, weights: str | os.PathLike[str] | None) -> str | None:
    """A warning for models that ``load_model`` gives random weights, else None.

    >>> print(weights_note("timm:resnet18", None))
    timm:resnet18 has random weights, so accuracy means nothing: --weights names a file, or 'pretrained'
    """
    if weights is None and spec.startswith(("torchvision:", "timm:")):
        return f"{spec} has random weights, so accuracy means nothing: --weights names a file, or {PRETRAINED!r}"
    return None


def _build(spec: str) -> nn.Module:
    if spec.endswith(".pt2"):
        return _load_pt2(Path(spec))
    library, colon, name = spec.partition(":")
    if not colon or not name:
        hint = f"; did you mean torchvision:{spec} or timm:{spec}?" if spec.isidentifier() else ""
        raise CaptureError(f"{spec!r} does not name a model: write {FORMS}{hint}")
    if library == "torchvision":
        return _torchvision(name)
    if library == "timm":
        return _timm(name)
    model = call_factory(spec, "the model's factory", CaptureError)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{spec!r} returned a {type(model).__name__}: it must return the model, a torch.nn.Module")
    return model


def _import_torchvision() -> Any:
    try:
        import torchvision.models
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "torchvision:NAME needs torchvision, which is not installed: pip install 'bitsmith[vision]'"
        ) from error
    except Exception as error:
        # A mismatched build fails on its first operator; a second attempt fails elsewhere, half imported.
        raise MissingExtraError(
            f"torchvision's compiled operators are missing or do not match this torch "
            f"({torch.__version__}): {error}. Install the torchvision built for it, from the same index as "
            f"torch: pip install --force-reinstall --no-deps torchvision --index-url "
            f"https://download.pytorch.org/whl/{torch.__version__.partition('+')[2] or 'cpu'}"
        ) from error
    return torchvision.models


def _torchvision(name: str) -> nn.Module:
    models = _import_torchvision()
    if name not in models.list_models():
        raise CaptureError(f"torchvision has no model {name!r}{_similar(name, models.list_models())}")
    model = models.get_model(name, weights=None, **_no_backbone(name))
    assert isinstance(model, nn.Module)
    return model


def _no_backbone(name: str) -> dict[str, None]:
    """Segmentation and detection models fetch their backbone's weights unless told not to."""
    parts = ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn_", "lraspp", "keypoint")
    return {"weights_backbone": None} if any(part in name for part in parts) else {}


def _timm(name: str, *, pretrained: bool = False) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "timm:NAME needs timm, which is not installed: pip install 'bitsmith[vision]'"
        ) from error
    except Exception as error:  # timm imports torchvision, whose mismatch is told apart there
        _import_torchvision()
        raise MissingExtraError(f"timm cannot be imported: {error}") from error
    if not timm.is_model(name):
        raise CaptureError(f"timm has no model {name!r}{_similar(name, timm.list_models())}")
    if pretrained and not timm.is_model_pretrained(name):
        raise _none_known("timm", name)
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # the hub's errors have no common type
        if not pretrained:
            raise
        place = "https://huggingface.co/timm"
        raise _not_fetched(f"timm:{name}", place, error) from error
    assert isinstance(model, nn.Module)
    return model


def _pretrained(spec: str) -> nn.Module:
    """A library's model with the library's weights, which its cache has or the network gives."""
    library, _, name = spec.partition(":")
    if library == "timm":
        return _timm(name, pretrained=True)
    if library != "torchvision":
        raise CheckpointError(f"--weights {PRETRAINED}: goes with torchvision:NAME and timm:NAME, not {spec!r}")
    model = _torchvision(name)
    known = _import_torchvision().get_model_weights(name)
    if not len(known):
        raise _none_known("torchvision", name)
    weights = known.DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=prefix, progress=False)
        except Exception as error:  # urllib's, the disk's, or a wrong checksum
            raise _not_fetched(spec, weights.url, error) from error
    return load_weights(model, file)


def _none_known(library: str, name: str) -> CheckpointError:
    return CheckpointError(f"{library} has no pretrained weights for {name!r}: name a file of your own with --weights")


def _not_fetched(spec: str, place: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return CheckpointError(
        f"the pretrained weights of {spec} cannot be fetched: {reason}. Fetch them where there is a network (from "
        f"{place}), and name the file with --weights"
    )


def _similar(name: str, names: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _load_pt2(path: Path) -> nn.Module:
    if not path.is_file():
        raise CheckpointError(f"the model file {str(path)!r} does not exist (looked in {Path.cwd()})")
    _refuse_code(path)
    try:
        with _tensors_only():
            program = torch.export.load(path)
        return _without_modes(program.module())
    # As with weights: what torch's reader raises on damaged bytes has no common type.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a model saved by torch.export.save: {type(error).__name__}: "
            f"{reason}. It is corrupt, holds more than tensors, or comes from another version of torch "
            f"({torch.__version__} here): export and save it again"
        ) from error


def _without_modes(module: nn.Module) -> nn.Module:
    """Let ``eval()`` pass: an exported program has one mode, built in, and torch makes the call raise."""
    for part in module.modules():
        part.training = False
    module.train = module.eval = MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
    return module


def _refuse_code(path: Path) -> None:
    """``torch.export.load`` unpickles such members, or loads them as compiled code, without asking."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is corrupt or cut short (not a whole zip archive): copy or export it again"
        ) from error
    for name in names:
        if any(part in name for part in ("opaque_obj", "custom_obj", "aotinductor/")):
            raise CheckpointError(
                f"{str(path)!r} holds {name!r}, an object or compiled code that would run on loading; "
                f"nothing of it was loaded. Export the model without custom objects: "
                f"torch.export.save(torch.export.export(...))"
            )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make every ``torch.load`` inside torch take only tensors: its pt2 reader asks for the opposite."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
