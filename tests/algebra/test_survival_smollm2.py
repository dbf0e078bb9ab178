"""The real base packed by stock mlx-lm in 4 bits: the survival report against a dense computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.heavy
TEXTS = (
    "Thanks for the quick reply, I will look at it today.",
    "The meeting was moved to Friday at ten.",
)


def dense(folder: Path) -> Any:
    """Module -> its weight as mx.dequantize gives it, in float32 arithmetic, as float64."""
    import mlx.core as mx

    held: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        held |= mx.load(str(file))
    settings = json.loads((folder / "config.json").read_text())["quantization"]

    def of(module: str) -> Any:
        own = settings.get(module)
        own = own if isinstance(own, dict) else settings
        scales, biases = (held[f"{module}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
        wide = mx.dequantize(
            held[f"{module}.weight"], scales, biases, group_size=own["group_size"], bits=own["bits"]
        )
        return np.array(wide).astype(np.float64)

    return of


def logits(folder: Path, adapter: Path | None = None) -> list[Any]:
    """Of the texts, by stock mlx-lm in float32, less each position's mean, which softmax does not see."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from transformers import AutoTokenizer

    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    done = []
    for text in TEXTS:
        found = model(mx.array([tokenizer(text)["input_ids"]]))[0].astype(mx.float32)
        done.append(np.array(found).astype(np.float64))
    return [x - x.mean(-1, keepdims=True) for x in done]


@pytest.fixture(scope="module")
def packed(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mlx_lm = pytest.importorskip("mlx_lm")
    real = repo / ".cache" / "smollm2-135m-instruct"
    if not (real / "config.json").exists():
        pytest.skip("the real base is not there: run make demo")
    folder = tmp_path_factory.mktemp("packed") / "base"
    mlx_lm.convert(str(real), str(folder), quantize=True, q_bits=4, q_group_size=64)
    return folder


@pytest.mark.parametrize("remedy", ["none", "compensate", "bits"])
def test_the_report_is_a_dense_computation(
    cli: Any, repo: Path, packed: Path, tmp_path: Path, remedy: str
) -> None:
    import fusing

    adapter, out, prompts = repo / "examples" / "reply", tmp_path / "out", tmp_path / "texts"
    prompts.write_text("\n".join(TEXTS))
    words = "--base", packed, "-o", out, "--remedy", remedy, "--prompts", prompts, "--json"
    done = cli("fuse", adapter, *words)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    told = {m["module"]: m for m in said["survival"]["modules"]}
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors, before, after = fusing.factors(adapter), dense(packed), dense(out)
    assert len(told) == len(factors) == 210
    sums = np.zeros(4)
    for module, (a, b) in factors.items():
        delta, weight = config["lora_alpha"] / config["r"] * b @ a, before(module)
        moved = after(module) - weight
        inner, whole, got = (
            (x * y).sum() for x, y in ((moved, delta), (delta, delta), (moved, moved))
        )
        one = told[f"{module}.weight"]
        assert one["share"] == pytest.approx(inner / whole, abs=1e-4), module
        assert one["cosine"] == pytest.approx(inner / max((whole * got) ** 0.5, 1e-30), abs=1e-4)
        sums += inner, whole, got, (weight**2).sum()
    inner, whole, got, weights = sums
    assert said["survival"]["share"] == pytest.approx(inner / whole, abs=1e-4)
    assert said["survival"]["cosine"] == pytest.approx(inner / (whole * got) ** 0.5, abs=1e-4)
    assert said["survival"]["size"] == pytest.approx((whole / weights) ** 0.5, rel=1e-4)
    carried = tmp_path / "mlx"
    done = cli("convert", adapter, "--to", "mlx", "--base", packed, "-o", carried)
    assert done.exit_code == 0, done.stderr
    bare = logits(packed)
    beside, fused = (
        [x - y for x, y in zip(logits(*given), bare, strict=True)]
        for given in ((packed, carried), (out,))
    )
    one, two = (np.concatenate([x.reshape(-1) for x in xs]) for xs in (beside, fused))
    cosine = one @ two / (np.linalg.norm(one) * np.linalg.norm(two))
    assert said["effect"]["cosine"] == pytest.approx(cosine, abs=1e-6)
