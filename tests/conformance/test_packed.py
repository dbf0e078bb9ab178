"""Bases that mlx-lm has packed: every width, group and mixture, and what DoRA can't do on them.

The oracle for PEFT is a torch model with the values that mlx-lm itself unpacks. On a CPU mlx
multiplies packed weights in float32 with the very numbers it unpacks, so that both runtimes agree as
on any base: `assert_same_logits` asks for 1e-5 of the logits' size and an effect a thousand times
that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
ODD = (3, 5, 6)
DORA_ON = ["self_attn.q_proj", "mlp.down_proj"]


@dataclass(frozen=True)
class Packed:
    """A base as mlx_lm.convert leaves it, and the same values unpacked, for transformers."""

    mlx: Path
    hf: Path
    logits: np.ndarray
    packed: dict[str, int]  # bits of every layer that is packed


def _some_plain(path: str, module: Any) -> bool | dict[str, Any]:
    """No layer of the last block, 8 bits for the embedding, 5 for one layer, else the default."""
    del module
    if "layers.2." in path:
        return False
    settings = {"embed_tokens": 8, "layers.1.self_attn.q_proj": 5}
    bits = next((b for name, b in settings.items() if name in path), None)
    return True if bits is None else {"group_size": 32, "bits": bits, "mode": "affine"}


def _no_embedding(path: str, module: Any) -> bool:
    del module
    return "embed_tokens" not in path


@pytest.fixture(scope="module")
def pack(
    zoo: ModuleType, peers: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Packed]:
    """pack(4, 64) -> a packed llama; ``how``: a recipe of mlx-lm's, "some" or a mode."""
    import mlx.core as mx
    import torch
    from mlx.utils import tree_flatten
    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
    from mlx_lm.utils import (
        dequantize_model,
        load_model,
        quantize_model,
        save_config,
        save_model,
    )

    @cache
    def plain(tied: bool) -> Path:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        config = sizes | zoo.LLAMA3 | {"tie_word_embeddings": tied}
        folder = tmp_path_factory.mktemp("plain") / "base"
        return Path(zoo.build("llama", folder, zoo.Architecture(config)).path)

    @cache
    def get(bits: int, group: int, how: str = "affine", tied: bool = False) -> Packed:
        here = tmp_path_factory.mktemp("packed")
        model, config = load_model(plain(tied))
        predicate = _some_plain if how == "some" else None
        if how in QUANT_RECIPES:
            predicate = mixed_quant_predicate_builder(how, model, group)
        mode = how if how in ("mxfp4", "mxfp8", "nvfp4") else "affine"
        if mode != "affine":  # unpacked in bfloat16: of the embedding, all else would be too
            predicate = _no_embedding
        model, config = quantize_model(
            model, config, group, bits, mode=mode, quant_predicate=predicate
        )
        save_model(here / "mlx", model, donate_model=False)
        save_config(config, here / "mlx" / "config.json")
        widths = {n: m.bits for n, m in model.named_modules() if hasattr(m, "bits")}
        unpacked = dequantize_model(load_model(here / "mlx")[0])
        shutil.copytree(plain(tied), here / "hf")
        values = tree_flatten(unpacked.parameters())
        tensors = {k: torch.from_numpy(np.array(v.astype(mx.float32))) for k, v in values}
        peers.rewrite_tensors(here / "hf" / "model.safetensors", tensors)
        logits = peers.torch_logits(peers.hf_base(here / "hf"), zoo.TOKENS)
        return Packed(here / "mlx", here / "hf", logits, widths)

    return get


ALL = [(bits, group) for bits in BITS for group in GROUPS]
MIXED = [(2, 64, "mixed_2_6"), (3, 32, "mixed_3_4"), (3, 64, "mixed_3_6"), (4, 32, "some")]
MODES = [(4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]
EVERY = [*ALL, *MIXED, *MODES]


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_lora_from_peft(
    how: tuple[Any, ...],
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """All linear layers, the head and the packed embedding; and back, byte for byte."""
    base = pack(*how)
    source = tmp_path / "peft"
    targets = [*zoo.GATED, "lm_head", "embed_tokens"]
    config = peers.lora(targets, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 5})
    expected = peers.save_peft(base.hf, source, config, zoo.TOKENS)
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    own = {n: t for n, t in tensors.items() if ".base_layer." not in n}
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, own)
    there = convert(source, "mlx", "--base", base.mlx)
    found = peers.mlx_logits(base.mlx, there, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base.logits)
    for again in (base.mlx, base.hf):  # the unpacked copy is no other base
        back = convert(there, "peft", "--base", again)
        assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_lora_from_mlx(
    how: tuple[Any, ...],
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Trained by mlx-lm on the packed base itself, with a layer of the embedding."""
    base = pack(*how)
    keys = ["model.embed_tokens", "lm_head", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]
    options = {"keys": keys, "num_layers": -1}
    expected = peers.save_mlx(base.mlx, tmp_path / "mlx", zoo.TOKENS, **options)
    result = convert(tmp_path / "mlx", "peft", "--base", base.mlx)
    peers.assert_same_logits(peers.peft_logits(base.hf, result, zoo.TOKENS), expected, base.logits)


@pytest.mark.parametrize("bits", BITS)
def test_a_tied_packed_embedding(
    bits: int,
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm moves both sides of it; PEFT gets two updates."""
    base = pack(bits, 64, tied=True)
    options = {"keys": ["model.embed_tokens", "mlp.up_proj"], "num_layers": -1}
    expected = peers.save_mlx(base.mlx, tmp_path / "mlx", zoo.TOKENS, **options)
    result = convert(tmp_path / "mlx", "peft", "--base", base.mlx)
    assert sum("lm_head.lora" in n for n in peers.raw_tensors(result / peers.PEFT_WEIGHTS)) == 2
    peers.assert_same_logits(peers.peft_logits(base.hf, result, zoo.TOKENS), expected, base.logits)


def test_mixtures_are_mixed(pack: Callable[..., Packed]) -> None:
    """Else the tests above would say nothing of them."""
    for how in MIXED:
        assert len(set(pack(*how).packed.values())) > 1, how
    some = pack(*MIXED[-1]).packed
    assert some["model.embed_tokens"] == 8
    assert some["model.layers.1.self_attn.q_proj"] == 5
    assert "model.layers.2.self_attn.q_proj" not in some


# --- DoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*((b, 64) for b in BITS if b not in ODD), *MODES], ids=str)
def test_dora_where_mlx_lm_can(
    how: tuple[Any, ...],
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    run: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    base = pack(*how)
    config = peers.lora(zoo.GATED, use_dora=True)
    expected = peers.save_peft(base.hf, tmp_path / "peft", config, zoo.TOKENS)
    there = convert(tmp_path / "peft", "mlx", "--base", base.mlx)
    found = peers.mlx_logits(base.mlx, there, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base.logits)
    assert run("validate", there, "--base", base.mlx).exit_code == 0
    document = json.loads(run("inspect", there, "--base", base.mlx, "--json").stdout)
    assert "packed-base" not in {t["kind"] for t in document["traps"]}


@pytest.mark.parametrize("bits", ODD)
def test_dora_where_mlx_lm_cannot(
    bits: int,
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    attempt: Callable[..., Any],
    run: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm can neither train such a DoRA nor load one; all verbs say so, with the module's name."""
    base = pack(bits, 64)
    with pytest.raises(ValueError, match="matmul"):
        peers.save_mlx(base.mlx, tmp_path / "mlx", zoo.TOKENS, kind="dora", keys=DORA_ON)
    peers.save_peft(base.hf, tmp_path / "peft", peers.lora(zoo.GATED, use_dora=True), zoo.TOKENS)
    there = convert(tmp_path / "peft", "mlx", "--base", base.hf)  # for the unpacked base
    with pytest.raises(ValueError, match="does not match model parameter shape"):
        peers.mlx_model(base.mlx, there)
    only_config = tmp_path / "config"
    only_config.mkdir()
    shutil.copy(base.mlx / "config.json", only_config)
    for given in (base.mlx, only_config):
        for source in (tmp_path / "peft", there):
            outcome = attempt(source, "mlx", "--base", given)
            assert outcome.code == 1, outcome.text
            assert "model.layers.0.mlp.down_proj" in outcome.err
            assert f"packed in {bits} bits" in outcome.err
    result = run("validate", there, "--base", base.mlx, "--json")
    assert result.exit_code == 3
    (check,) = [c for c in json.loads(result.stdout)["checks"] if c["name"] == "packed"]
    assert check["status"] == "failed"
    assert "model.layers.0.mlp.down_proj" in check["detail"]
    assert "21 in all" in check["detail"]
    document = json.loads(run("inspect", there, "--base", base.mlx, "--json").stdout)
    (trap,) = [t for t in document["traps"] if t["kind"] == "packed-base"]
    assert "model.layers.0.mlp.down_proj" in trap["text"]
    plain = json.loads(run("inspect", there, "--base", base.hf, "--json").stdout)
    assert "packed-base" not in {t["kind"] for t in plain["traps"]}


def test_dora_on_a_mixture(
    pack: Callable[..., Packed],
    convert: Callable[..., Path],
    attempt: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Each layer by its own width: refused for the one of 5 bits, carried on all others."""
    base = pack(*MIXED[-1])
    config = peers.lora(zoo.GATED, use_dora=True)
    peers.save_peft(base.hf, tmp_path / "all", config, zoo.TOKENS)
    outcome = attempt(tmp_path / "all", "mlx", "--base", base.mlx)
    assert outcome.code == 1
    assert "model.layers.1.self_attn.q_proj" in outcome.err
    config = peers.lora(zoo.GATED, use_dora=True, exclude_modules=r".*layers\.1.*q_proj")
    expected = peers.save_peft(base.hf, tmp_path / "peft", config, zoo.TOKENS)
    there = convert(tmp_path / "peft", "mlx", "--base", base.mlx)
    found = peers.mlx_logits(base.mlx, there, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base.logits)


def test_dora_on_a_packed_embedding(
    pack: Callable[..., Packed],
    refused: Callable[..., str],
    run: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm can't run it; we carry no DoRA on an embedding, packed or not."""
    base = pack(4, 64)
    with pytest.raises(ValueError, match="broadcast"):
        peers.save_mlx(
            base.mlx, tmp_path / "mlx", zoo.TOKENS, kind="dora", keys=["model.embed_tokens"]
        )
    config = peers.lora(["q_proj", "embed_tokens"], use_dora=True)
    peers.save_peft(base.hf, tmp_path / "peft", config, zoo.TOKENS)
    saying = "DoRA on an embedding"
    assert "embed_tokens" in refused(tmp_path / "peft", "mlx", "--base", base.mlx, saying=saying)
    options = {"kind": "dora", "keys": ["model.embed_tokens"]}
    peers.save_mlx(base.hf, tmp_path / "plain", zoo.TOKENS, **options)
    for words in (["inspect"], ["validate", "--base", base.mlx]):
        result = run(words[0], tmp_path / "plain", *words[1:])
        assert result.exit_code == 1
        assert "model.embed_tokens" in result.stderr
        assert saying in result.stderr


@pytest.mark.parametrize(
    ("name", "bits"), [("org/Some-7B-3bit", 3), ("Some-5-bit-mlx", 5), ("Some-4bit", None)]
)
def test_the_name_of_the_base_warns(
    name: str,
    bits: int | None,
    pack: Callable[..., Packed],
    attempt: Callable[..., Any],
    run: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Where no base is given, the name, or what the record says of the precision, may tell."""
    source = tmp_path / "peft"
    config = peers.lora(["q_proj"], use_dora=True)
    peers.save_peft(pack(4, 64).hf, source, config, zoo.TOKENS)
    peers.edit_json(source / peers.CONFIG, base_model_name_or_path=name)
    outcome = attempt(source, "mlx")
    assert (f"said to be of {bits} bits" in outcome.text) == (bits is not None)
    traps = json.loads(run("inspect", outcome.path, "--json").stdout)["traps"]
    assert ("dora-packed-base" in {t["kind"] for t in traps}) == (bits is not None)
    peers.edit_json(source / peers.CONFIG, base_model_name_or_path="org/Some-7B")
    said = attempt(source, "mlx", "--trained-on", "6-bit").path
    (trap,) = [
        t
        for t in json.loads(run("inspect", said, "--json").stdout)["traps"]
        if t["kind"] == "dora-packed-base"
    ]
    assert "of 6 bits" in trap["text"]


def test_packed_activations(
    pack: Callable[..., Packed],
    refused: Callable[..., str],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """With quantize_activations mlx-lm has another kind of layer, which takes no adapter."""
    base = pack(8, 32, "mxfp8")
    other = Path(shutil.copytree(base.mlx, tmp_path / "base"))
    peers.edit_json(other / "config.json", quantize_activations=True)
    peers.save_peft(base.hf, tmp_path / "peft", peers.lora(["q_proj"]), zoo.TOKENS)
    error = refused(tmp_path / "peft", "mlx", "--base", other, saying="quantize_activations")
    assert "model.layers.0.self_attn.q_proj" in error
    with pytest.raises(ValueError, match="QQLinear"):
        peers.save_mlx(other, tmp_path / "mlx", zoo.TOKENS, keys=["self_attn.q_proj"])
