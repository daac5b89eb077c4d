"""``import bitsmith`` costs next to nothing and offers what the documentation names."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import ModuleType

import pytest

import bitsmith


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", bitsmith._PUBLIC)
def test_public_names_are_classes_and_functions_with_a_docstring(name: str) -> None:
    value = getattr(bitsmith, name)
    assert not isinstance(value, ModuleType)
    assert inspect.isclass(value) == name[0].isupper()
    assert callable(value)
    assert value.__name__ == name
    assert value.__module__.startswith("bitsmith.")
    assert len(inspect.getdoc(value) or "") > 20
    assert name in dir(bitsmith)
    assert name in bitsmith.__all__


def test_public_names_stay_what_they_are_when_their_folders_are_imported() -> None:
    """``bitsmith.verify`` is a function and a folder."""
    for first in (
        "import bitsmith.verify",
        "from bitsmith.verify import engines",
        "import bitsmith; bitsmith.verify",
    ):
        code = (
            f"{first}\nimport json, bitsmith, bitsmith.export, bitsmith.targets, bitsmith.recipe\n"
            "print(json.dumps({n: type(getattr(bitsmith, n)).__name__ for n in bitsmith._PUBLIC}))"
        )
        kinds = json.loads(fresh(code))
        assert "module" not in kinds.values()
        assert kinds["verify"] == "function"


def test_importing_loads_nothing_but_the_standard_library() -> None:
    """torch and numpy would be allowed; not even they are needed."""
    code = "import sys; before = set(sys.modules); import bitsmith; print(*sorted(set(sys.modules) - before))"
    tops = {name.split(".")[0] for name in fresh(code).split()}
    heavy = tops - {"bitsmith", "torch", "numpy"} - set(sys.stdlib_module_names)
    assert heavy == set()


def test_quantizing_loads_no_exporter_and_no_runtime() -> None:
    code = (
        "import sys, torch, bitsmith as bs\n"
        "bs.quantize(torch.nn.Linear(4, 2), [torch.randn(8, 4)])\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = set(fresh(code).split())
    assert not loaded & {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "typer",
        "rich",
        "PIL",
        "sklearn",
        "torchvision",
    }


def test_a_name_that_is_none_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'bitsmith' has no attribute 'quantise'"):
        bitsmith.quantise  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert bitsmith.__version__ == version("bitsmith")
