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


def ran(cli, *words):
    done = cli(*words)
    assert done.exit_code == 0, done.stderr
    return done.stdout


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
    """In 16 bits as stock PEFT computes."""
    adapter, plain, out = (
        repo / "examples" / "reply",
        tmp_path / "plain.mlpackage",
        tmp_path / "out.mlpackage",
    )
    ran(cli, "package", "--base", real, "-o", plain)
    ran(cli, "fuse", adapter, "--base", plain, "-o", out)
    ids, _ = runtimes.tokenize(base_folder.read(real), runtimes.PROMPTS[:2])
    bare, unfused = logits("torch", real), logits("torch", real, read(adapter))
    fused = runtimes.run_package(out, None, ids, count=0)[0].logits
    effect = effect_of(bare, unfused, fused)
    assert effect.cosine > 0.999
    assert effect.kl < 1e-4


def integers(path):
    """Constant -> (codes, scales of the rows) as coremltools reads them, float16."""
    from test_fuse_package import operations

    return {
        op.outputs[0].name: (op.data.val.astype(np.float16), op.scale.val)
        for op in operations(path)
        if op.op_type == "constexpr_blockwise_shift_scale"
    }


def test_a_package_in_int8(cli, repo, real, tmp_path):
    """Remedy none takes the nearest codes, worked out here; of either the share is what a dense
    computation finds in what coremltools reads. The other remedy has less error along the inputs that the
    adapter reads, and more of its effect."""
    import fusing

    adapter, small = repo / "examples" / "reply", tmp_path / "int8.mlpackage"
    ran(cli, "package", "--base", real, "-o", tmp_path / "plain.mlpackage")
    ran(cli, "compress", tmp_path / "plain.mlpackage", "-o", small, "--quantize", "int8")
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors, before = fusing.factors(adapter), integers(small)
    said, read_error = {}, {}
    for remedy in ("none", "compensate"):
        out = tmp_path / f"{remedy}.mlpackage"
        words = "--base", small, "-o", out, "--remedy", remedy, "--json"
        said[remedy] = json.loads(ran(cli, "fuse", adapter, *words))
        after, sums, read_error[remedy] = integers(out), np.zeros(2), 0.0
        told = {m["module"]: m["share"] for m in said[remedy]["survival"]["modules"]}
        assert len(told) == len(factors)
        for module, (a, b) in factors.items():
            name = f"{module.replace('.', '_')}_weight"
            (codes, scale), (now, scale_now) = before[name], after[name]
            assert scale.tobytes() == scale_now.tobytes()
            wide = (codes * scale).astype(np.float64)  # in float16, as they are read
            delta = config["lora_alpha"] / config["r"] * b @ a
            if remedy == "none":
                steps = (wide + delta) / scale
                off = np.clip(np.rint(steps), -128, 127) != now
                # float32 is off by a few ten-thousandths of a step
                assert (np.abs(steps - np.floor(steps) - 0.5) < 1e-3)[off].all(), module
            moved = (now * scale).astype(np.float64) - wide
            one = (moved * delta).sum(), (delta**2).sum()
            assert told[f"{module}.weight"] == pytest.approx(one[0] / one[1], abs=1e-5), module
            sums += one
            basis = np.linalg.qr(a.T)[0]
            read_error[remedy] += float(np.square((moved - delta) @ basis).sum())
        assert said[remedy]["survival"]["share"] == pytest.approx(sums[0] / sums[1], abs=1e-5)
    assert read_error["compensate"] < read_error["none"]
    effects = {r: s["effect"] for r, s in said.items()}
    assert effects["compensate"]["cosine"] > effects["none"]["cosine"]
    assert effects["compensate"]["kl"] < effects["none"]["kl"] < effects["none"]["base_kl"]
    assert all(s["bytes"]["before"] == s["bytes"]["after"] for s in said.values())
