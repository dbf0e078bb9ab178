"""The trained example adapters merged by every method, run by stock PEFT and stock mlx-lm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loraduct.cli import main

pytestmark = pytest.mark.heavy
os.environ.setdefault("HF_HUB_OFFLINE", "1")

METHODS: dict[str, list[object]] = {
    "cat": [],
    "linear": [],
    "svd": ["--rank", 8],
    "ties": ["--rank", 8, "--density", 0.5],
    "dare": ["--rank", 8, "--density", 0.7, "--seed", 1],
    "dare-ties": ["--rank", 8, "--density", 0.7, "--seed", 1],
    "magnitude": ["--rank", 8, "--density", 0.3],
    "peft-cat": [],
    "peft-svd": ["--rank", 8],
    "peft-linear": [],
    "peft-ties": ["--density", 0.5],
    "peft-dare-linear": ["--density", 0.7, "--seed", 1],
    "peft-dare-ties": ["--density", 0.7, "--seed", 1],
    "peft-magnitude-prune": ["--density", 0.3],
}
EQUAL_RANKS = [m for m in METHODS if m.startswith("peft-") and m not in ("peft-cat", "peft-svd")]
TOKENS = np.array([[504, 2780, 553, 719, 5030, 288, 7254, 1155, 338, 260, 2180, 314]])


EXACT = ("cat", "linear", "peft-cat")
WEIGHTS = (0.6, 0.4)


def by_torch(base: Path, *given: tuple[Path, float]) -> Any:
    """Logits by transformers, with these adapters active together in stock PEFT, each weighted."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [f"a{i}" for i in range(len(given))]
    for i, (folder, _) in enumerate(given):
        if i == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name=names[0])
        else:
            model.load_adapter(folder, adapter_name=names[i])
    if given:
        model.base_model.set_adapter(names)
    for scaling in (getattr(m, "scaling", None) for m in model.modules()):
        for name, (_, weight) in zip(names, given, strict=True):
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= weight
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits[0].double().numpy()


def by_mlx(base: Path, folder: Path | None) -> Any:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    if folder is not None:
        load_adapters(model, str(folder))
    model.set_dtype(mx.float32)
    return np.array(model.eval()(mx.array(TOKENS))[0].astype(mx.float32)).astype(np.float64)


def cosine(x: Any, y: Any) -> float:
    """Of two effects on logits; softmax does not see a position's mean."""
    x, y = (z - z.mean(-1, keepdims=True) for z in (x, y))
    return float(np.vdot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.fixture(scope="module")
def base(repo: Path) -> Path:
    folder = repo / ".cache" / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        pytest.skip("the real base is not there: run make demo")
    return folder


@pytest.fixture(scope="module")
def bare(base: Path) -> dict[str, Any]:
    """The base's logits in either runtime."""
    return {"torch": by_torch(base), "mlx": by_mlx(base, None)}


@dataclass(frozen=True)
class Pair:
    """Two adapters, what PEFT computes more with both than with none (weighted), and with either
    alone; ``exact``: their sum as an adapter."""

    folders: tuple[Path, Path]
    both: Any
    alone: tuple[Any, Any]
    exact: Path


@pytest.fixture(scope="module")
def pairs(
    repo: Path, base: Path, bare: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Pair]:
    """Of the trained pair as it is, or at equal ranks, which PEFT's formulas need."""
    made: dict[bool, Pair] = {}

    def get(equal: bool) -> Pair:
        if equal not in made:
            home = tmp_path_factory.mktemp("pair")
            one, two = (repo / "examples" / n for n in ("summary", "reply"))
            if equal:
                ran("resize", one, "--rank", 4, "-o", home / "summary")
                one = home / "summary"
            given = list(zip((one, two), WEIGHTS, strict=True))
            ran("merge", one, two, "--weights", "0.6,0.4", "--method", "cat", "-o", home / "exact")
            none = bare["torch"]
            first, second = (by_torch(base, g) - none for g in given)
            both = by_torch(base, *given) - none
            made[equal] = Pair((one, two), both, (first, second), home / "exact")
        return made[equal]

    return get


def ran(*words: object) -> str:
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_both(
    base: Path, tmp_path: Path, bare: dict[str, Any], pairs: Callable[[bool], Pair], method: str
) -> None:
    """The merged adapter has the effect of both adapters together, in both runtimes.

    Exact methods: it is what PEFT computes with both active. Of the others ``diff`` says how near
    their update is to the exact sum (cosine, over all weights); the effect is to be as near at
    least, and nearer to that of both than to that of either alone: one left out would not be.
    """
    pair = pairs(method in EQUAL_RANKS)
    out, other = tmp_path / "out", tmp_path / "mlx"
    ran("merge", *pair.folders, "--weights", "0.6,0.4", "--method", method, *METHODS[method],
        "-o", out)  # fmt: skip
    ran("convert", out, "--to", "mlx", "--base", base, "-o", other)
    near = json.loads(ran("diff", out, pair.exact, "--json"))["cosine"]
    found = {"torch": by_torch(base, (out, 1.0)) - bare["torch"]}
    found["mlx"] = by_mlx(base, other) - bare["mlx"]
    size = float(np.abs(bare["torch"]).max())
    assert np.abs(found["mlx"] - found["torch"]).max() < 2e-3 * size
    for runtime, effect in found.items():
        assert np.isfinite(effect).all()
        kept, alone = cosine(effect, pair.both), [cosine(effect, e) for e in pair.alone]
        print(f"{method} in {runtime}: {kept:.4f} of both (dW {near:.4f}), of either {alone}")
        if method in EXACT:
            assert near == pytest.approx(1, abs=1e-6)
            bound = {"torch": 1e-5, "mlx": 2e-3}[runtime]
            assert np.abs(effect - pair.both).max() < bound * size
        assert kept >= near - 1e-5  # of which the float32 logits are good
        assert kept > max(alone)
    for one, two in (pair.alone, pair.alone[::-1]):  # what the last line is worth
        assert cosine(one, pair.both) < cosine(one, one) - 0.05
        assert cosine(two, one) < 0.5


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_real_sums_in_float64(cli: Any, repo: Path, tmp_path: Path, method: str) -> None:
    """Every module of the real pair against the dense sum: 1e-6, or the optimum of the rank."""
    from loraduct.formats import read

    pair = [repo / "examples" / n for n in ("summary", "reply")]
    rank = [] if method != "svd" else ["--rank", 6]
    done = cli(
        "merge", *pair, "--weights", "0.6,-0.4", "--method", method, *rank, "-o", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    merged, *each = (read(f).low_rank for f in (tmp_path / "o", *pair))
    assert len(merged) == 210
    for module, u in merged.items():
        wanted = sum(
            w * x[module].scale * (x[module].b.read().astype(np.float64) @ x[module].a.read())
            for x, w in zip(each, (0.6, -0.4), strict=True)
            if module in x
        )
        found = u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        off, size = float(np.linalg.norm(found - wanted)), float(np.linalg.norm(wanted))
        if method != "svd":
            assert off < 1e-6 * size, module
        elif "v_proj" in module and ".1" in module:
            best = float((np.linalg.svd(wanted, compute_uv=False)[6:] ** 2).sum() ** 0.5)
            assert off == pytest.approx(best, rel=1e-6, abs=2e-7 * size), module
