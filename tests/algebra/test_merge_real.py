"""The trained example adapters merged by every method, run by stock PEFT and stock mlx-lm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def by_torch(base: Path, folder: Path | None) -> Any:
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits[0].double().numpy()


def by_mlx(base: Path, folder: Path) -> Any:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    load_adapters(model, str(folder))
    model.set_dtype(mx.float32)
    return np.array(model.eval()(mx.array(TOKENS))[0].astype(mx.float32)).astype(np.float64)


@pytest.fixture(scope="module")
def base(repo: Path) -> Path:
    folder = repo / ".cache" / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        pytest.skip("the real base is not there: run make demo")
    return folder


@pytest.fixture(scope="module")
def effects(repo: Path, base: Path) -> tuple[Any, dict[str, Any]]:
    """Logits of the base, and what either adapter alone adds to them."""
    bare = by_torch(base, None)
    return bare, {n: by_torch(base, repo / "examples" / n) - bare for n in ("summary", "reply")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_both(
    cli: Any, repo: Path, base: Path, tmp_path: Path, effects: Any, method: str
) -> None:
    """The merged effect has something of either adapter's, and is the same in both runtimes."""
    pair = [repo / "examples" / "summary", repo / "examples" / "reply"]
    if method in EQUAL_RANKS:
        assert cli("resize", pair[0], "--rank", 4, "-o", tmp_path / "summary").exit_code == 0
        pair[0] = tmp_path / "summary"
    out, other = tmp_path / "out", tmp_path / "mlx"
    done = cli("merge", *pair, "--weights", "0.6,0.4", "--method", method, *METHODS[method],
               "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    done = cli("convert", out, "--to", "mlx", "--base", base, "-o", other)
    assert done.exit_code == 0, done.output
    bare, alone = effects
    found = by_torch(base, out) - bare
    assert np.isfinite(found).all()
    size = float(np.linalg.norm(found))
    cosines = {n: float(np.vdot(found, e) / (size * np.linalg.norm(e))) for n, e in alone.items()}
    share = {n: size / float(np.linalg.norm(e)) for n, e in alone.items()}
    print(f"{method}: size over each {share}, cosine with each {cosines}")
    assert max(cosines.values()) > 0.2
    assert np.abs(by_mlx(base, other) - bare - found).max() < 2e-3 * np.abs(bare).max()


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_real_sums_in_float64(cli: Any, repo: Path, tmp_path: Path, method: str) -> None:
    """Every module of the real pair against the dense sum: 1e-6, or the optimum of the rank."""
    from loraduct.formats import read

    pair = [repo / "examples" / n for n in ("summary", "reply")]
    rank = [] if method == "cat" else ["--rank", 6]
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
        if method == "cat":
            assert off < 1e-6 * size, module
        elif "v_proj" in module and ".1" in module:
            best = float((np.linalg.svd(wanted, compute_uv=False)[6:] ** 2).sum() ** 0.5)
            assert off == pytest.approx(best, rel=1e-6, abs=2e-7 * size), module
