"""``bitsmith ai8x``: the command line of ai8x-synthesis' ``quantize.py``."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass

from ..errors import BitsmithError
from .console import tell
from .convert import quantize_file
from .devices import Device, UnknownDeviceError, find_device
from .quantize import CLIP_METHODS, DEFAULT_SCALE, DEFAULT_STDDEV, Options, QuantizeError

PROGRAM = "bitsmith ai8x"
ORIGINAL = "quantize.py"
_OWN_FLAGS = ("--compat", "--fuse-bn", "--drop-optimizer")

_USAGE = (
    "usage: {program} [-h] [-c S] --device N [--clip-method {{AVGMAX,MAX,STDDEV,SCALE}}] "
    "[--qat-weight-bits QAT_WEIGHT_BITS] [-v] [--scale SCALE] [--stddev STDDEV] input output\n"
)
_HELP = """
Checkpoint to MAX78000 Quantization

positional arguments:
  input                 path to the checkpoint file
  output                path to the output file

optional arguments:
  -h, --help            show this help message and exit
  -c S, --config-file S
                        optional YAML configuration file containing layer configuration
  --device N            set device
  --clip-method {AVGMAX,MAX,STDDEV,SCALE}
                        disable quantization-aware training (QAT) information and choose saturation clipping method
  --qat-weight-bits QAT_WEIGHT_BITS
                        override number of weight bits used in QAT
  -v, --verbose         verbose mode
  --scale SCALE         set the scale value for the SCALE method (default: magic 0.85)
  --stddev STDDEV       set the number of standard deviations for the STDDEV method (default: 2.00)
"""
_OWN_HELP = """
arguments that quantize.py does not have (not abbreviated):
  --compat              write and say exactly what quantize.py does, also where it is wrong
  --fuse-bn             fuse batch normalization into the layers before it
  --drop-optimizer      leave out the optimizer's state, which the loader does not read
"""


@dataclass(frozen=True)
class Arguments:
    """The command line, parsed."""

    input: str
    output: str
    config_file: str | None
    verbose: bool
    fuse_bn: bool
    drop_optimizer: bool
    options: Options


class _Parser(argparse.ArgumentParser):
    """Prints the original's texts, which argparse words and wraps differently from one Python to the next."""

    def format_usage(self) -> str:
        return _USAGE.format(program=self.prog)

    def format_help(self) -> str:
        return self.format_usage() + _HELP + (_OWN_HELP if self.prog != ORIGINAL else "")


def parse(arguments: list[str]) -> Arguments:
    """Parse the command line; wrong usage ends the process with status 2, as argparse does."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = {flag for flag in _OWN_FLAGS if flag in arguments[:end]}
    rest = [word for word in arguments[:end] if word not in own] + arguments[end:]
    compat = "--compat" in own
    parser = _Parser(prog=ORIGINAL if compat else PROGRAM)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("-c", "--config-file")
    parser.add_argument("--device", type=_device, required=True)
    parser.add_argument("--clip-method", type=_clip_method)
    parser.add_argument("--qat-weight-bits", type=int)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--stddev", type=float)
    found = parser.parse_args(rest)
    return Arguments(
        input=found.input,
        output=found.output,
        config_file=found.config_file,
        verbose=found.verbose,
        fuse_bn="--fuse-bn" in own,
        drop_optimizer="--drop-optimizer" in own,
        options=Options(
            device=found.device,
            clip_method=found.clip_method,
            qat_weight_bits=found.qat_weight_bits,
            scale=_or_default("SCALE", found.clip_method, found.scale),
            stddev=_or_default("STDDEV", found.clip_method, found.stddev),
            compat=compat,
        ),
    )


def _device(name: str) -> Device:
    try:
        return find_device(name)
    except UnknownDeviceError:
        raise argparse.ArgumentTypeError(name, "is not a supported device type") from None


def _clip_method(name: str) -> str:
    if name not in CLIP_METHODS:
        choices = ", ".join(map(repr, CLIP_METHODS))
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {choices})")
    return name


def _or_default(method: str, chosen: str | None, given: float | None) -> float:
    """The number for the clip method ``method``; not given, or 0, is the default, with a warning if it counts."""
    what, default = {
        "SCALE": ("scale factor", DEFAULT_SCALE),
        "STDDEV": ("number of standard deviations", DEFAULT_STDDEV),
    }[method]
    if given:
        return given
    if chosen == method:
        tell("WARNING", f"Using the default {what} of {default:.2f}.\n")
    return default


def run(arguments: Arguments) -> None:
    """Say what is done, and do it."""
    options = arguments.options
    print("Configuring device:", options.device.name)
    network = None
    if arguments.config_file:
        from .network import read_network

        print(f"Reading {arguments.config_file} to configure network...")
        network = read_network(arguments.config_file, options.device, tell)
    print("Converting checkpoint file", arguments.input, "to", arguments.output)
    quantize_file(
        arguments.input,
        arguments.output,
        options,
        network,
        fuse_bn=arguments.fuse_bn,
        drop_optimizer=arguments.drop_optimizer,
        say=print if arguments.verbose else None,
        notify=tell,
    )


def main(words: list[str]) -> int:
    """``bitsmith ai8x WORDS``; the exit status: 0 done or interrupted, 1 an error, 2 (SystemExit) wrong usage."""
    arguments = parse(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in a file may be anything
    try:
        run(arguments)
    except QuantizeError as error:
        return _failed(str(error), error.original if arguments.options.compat else None)
    except BitsmithError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return 0
    except MemoryError:
        return _failed(f"{arguments.input!r} needs more memory than there is.")
    except RecursionError:
        return _failed(f"{arguments.input!r} is nested deeper than any training checkpoint.")
    return 0


def _failed(message: str, original: str | None = None) -> int:
    if original is None:
        tell("ERROR", message)
    else:
        sys.stdout.flush()
        print(original, file=sys.stderr)
    return 1
