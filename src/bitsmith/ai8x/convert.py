"""From one file to another: the job of ``bitsmith ai8x`` as a function."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .batch_norm import fuse_batch_norms
from .checkpoint import read_stored, write_checkpoint
from .network_layer import Notify
from .quantize import Options, Say, quantize_checkpoint, state_of

if TYPE_CHECKING:
    from .network import Network


def quantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options,
    network: Network | None = None,
    *,
    fuse_bn: bool = False,
    drop_optimizer: bool = False,
    say: Say | None = None,
    notify: Notify = lambda kind, text: None,
) -> None:
    """Quantize the training checkpoint ``source`` into the file ``output`` for the network loader.

    ``network`` (`bitsmith.ai8x.network.read_network`) may set the bits of layers; ``fuse_bn`` multiplies batch
    normalization into the layers before it; ``drop_optimizer`` leaves the optimizer's state out. ``notify`` gets
    warnings. Raises BitsmithError, and then ``output`` is as it was.

    >>> from bitsmith.ai8x import Options, find_device
    >>> quantize_file("best.pth.tar", "best-q.pth.tar", Options(find_device("MAX78000")))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    bitsmith.errors.CheckpointError: the checkpoint 'best.pth.tar' does not exist (looked in ...)
    """
    checkpoint = read_stored(source)
    if fuse_bn:
        checkpoint["state_dict"] = fuse_batch_norms(state_of(checkpoint), notify)
    result = quantize_checkpoint(checkpoint, options, network, say, notify)
    if drop_optimizer:
        result.pop("optimizer_state_dict", None)
        result.pop("optimizer_type", None)
    write_checkpoint(result, output)
