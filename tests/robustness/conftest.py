"""Fixtures of the robustness tests; what they hold is in kit.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import configuration

pytest.register_assert_rewrite("kit")

from kit import Folder, Kit, build  # noqa: E402


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Helpers that hold no state."""
    return Kit()


@pytest.fixture
def peft(tmp_path: Path) -> Folder:
    """A valid PEFT folder, saved."""
    return build("peft", tmp_path / "src").save()


@pytest.fixture
def mlx(tmp_path: Path) -> Folder:
    """A valid MLX folder, saved."""
    return build("mlx", tmp_path / "src").save()


@pytest.fixture(params=["peft", "mlx"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A valid folder of each kind, saved."""
    return build(request.param, tmp_path / "src").save()


@pytest.fixture(scope="session", autouse=True)
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep hypothesis from writing a .hypothesis folder where the tests run."""
    before = os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY")
    configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    yield
    configuration.set_hypothesis_home_dir(before)
