"""The devices and runtimes that Bitsmith knows, one row each."""

from ..errors import RecipeError
from .max78000 import MAX78000, MAX78002
from .target import ChipLimits, Target, TidlDevice
from .tidl import TIDL_TARGETS

_COMPUTE = {"conv", "linear", "matmul"}
_RESCALE = {"add", "mul", "cat", "avg_pool", "global_avg_pool", "sigmoid", "leaky_relu"}

_TARGETS = {
    target.name: target
    for target in (
        Target(
            name="onnxruntime",
            description="ONNX Runtime on x86-64 CPUs (QDQ files; QLinear kernels)",
            engine="onnxruntime",
            integer_operators=frozenset(_COMPUTE | _RESCALE),
            float_output=frozenset({"linear", "matmul"}),
            float_on_codes=frozenset({"conv", "conv_transpose"}),
            unsigned_codes=True,
            exact=True,
            notes=(
                (
                    "Measured on onnxruntime 1.31 with AVX-512 VNNI. CPUs without VNNI saturate pairs of u8 x s8 "
                    "products in 16 bits, so that results there can differ from the law."
                ),
                (
                    "Transposed convolutions and those whose output stays float run in float32 on the codes "
                    "themselves, which is exact; other widths than 8 bits run in float between Q and DQ."
                ),
            ),
        ),
        Target(
            name="openvino",
            description="OpenVINO on x86-64 CPUs (reads the same QDQ files)",
            engine="openvino",
            integer_operators=frozenset(_COMPUTE | _RESCALE | {"conv_transpose"}),
            float_output=frozenset({"linear", "matmul", "conv"}),
            unsigned_codes=True,
            notes=("OpenVINO chooses its own rounding when it fuses; results are held to a bound, not to the bit.",),
        ),
        Target(
            name="torch",
            description="PyTorch on x86-64 CPUs (TorchScript files and engine 'torch'; oneDNN and FBGEMM kernels)",
            engine="torch",
            integer_operators=frozenset(_COMPUTE - {"matmul"} | _RESCALE | {"conv_transpose", "hardswish", "elu"}),
            integer_bits=tuple(range(2, 9)),
            float_output=frozenset({"linear", "conv"}),
            unsigned_codes=True,
            exact=True,
            law="torch",
            per_tensor=frozenset({"conv_transpose"}),
            notes=(
                (
                    "Measured on torch 2.13 with AVX-512 VNNI. CPUs without VNNI saturate pairs of u8 x s8 products in "
                    "16 bits, so that results there can differ from the law."
                ),
                "Products of two activations, and transposed convolutions with a scale per channel, run in float.",
            ),
        ),
        Target(
            name="generic",
            description="Any integer accelerator of 2 to 16 bits with rescaling adds (simulated; no runtime)",
            engine="none",
            integer_operators=frozenset(_COMPUTE | _RESCALE | {"conv_transpose"}),
            integer_bits=tuple(range(2, 17)),
            float_output=frozenset({"linear", "matmul", "conv", "conv_transpose"}),
            accumulator_bits=64,
        ),
        MAX78000,
        MAX78002,
        *TIDL_TARGETS,
    )
}


def get_target(target: str | Target) -> Target:
    """A Target by name, or itself.

    >>> get_target("onnxruntime").unsigned_codes
    True
    """
    if isinstance(target, Target):
        return target
    if target not in _TARGETS:
        raise RecipeError(f"no target is called {target!r}: known are {', '.join(_TARGETS)}")
    return _TARGETS[target]


def list_targets() -> list[Target]:
    """All targets that Bitsmith knows, in the order in which they are listed."""
    return list(_TARGETS.values())


__all__ = ["ChipLimits", "Target", "TidlDevice", "get_target", "list_targets"]
