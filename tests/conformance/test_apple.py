"""Apple's model in mlx-lm (afm7): a fused q, k, v with a list of factors, packed or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {
    "model_type": "afm7",
    "vocab_size": 131,
    "hidden_dim": 64,
    "num_layers": 5,
    "num_kv_reuse_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim_scale_factor": 2.0,
    "rope_theta": 5000,
}
QKV = "model.layers.0.self_attn.qkv_proj"


@dataclass(frozen=True)
class Apple:
    """A base, an adapter that stock mlx-lm saved, and what it answers with it and without."""

    base: Path
    adapter: Path
    logits: np.ndarray
    plain: np.ndarray


@pytest.fixture(scope="module", params=[None, 3], ids=["plain", "3 bits"])
def apple(
    request: pytest.FixtureRequest,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Apple:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.afm7 import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    folder = tmp_path_factory.mktemp("apple")
    model = Model(ModelArgs.from_dict(CONFIG))
    generator = np.random.default_rng(4)
    drawn = []
    for name, value in tree_flatten(model.parameters()):
        noise = generator.standard_normal(value.shape).astype(np.float32)
        if value.ndim == 2:
            noise = noise / value.shape[-1] ** 0.5
        elif value.ndim == 1:
            noise = 1 + 0.1 * noise
        else:  # the scales of the 8-bit cache: so fine that rounding is not what is measured
            noise = np.full(value.shape, 0.04, np.float32)
        drawn.append((name, mx.array(noise)))
    model.update(tree_unflatten(drawn))
    config = dict(CONFIG)
    if request.param is not None:
        # but the fused layer, whose own to_quantized can't be called by nn.quantize (no mode)
        model, config = quantize_model(
            model, config, 32, request.param, quant_predicate=lambda p, _: "qkv_proj" not in p
        )
    save_model(folder / "base", model, donate_model=False)
    save_config(config, folder / "base" / "config.json")
    plain = peers.mlx_logits(folder / "base", None, zoo.TOKENS)
    logits = peers.save_mlx(folder / "base", folder / "adapter", zoo.TOKENS, num_layers=-1)
    return Apple(folder / "base", folder / "adapter", logits, plain)


def loaded(base: Path, folder: Path, tokens: np.ndarray, peers: ModuleType) -> np.ndarray:
    """What stock mlx-lm answers with the folder, loaded as its own load_adapters would but for the
    check that its lists don't pass."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    config = peers.read_json(folder / peers.CONFIG)
    model = peers.mlx_base(base)
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    there = dict(peers.tree_flatten(model.parameters()))
    tensors = peers.mx.load(str(folder / peers.MLX_WEIGHTS))
    assert {n: t.shape for n, t in tensors.items()} == {n: there[n].shape for n in tensors}
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    return np.array(peers.mlx_run(model, tokens))


def test_mlx_lm_refuses_its_own(apple: Apple, peers: ModuleType, run: Callable[..., Any]) -> None:
    """If this fails, mlx-lm has mended it, and the note is to go."""
    with pytest.raises(ValueError, match=r"lora_a\.0: not an adapter parameter"):
        peers.mlx_model(apple.base, apple.adapter)
    result = run("inspect", apple.adapter, "--json")
    assert result.exit_code == 0, result.stderr
    (trap,) = [t for t in json.loads(result.stdout)["traps"] if t["kind"] == "list-leaves"]
    assert "load_adapters refuses them" in trap["text"]


def test_inspect_shows_the_parts(apple: Apple, run: Callable[..., Any]) -> None:
    document = json.loads(run("inspect", apple.adapter, "--json", "--stats", "--tensors").stdout)
    rows = {t["module"]: t for t in document["targets"]}
    sizes = {i: rows[f"self_attn.qkv_proj[{i}]"]["shape"] for i in range(3)}
    assert sizes == {0: [64, 64], 1: [32, 64], 2: [32, 64]}
    assert rows["self_attn.qkv_proj[1]"]["kind"] == "attention matrices"
    assert rows["self_attn.qkv_proj[1]"]["layers"] == [0, 1, 2]
    assert document["modules"] == 3 * (3 + 4) + 2 * 5
    assert {t["name"] for t in document["tensors"]} >= {f"{QKV}.lora_a.0", f"{QKV}.lora_b.2"}
    text = run("inspect", apple.adapter).stdout
    assert "qkv_proj[2]" in text


def test_to_mlx_gives_equal_bytes(
    apple: Apple, convert: Callable[..., Path], zoo: ModuleType, peers: ModuleType
) -> None:
    for options in ((), ("--base", apple.base)):
        result = convert(apple.adapter, "mlx", *options)
        before, after = apple.adapter / peers.MLX_WEIGHTS, result / peers.MLX_WEIGHTS
        assert not peers.changed_tensors(before, after)
        assert peers.read_json(result / peers.CONFIG) == peers.read_json(
            apple.adapter / peers.CONFIG
        )
        found = loaded(apple.base, result, zoo.TOKENS, peers)
        assert np.array_equal(found, apple.logits)
    assert np.abs(apple.logits - apple.plain).max() > 0.1


def test_a_narrower_adapter(
    apple: Apple, convert: Callable[..., Path], zoo: ModuleType, peers: ModuleType
) -> None:
    """Of both lists of blocks; keys must select what is left and no more, in either list."""
    result = convert(apple.adapter, "mlx", "--exclude", r"model\.layers\.0|kv_reuse_layers\.1")
    tensors = peers.mx.load(str(apple.adapter / peers.MLX_WEIGHTS))
    dropped = {n for n in tensors if n.startswith(("model.layers.0.", "model.kv_reuse_layers.1."))}
    kept = peers.raw_tensors(result / peers.MLX_WEIGHTS)
    assert set(kept) == set(tensors) - dropped
    zero = {n: t * 0 if n in dropped else t for n, t in tensors.items()}
    oracle = peers.copy_adapter(apple.adapter, result.parent.parent / "zero")
    peers.mx.save_safetensors(str(oracle / peers.MLX_WEIGHTS), zero)
    expected = loaded(apple.base, oracle, zoo.TOKENS, peers)
    assert np.array_equal(loaded(apple.base, result, zoo.TOKENS, peers), expected)
    assert np.abs(expected - apple.logits).max() > 0.01


@pytest.mark.parametrize("pattern", [r"qkv_proj\[[12]\]", r"s\.0\..*v_proj\[2\]"])
def test_a_part_that_is_left_out_is_not_moved(
    pattern: str,
    apple: Apple,
    convert: Callable[..., Path],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """A list that ends early: mlx-lm leaves the other parts as they start."""
    tensors = peers.mx.load(str(apple.adapter / peers.MLX_WEIGHTS))
    named = {n: re.sub(r"\.lora_[ab]\.(\d)$", r"[\1]", n) for n in tensors}
    zero = {n: t * 0 if re.search(pattern, named[n]) else t for n, t in tensors.items()}
    oracle = peers.copy_adapter(apple.adapter, tmp_path / "zero")
    peers.mx.save_safetensors(str(oracle / peers.MLX_WEIGHTS), zero)
    expected = loaded(apple.base, oracle, zoo.TOKENS, peers)
    assert np.abs(expected - apple.logits).max() > 0.01
    result = convert(apple.adapter, "mlx", "--exclude", pattern, "--base", apple.base)
    assert len(peers.raw_tensors(result / peers.MLX_WEIGHTS)) < len(tensors)
    assert np.array_equal(loaded(apple.base, result, zoo.TOKENS, peers), expected)
    again = convert(result, "mlx", "--base", apple.base)
    assert not peers.changed_tensors(result / peers.MLX_WEIGHTS, again / peers.MLX_WEIGHTS)


@pytest.mark.parametrize("part", [0, 1])
def test_a_list_with_a_gap_is_refused(
    part: int,
    apple: Apple,
    refused: Callable[..., str],
    run: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm loads it, and then multiplies by an empty dict."""
    saying = f"whose part {part} is not there"
    error = refused(apple.adapter, "mlx", "--exclude", rf"qkv_proj\[{part}\]", saying=saying)
    assert f"{QKV}.lora_a.2" in error
    broken = peers.copy_adapter(apple.adapter, tmp_path / "broken")
    tensors = peers.load_file(broken / peers.MLX_WEIGHTS)
    kept = {n: t for n, t in tensors.items() if not n.endswith(f".{part}")}
    peers.rewrite_tensors(broken / peers.MLX_WEIGHTS, kept)
    with pytest.raises(TypeError):
        loaded(apple.base, broken, zoo.TOKENS, peers)
    result = run("inspect", broken)
    assert result.exit_code == 1
    assert saying in result.stderr


def test_to_peft_is_refused_with_the_reason(apple: Apple, refused: Callable[..., str]) -> None:
    for options in ((), ("--base", apple.base)):
        error = refused(apple.adapter, "peft", *options, saying="transformers doesn't have")
        assert f"{QKV}.lora_a.0" in error


def test_another_base_is_refused(
    apple: Apple, attempt: Callable[..., Any], peers: ModuleType, tmp_path: Path
) -> None:
    """Sizes of all parts together are the fused layer's."""
    other = peers.copy_adapter(apple.adapter, tmp_path / "other")
    tensors = peers.load_file(other / peers.MLX_WEIGHTS)
    tensors[f"{QKV}.lora_b.2"] = tensors[f"{QKV}.lora_b.2"][:, :24]
    peers.rewrite_tensors(other / peers.MLX_WEIGHTS, tensors)
    outcome = attempt(other, "mlx", "--base", apple.base)
    assert outcome.code == 1
    assert "[120, 64]" in outcome.err
    assert "[128, 64]" in outcome.err


def test_names_by_hand_lead_to_peft_and_back(
    apple: Apple, convert: Callable[..., Path], peers: ModuleType, tmp_path: Path
) -> None:
    """For whoever has the model in transformers' form: each part is a linear layer of its own."""
    names = {f"self_attn.{n}_proj": f"self_attn.qkv_proj[{i}]" for i, n in enumerate("qkv")}
    alike = ("self_attn.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    table = {f"model.layers.{{}}.{h}": f"model.layers.{{}}.{m}" for h, m in names.items()}
    table |= {f"model.layers.{{}}.{m}": f"model.layers.{{}}.{m}" for m in alike}
    blocks = "model.kv_reuse_layers.{}"
    table |= {f"{blocks}.{m}": f"{blocks}.{m}" for m in (*alike, "self_attn.q_proj")}
    (tmp_path / "names.json").write_text(json.dumps(table))
    options = ("--name-map", tmp_path / "names.json")
    there = convert(apple.adapter, "peft", *options)
    made = peers.float64_tensors(there / peers.PEFT_WEIGHTS)
    own = peers.float64_tensors(apple.adapter / peers.MLX_WEIGHTS)
    for i, n in enumerate("qkv"):
        stem = f"{peers.PEFT_PREFIX}model.layers.1.self_attn.{n}_proj"
        a, b = (own[f"model.layers.1.self_attn.qkv_proj.lora_{x}.{i}"] for x in "ab")
        assert np.array_equal(made[f"{stem}.lora_A.weight"], a.T)
        assert np.array_equal(made[f"{stem}.lora_B.weight"], b.T)
    back = convert(there, "mlx", *options)
    before, after = apple.adapter / peers.MLX_WEIGHTS, back / peers.MLX_WEIGHTS
    assert not peers.changed_tensors(before, after)
