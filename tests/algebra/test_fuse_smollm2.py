"""A real base: fused, it computes in both stock libraries what the adapter beside it computes."""

from __future__ import annotations

import numpy as np
import pytest

from loraduct.formats import base as base_folder
from loraduct.formats import read
from loraduct.validation import runtimes, survival
from loraduct.validation.parity import BASE_FACTOR, EFFECT_FACTOR, SAME_RUNTIME

pytestmark = pytest.mark.heavy


def logits(kind, folder, adapter=None):
    base = base_folder.read(folder)
    ids, _ = runtimes.tokenize(base, runtimes.PROMPTS[:2])
    return runtimes.run(kind, base, adapter, ids, 0).logits


def off(xs, ys):
    return max(float(np.abs(x - y).max()) for x, y in zip(xs, ys, strict=True))


@pytest.fixture(scope="module")
def real(repo):
    folder = repo / ".cache" / "smollm2-135m-instruct"
    if not folder.exists():
        pytest.skip("make demo makes the base")
    return folder


def test_fused_is_unfused(cli, repo, real, tmp_path):
    adapter = repo / "examples" / "reply"
    for dtype in ("f32", "keep"):
        done = cli("fuse", adapter, "--base", real, "-o", tmp_path / dtype, "--dtype", dtype)
        assert done.exit_code == 0, done.stderr
    unfused = logits("torch", real, read(adapter))
    bare = {kind: logits(kind, real) for kind in ("torch", "mlx")}
    effect = off(bare["torch"], unfused)
    assert effect > 1
    fused = {kind: logits(kind, tmp_path / "f32") for kind in ("torch", "mlx")}
    assert off(fused["torch"], unfused) <= SAME_RUNTIME
    across = max(BASE_FACTOR * off(bare["torch"], bare["mlx"]), EFFECT_FACTOR * effect)
    assert off(fused["mlx"], unfused) <= across
    halves = survival.effect(bare["torch"], unfused, logits("torch", tmp_path / "keep"))
    assert halves.cosine > 0.9999
    assert halves.kl < 1e-5
