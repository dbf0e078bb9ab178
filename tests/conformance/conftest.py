"""Fixtures of the conformance tests: tiny bases, stock peers, and our command line.

The peers' libraries are imported only where a test asks for the fixture `peers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import tuners as _tuners
import zoo as _zoo

HERE = Path(__file__).parent
VARIANTS = ("lora", "rslora", "dora", "patterns")
MIXED = ("rslora-patterns", "dora-patterns")
MIXED_ON = ("llama", "phi3", "qwen2", "starcoder2")


@pytest.fixture(autouse=True, scope="session")
def _peers_here() -> None:
    """Skip without the stock libraries; keep their progress bars and advice quiet.

    Models this small run several times faster on one thread than on more.
    """
    for name in ("torch", "peft", "mlx.core", "mlx_lm", "safetensors"):
        pytest.importorskip(name, reason="the conformance tests need the stock peers")
    import torch

    torch.set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    return _zoo


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    import peers

    return peers


@pytest.fixture(params=sorted(_zoo.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every model type of the zoo in turn."""
    return str(request.param)


@pytest.fixture(params=VARIANTS + MIXED)
def variant(request: pytest.FixtureRequest) -> str:
    """Every kind of PEFT adapter in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """tiny("llama") -> the tiny base of that type, built once per session."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = _zoo.build(name, tmp_path_factory.mktemp("base") / name)
        return built[name]

    return get


@pytest.fixture(scope="session")
def base_logits(tiny: Callable[[str], Any], peers: ModuleType) -> Callable[[str], np.ndarray]:
    """base_logits("llama") -> what the unadapted base answers, by transformers."""
    known: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in known:
            known[name] = peers.torch_logits(peers.hf_base(tiny(name).path), _zoo.TOKENS)
        return known[name]

    return get


@dataclass(frozen=True)
class Trained:
    """An adapter as a stock library saved it, and what that library answers with it."""

    path: Path
    logits: np.ndarray
    base: Any


@pytest.fixture(scope="session")
def peft_adapter(
    tiny: Callable[[str], Any], peers: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Trained]:
    """peft_adapter("llama", "rslora"), built once per session; tests must not change it."""
    built: dict[tuple[str, str], Trained] = {}

    def get(name: str, variant: str) -> Trained:
        if (name, variant) not in built:
            base = tiny(name)
            path = tmp_path_factory.mktemp("peft") / f"{name}-{variant}"
            config = peers.variant(variant, base.targets)
            logits = peers.save_peft(base.path, path, config, _zoo.TOKENS)
            built[name, variant] = Trained(path, logits, base)
        return built[name, variant]

    return get


@pytest.fixture(
    params=[
        *((name, variant) for name in sorted(_zoo.ARCHITECTURES) for variant in VARIANTS),
        *((name, variant) for name in MIXED_ON for variant in MIXED),
    ],
    ids="-".join,
)
def trained(request: pytest.FixtureRequest, peft_adapter: Callable[[str, str], Trained]) -> Trained:
    """A PEFT adapter of every kind on every model type."""
    return peft_adapter(*request.param)


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str
    path: Path

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture
def run() -> Callable[..., Any]:
    """Call the command line in this process: run("convert", SRC, "--to", "mlx")."""
    from click.testing import CliRunner

    from loraduct.cli import main

    def call(*words: object) -> Any:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def attempt(run: Callable[..., Any], tmp_path: Path) -> Callable[..., Outcome]:
    """Convert into a new folder and tell how it went; the caller judges."""
    count = 0
    (tmp_path / "converted").mkdir()

    def call(source: Path, to: str, *options: object) -> Outcome:
        nonlocal count
        count += 1
        path = tmp_path / "converted" / f"{count}-{to}"
        result = run("convert", source, "--to", to, "-o", path, *options)
        return Outcome(result.exit_code, result.stdout, result.stderr, path)

    return call


@pytest.fixture
def convert(attempt: Callable[..., Outcome]) -> Callable[..., Path]:
    """Convert into a new folder, which must work."""

    def call(source: Path, to: str, *options: object) -> Path:
        outcome = attempt(source, to, *options)
        assert outcome.code == 0, outcome.text
        return outcome.path

    return call


@pytest.fixture
def refused(attempt: Callable[..., Outcome]) -> Callable[..., str]:
    """Convert something that must be refused: exit 1, these words said, nothing written."""

    def call(source: Path, to: str, *options: object, saying: str) -> str:
        before = sorted(path.name for path in source.parent.iterdir())
        outcome = attempt(source, to, *options)
        assert outcome.code == 1, f"exit {outcome.code}: {outcome.text}"
        assert saying.lower() in outcome.err.lower(), outcome.err
        assert list(outcome.path.parent.iterdir()) == []
        assert sorted(path.name for path in source.parent.iterdir()) == before
        return outcome.err

    return call


@pytest.fixture
def train(
    tiny: Callable[[str], Any], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> Callable[..., Path]:
    """train(["q_proj"], r=4, ...) -> a folder saved by stock PEFT on the tiny llama."""

    def make(targets: Any = ("q_proj",), base: str = "llama", **options: Any) -> Path:
        path = tmp_path / "peft"
        config = targets if hasattr(targets, "peft_type") else peers.lora(targets, **options)
        peers.save_peft(tiny(base).path, path, config, zoo.TOKENS)
        return path

    return make


@pytest.fixture
def saved(
    tiny: Callable[[str], Any], peers: ModuleType, tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """saved(kind, number) -> (the folder stock PEFT saved, the base's)."""
    import torch
    from peft import get_peft_model

    def make(kind: str, number: int = 0, config: Any = None) -> tuple[Path, Path]:
        on = _tuners.CASES[kind][number].get("on", "llama") if config is None else "llama"
        torch.manual_seed(0)
        model = get_peft_model(
            peers.hf_base(tiny(on).path), config or _tuners.config_of(kind, number)
        )
        _tuners.randomise(model)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", tiny(on).path

    return make
