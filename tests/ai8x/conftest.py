"""The recorded cases of the original program, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ai8x_folder(data_folder) -> Path:
    folder = data_folder / "ai8x"
    if not folder.is_dir():
        pytest.skip(f"no recorded MAX78000 cases at {folder}")
    return folder
