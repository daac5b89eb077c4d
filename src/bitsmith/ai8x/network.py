"""The network description of the MAX78000/MAX78002 tools: a YAML file with one entry per layer.

Keys, defaults and checks are those of the loader's file; the texts of the messages too, since users know them.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .devices import Device
from .network_layer import BINARY, INPUT, LAYER_KEYS, STOP, LayerReader, NetworkError, NetworkLayer, Notify, is_int

__all__ = [
    "BINARY",
    "INPUT",
    "STOP",
    "Network",
    "NetworkError",
    "NetworkLayer",
    "Notify",
    "parse_network",
    "read_network",
]

_TOP_KEYS = frozenset(["arch", "bias", "dataset", "layers", "output_map", "snoop", "unload", "weights"])


@dataclass(frozen=True)
class Network:
    """A network description; ``layers`` are in the order of their sequence numbers."""

    arch: str
    dataset: str
    layers: tuple[NetworkLayer, ...]
    settings: dict[str, Any]  # the file's top-level entries other than layers


def read_network(path: str | os.PathLike[str], device: Device, notify: Notify = lambda kind, text: None) -> Network:
    """Read and check the network description at ``path`` against ``device``.

    ``notify`` is told of every default that the loader warns of. Raises NetworkError.
    """
    return parse_network(_load(Path(path), os.fspath(path)), device, os.fspath(path), notify)


def parse_network(
    entries: Any, device: Device, name: str = "network.yaml", notify: Notify = lambda kind, text: None
) -> Network:
    """The network of ``entries``, the contents of a description called ``name``, as in `read_network`."""
    if not isinstance(entries, dict):
        entries = {}
    if unknown := set(entries) - _TOP_KEYS:
        raise NetworkError(f"Configuration file {name} contains unknown key(s): {_set(unknown)}.")
    if not {"layers", "arch", "dataset"} <= set(entries):
        raise NetworkError(f"Configuration file {name} does not contain `layers`, `arch`, or `dataset`.")
    if not isinstance(entries["layers"], list):
        raise NetworkError(f"Configuration file {name}: `layers` must be a list with one entry per layer.")
    layers: dict[int, NetworkLayer] = {}
    sequence = 0
    for entry in entries["layers"]:
        if not isinstance(entry, dict):
            raise NetworkError(f"Configuration file {name}: layer sequence {sequence} is not a mapping of keys.")
        if unknown := set(entry) - LAYER_KEYS:
            raise NetworkError(f"Configuration file {name} contains unknown key(s) for `layers`: {_set(unknown)}.")
        sequence = entry.get("sequence", sequence)
        if not is_int(sequence) or sequence < 0:
            raise NetworkError(f"Configuration file {name}: `sequence` must be an int from 0, not {sequence!r}.")
        reader = LayerReader(entry, sequence, notify)
        if sequence >= device.max_layers:
            reader.fail(f"This device supports up to {device.max_layers} layers")
        if sequence in layers:
            reader.fail("Layer was already specified")
        layers[sequence] = reader.read(device)
        sequence += 1
    ordered = tuple(layers[number] for number in sorted(layers))
    return Network(
        arch=str(entries["arch"]),
        dataset=str(entries["dataset"]),
        layers=_resolve(ordered, notify),
        settings={key: value for key, value in entries.items() if key != "layers"},
    )


def _resolve(layers: tuple[NetworkLayer, ...], notify: Notify) -> tuple[NetworkLayer, ...]:
    """``layers`` with the names in their references replaced by sequence numbers."""
    numbers: dict[str, int] = {}
    for layer in layers:
        if layer.name is not None:
            name = layer.name.lower()
            trouble = "Using reserved name" if name in ("stop", "input") else "Duplicate layer name"
            if name in ("stop", "input", *numbers):
                LayerReader({}, layer.sequence, notify).fail(f"{trouble} {layer.name} for `name`")
            numbers[name] = layer.sequence

    def number(layer: NetworkLayer, key: str, value: Any, **words: int) -> int:
        found = value if is_int(value) else (words | numbers).get(str(value).lower())
        if found is None:
            raise NetworkError(
                f"Could not find the `{key}` layer name `{str(value).lower()}` in layer sequence "
                f"{layer.sequence} of the YAML configuration file."
            )
        return int(found)

    resolved = []
    for position, layer in enumerate(layers):
        if layer.pooling is not None and "pool_stride" not in layer.settings:
            notify("WARNING", f"Using default pool stride of 1 in layer {position}.")
        changes: dict[str, Any] = {}
        if layer.in_sequences is not None:
            values = layer.in_sequences if isinstance(layer.in_sequences, list) else [layer.in_sequences]
            changes["in_sequences"] = tuple(number(layer, "in_sequences", value, input=INPUT) for value in values)
        if layer.next_sequence is not None:
            changes["next_sequence"] = number(layer, "next_sequence", layer.next_sequence, stop=STOP)
        if layer.weight_source is not None:
            changes["weight_source"] = number(layer, "weight_source", layer.weight_source)
        resolved.append(replace(layer, **changes))
    return tuple(resolved)


def _set(keys: set[Any]) -> str:
    return "{" + ", ".join(sorted(map(repr, keys))) + "}"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, where plain YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise NetworkError(f"Found unacceptable key while constructing a mapping {node.start_mark}")
            if key in mapping:
                raise NetworkError(f"Found duplicate key {key} while constructing a mapping {node.start_mark}")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


def _load(path: Path, name: str) -> Any:
    """What the file holds; tags that would make Python objects are refused."""
    if not path.exists():
        raise NetworkError(f"YAML configuration file {name} does not exist!")
    try:
        with path.open(encoding="utf-8") as stream:
            return yaml.load(stream, Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NetworkError(f"YAML configuration file {name} is not valid YAML: {reason}") from error
    except OSError as error:
        raise NetworkError(f"YAML configuration file {name} cannot be read: {error.strerror}") from error
