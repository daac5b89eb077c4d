"""``bitsmith ai8x-inspect``: the table of a quantized checkpoint, and what the loader would say to it."""

from __future__ import annotations

import argparse
import json

from ..errors import BitsmithError
from .console import tell
from .devices import Device, UnknownDeviceError, find_device
from .inspect import Inspection, LayerView, inspect_checkpoint


def main(words: list[str]) -> int:
    """``bitsmith ai8x-inspect WORDS``; the exit status: 0 the loader takes the file, 1 it does not, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="bitsmith ai8x-inspect",
        description="Show what the MAX78000/MAX78002 get of a quantized checkpoint, and check it as the loader does.",
        epilog="Exit status: 0 the loader takes the file, 1 it does not, 2 wrong usage.",
    )
    parser.add_argument("file", help="path to the quantized checkpoint file")
    parser.add_argument(
        "-c", "--config-file", metavar="S", help="the loader's YAML file: the layers are checked with it"
    )
    parser.add_argument(
        "--device", type=_device, default="MAX78000", metavar="N", help="MAX78000 (default) or MAX78002"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(words)
    try:
        from .checkpoint import read_stored

        network = None
        if arguments.config_file:
            from .network import read_network

            network = read_network(arguments.config_file, arguments.device)
        found = inspect_checkpoint(read_stored(arguments.file), arguments.device, network)
    except BitsmithError as error:
        tell("ERROR", str(error))
        return 1
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else table(found))
    return 1 if found.errors else 0


def _device(name: str) -> Device:
    try:
        return find_device(name)
    except UnknownDeviceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def table(found: Inspection) -> str:
    """The inspection as text."""
    columns = ("layer", "shape", "bits", "shift", "weights", "bias", "bytes", "of chip", "dead", "saturated")
    memory = found.device.weight_memory
    rows = [columns, *(_row(layer, memory) for layer in found.layers)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    epoch = "unknown" if found.epoch is None else found.epoch
    used = f"{found.weight_bytes:,} bytes{_share(found.weight_bytes, memory)}"
    biases = f"{found.bias_bytes:,} bytes{_share(found.bias_bytes, found.device.bias_memory)}"
    lines = [
        f"{found.arch or 'unknown architecture'}, epoch {epoch}, for {found.device.name}",
        "",
        *(_line(row, widths) for row in rows),
        "",
        f"{len(found.layers)} layers; weights {used}, biases {biases}",
        *(f"warning: {text}" for text in found.warnings),
        *(f"error: {text}" for text in found.errors),
        "The loader does not take this file." if found.errors else "The loader takes this file.",
    ]
    return "\n".join(lines)


def _row(layer: LayerView, memory: int | None) -> tuple[str, ...]:
    return (
        layer.key.removesuffix(".weight"),
        "x".join(map(str, layer.shape)),
        "binary" if layer.bits < 0 else str(layer.bits),
        f"{layer.output_shift:+d}" if layer.output_shift else "0",
        f"{layer.minimum} to {layer.maximum}",
        "" if layer.bias is None else f"{layer.bias[0]} to {layer.bias[1]}",
        f"{layer.weight_bytes:,}",
        "" if not memory else f"{layer.weight_bytes / memory:.1%}",
        f"{layer.dead_channels} of {layer.channels}",
        f"{layer.saturated_channels} ({layer.saturated_weights:.1%})",
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _share(used: int, memory: int | None) -> str:
    return "" if not memory else f" ({used / memory:.1%} of the chip's {memory:,})"
