"""A real base: fused, it computes in both stock libraries what the adapter beside it computes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loraduct.formats import base as base_folder
from loraduct.formats import read
from loraduct.validation import runtimes
from loraduct.validation.effect import effect as effect_of
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
    halves = effect_of(bare["torch"], unfused, logits("torch", tmp_path / "keep"))
    assert halves.cosine > 0.9999
    assert halves.kl < 1e-5


def test_a_package_fused_is_unfused(cli, repo, real, tmp_path):
    """In 16 bits as stock PEFT computes; in int8 most of the effect, where codes make up for errors."""
    adapter = repo / "examples" / "reply"
    plain, small = tmp_path / "plain.mlpackage", tmp_path / "int8.mlpackage"
    for words in (
        ("package", "--base", real, "-o", plain),
        ("compress", plain, "-o", small, "--quantize", "int8"),
        ("fuse", adapter, "--base", plain, "-o", tmp_path / "out.mlpackage"),
    ):
        done = cli(*words)
        assert done.exit_code == 0, done.stderr
    ids, _ = runtimes.tokenize(base_folder.read(real), runtimes.PROMPTS[:2])
    bare, unfused = logits("torch", real), logits("torch", real, read(adapter))
    fused = runtimes.run_package(tmp_path / "out.mlpackage", None, ids, count=0)[0].logits
    effect = effect_of(bare, unfused, fused)
    assert effect.cosine > 0.999
    assert effect.kl < 1e-4
    words = (
        "--base",
        small,
        "-o",
        tmp_path / "fused8.mlpackage",
        "--remedy",
        "compensate",
        "--json",
    )
    done = cli("fuse", adapter, *words)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["effect"]["cosine"] > 0.85
    assert 0.5 < said["survival"]["share"] < 1.1
    assert said["bytes"]["before"] == said["bytes"]["after"]
