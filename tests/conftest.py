"""Settings for all tests: offline, no progress bars, and small folders to work on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout under test."""
    return REPO


SLOW = ("latency", "swap")  # suites that run models for seconds, which few tests are about


@pytest.fixture
def every_suite() -> None:
    """For tests in which ``validate`` without --suite does all that it can, as for users."""


@pytest.fixture(autouse=True)
def usual_suites(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``validate`` without --suite leaves out the slow suites, unless a gate or option needs them."""
    if "every_suite" in request.fixturenames:
        return
    from loraduct.validation import suites
    from loraduct.validation.thresholds import THRESHOLDS

    run = suites._one

    def one(name: str, context: suites.Context) -> suites.Suite:
        gates = {g for g, t in THRESHOLDS.items() if t.suite == name}
        needed = name in context.wanted or gates & context.given
        needed = needed or (name == "swap" and context.beside)
        if name not in SLOW or needed:
            return run(name, context)
        return suites.Suite(name, "skipped", "left out in tests")

    monkeypatch.setattr(suites, "_one", one)


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run the command line in this process: ``cli("inspect", path)`` gives click's Result."""
    from click.testing import CliRunner

    from loraduct.cli import main

    def run(*args: object) -> Any:
        return CliRunner().invoke(main, [str(a) for a in args])

    return run


@pytest.fixture
def peft_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a small PEFT folder with the safetensors library: ``peft_folder(r=4, **config)``."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    def make(
        name: str = "peft",
        *,
        ranks: dict[str, int] | None = None,
        dtype: str = "float32",
        layers: int = 2,
        extra: dict[str, Any] | None = None,
        **config: Any,
    ) -> Path:
        rng = np.random.default_rng(7)
        shapes = {
            "self_attn.q_proj": (24, 16),
            "self_attn.v_proj": (8, 16),
            "mlp.up_proj": (40, 16),
        }
        tensors = {}
        for layer in range(layers):
            for module, (out, inner) in shapes.items():
                r = (ranks or {}).get(module, config.get("r", 4))
                stem = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(r, inner)).astype(dtype)
                tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(out, r)).astype(dtype)
                if config.get("use_dora"):
                    tensors[f"{stem}.lora_magnitude_vector"] = rng.uniform(1, 2, out).astype(dtype)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors | (extra or {}), folder / "adapter_model.safetensors", {"format": "pt"})
        full = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "some/base",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(full | config))
        return folder

    return make
