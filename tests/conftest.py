"""What all tests share: the device they run on, and properties without deadlines."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("bitsmith", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bitsmith")
warnings.filterwarnings("ignore", category=FutureWarning)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the device tests run on: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test that works anywhere puts its tensors."""
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: run with --device cpu")
    return torch.device(name)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real weights and images for measuring, which do not come with the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BITSMITH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}: set BITSMITH_DATA (see benchmarks/README.md)")
    return folder
