"""What stock PEFT writes, or our own options make of it, and what is easily lost on the way.

Each test runs stock PEFT on the source and on the result: a config that selects too much or too
little, a copy taken for an update, or a scale undone in only one place shows in its logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Train = Callable[..., Path]
PREFIX = "base_model.model."


@pytest.fixture
def same(tiny: Tiny, zoo: ModuleType, peers: ModuleType) -> Callable[..., None]:
    """Both folders answer alike in stock PEFT, and neither leaves a tensor unused."""

    def check(first: Path, second: Path, base: str = "llama") -> None:
        path = tiny(base).path
        plain = peers.torch_logits(peers.hf_base(path), zoo.TOKENS)
        expected = peers.peft_logits(path, first, zoo.TOKENS)
        peers.assert_same_logits(peers.peft_logits(path, second, zoo.TOKENS), expected, plain)

    return check


def edit(peers: ModuleType, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a PEFT folder in place."""
    from safetensors.torch import load_file

    tensors = load_file(folder / peers.PEFT_WEIGHTS)
    change(tensors)
    peers.rewrite_tensors(folder / peers.PEFT_WEIGHTS, tensors)


@pytest.mark.parametrize(
    "pattern", [{"alpha_pattern": {"q_proj": 24}}, {"rank_pattern": {"q_proj": 8}}]
)
def test_a_folded_bias_comes_back_too(
    pattern: dict[str, Any], train: Train, convert: Convert, same: Callable[..., None]
) -> None:
    """lora_bias is multiplied by the scale as B is: undoing the folding must undo both."""
    options = {"r": 4, "lora_alpha": 8, "lora_bias": True}
    source = train(["q_proj", "v_proj"], base="starcoder2", **options, **pattern)
    uniform = convert(source, "peft", "--uniform")
    same(source, uniform, "starcoder2")
    same(source, convert(uniform, "peft"), "starcoder2")


@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_small_half_precision_values_survive_the_folding(
    to: str, train: Train, convert: Convert, peers: ModuleType
) -> None:
    """A sixteenth of a small F16 is below its normal numbers: fold the other way, or widen."""
    source = train(["q_proj", "v_proj"], r=8, lora_alpha=16, alpha_pattern={"q_proj": 1})
    edit(peers, source, lambda ts: ts.update({n: t / 500 for n, t in ts.items() if "_B" in n}))
    peers.cast_tensors(source / peers.PEFT_WEIGHTS, torch.float16)
    there = convert(source, to, *(["--uniform"] if to == "peft" else []))
    back = convert(there, "peft")
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)
    name = peers.PEFT_WEIGHTS if to == "peft" else peers.MLX_WEIGHTS
    old, new = (
        peers.float64_tensors(source / peers.PEFT_WEIGHTS),
        peers.float64_tensors(there / name),
    )
    module = "model.layers.0.self_attn.q_proj"
    expected = 1 / 8 * old[f"{PREFIX}{module}.lora_B.weight"]
    if to == "mlx":
        found = new[f"{module}.lora_b"].T
        scale = peers.read_json(there / peers.CONFIG)["lora_parameters"]["scale"]
    else:
        found = new[f"{PREFIX}{module}.lora_B.weight"]
        config = peers.read_json(there / peers.CONFIG)
        scale = config["lora_alpha"] / config["r"]
    np.testing.assert_array_equal(scale * found, expected)


def test_random_factors_of_a_missing_module(
    train: Train, run: Callable[..., Any], peers: ModuleType
) -> None:
    """With init_lora_weights false PEFT fills what the file lacks with random numbers."""
    source = train(["q_proj", "v_proj"], init_lora_weights=False)
    edit(peers, source, lambda ts: [ts.pop(n) for n in list(ts) if "layers.1.self_attn.v" in n])
    assert "RANDOM" in run("inspect", source).stdout


def test_what_is_left_out_is_not_filled_again(
    train: Train, convert: Convert, tiny: Tiny, zoo: ModuleType, peers: ModuleType
) -> None:
    """The narrowed config must neither select the module left out nor ask for random numbers."""
    source = train(["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    result = convert(source, "peft", "--exclude", "up_proj")
    first = peers.peft_logits(tiny("llama").path, result, zoo.TOKENS)
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, peers.peft_logits(tiny("llama").path, result, zoo.TOKENS))
    assert peers.read_json(result / peers.CONFIG)["init_lora_weights"] is True


def test_a_last_name_that_stands_twice_in_a_block(
    run: Callable[..., Any], peers: ModuleType, tmp_path: Path
) -> None:
    """gpt_bigcode has attn.c_proj and mlp.c_proj: c_proj alone would select both."""
    from safetensors.numpy import save_file

    folder = tmp_path / "mlx"
    folder.mkdir()
    module = "transformer.h.0.attn.c_proj"
    tensors = {f"{module}.lora_a": np.ones((8, 2), "f4"), f"{module}.lora_b": np.ones((2, 8), "f4")}
    save_file(tensors, folder / peers.MLX_WEIGHTS)
    config = {"fine_tune_type": "lora", "num_layers": 1}
    config["lora_parameters"] = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["attn.c_proj"]}  # type: ignore[assignment]
    (folder / peers.CONFIG).write_text(json.dumps(config))
    done = run("convert", folder, "--to", "peft", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert peers.read_json(tmp_path / "out" / peers.CONFIG)["target_modules"] == ["attn.c_proj"]


def test_a_model_without_a_head(
    tiny: Tiny, convert: Convert, run: Callable[..., Any], peers: ModuleType, tmp_path: Path
) -> None:
    """An adapter of an AutoModel has layers.0 at the root, where PEFT reads no layer index."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModel

    def base() -> Any:
        return AutoModel.from_pretrained(tiny("llama").path, dtype=torch.float32)

    model = get_peft_model(base(), peers.lora(["q_proj"]).__class__(target_modules=["q_proj"], r=4))
    peers.randomise_peft(model)
    model.save_pretrained(tmp_path / "peft")
    result = convert(tmp_path / "peft", "peft", "--exclude", "layers.2")
    assert run("inspect", result).exit_code == 0
    with peers.no_complaints():
        PeftModel.from_pretrained(base(), result)


@pytest.mark.parametrize("left_out", ["input_layernorm", "layers.2.post_attention_layernorm"])
def test_part_of_what_modules_to_save_covers(
    left_out: str, train: Train, convert: Convert, tiny: Tiny, zoo: ModuleType, peers: ModuleType
) -> None:
    """ "norm" covers every name that ends with it: what is left must be named in full."""
    source = train(["q_proj"], modules_to_save=["norm"])
    result = convert(source, "peft", "--exclude", left_out)
    peers.peft_logits(tiny("llama").path, result, zoo.TOKENS)
    names = [n for n in peers.raw_tensors(result / peers.PEFT_WEIGHTS) if "norm" in n]
    assert names
    assert not [n for n in names if left_out in n]


def test_a_container_in_modules_to_save(
    train: Train, convert: Convert, run: Callable[..., Any], same: Callable[..., None]
) -> None:
    """modules_to_save=["mlp"] saves three matrices of each block; the entry must stay."""
    source = train(["q_proj", "v_proj"], modules_to_save=["mlp"])
    result = convert(source, "peft", "--exclude", "layers.2.self_attn")
    assert run("inspect", result).exit_code == 0
    same(source, convert(source, "peft"))


def test_a_container_by_the_end_of_its_name(
    train: Train, convert: Convert, same: Callable[..., None]
) -> None:
    """PEFT compares ends without a dot: "attn" is self_attn too."""
    source = train(["up_proj"], modules_to_save=["attn"])
    same(source, convert(source, "peft"))


def test_biases_that_are_saved_twice(
    train: Train,
    convert: Convert,
    same: Callable[..., None],
    attempt: Callable[..., Any],
    peers: ModuleType,
) -> None:
    """bias="all" beside modules_to_save writes one bias under three names."""
    options = {"bias": "all", "modules_to_save": ["c_proj"]}
    source = train(["q_proj", "v_proj"], base="starcoder2", **options)
    same(source, convert(source, "peft"), "starcoder2")
    key = f"{PREFIX}model.layers.0.mlp.c_proj.modules_to_save.bias"
    assert key in peers.raw_tensors(source / peers.PEFT_WEIGHTS)
    edit(peers, source, lambda ts: ts.update({key: ts[key] + 1}))
    assert "twice" in attempt(source, "peft").err


def test_the_bias_of_a_module_that_is_left_out(
    train: Train,
    convert: Convert,
    run: Callable[..., Any],
    tiny: Tiny,
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """bias="lora_only" is the bias of adapted modules: it goes where its module goes."""
    source = train(["q_proj", "v_proj"], base="starcoder2", bias="lora_only")
    result = convert(source, "peft", "--exclude", "v_proj$")
    assert run("inspect", result).exit_code == 0
    names = peers.raw_tensors(result / peers.PEFT_WEIGHTS)
    assert not [n for n in names if "v_proj" in n]
    peers.peft_logits(tiny("starcoder2").path, result, zoo.TOKENS)


def test_a_base_that_lacks_the_module(
    train: Train, refused: Callable[..., str], tiny: Tiny, peers: ModuleType
) -> None:
    """A base of fewer blocks, or without the module, is another base."""
    source = train(["q_proj", "v_proj"])

    def move(old: str, new: str) -> Callable[[dict[str, Any]], None]:
        return lambda ts: [
            ts.update({n.replace(old, new): ts.pop(n)}) for n in list(ts) if old in n
        ]  # type: ignore[func-returns-value]

    edit(peers, source, move("layers.2.", "layers.7."))
    refused(source, "mlx", "--base", tiny("llama").path, saying="block 7")
    edit(peers, source, move("layers.7.", "layers.2."))
    edit(peers, source, move("layers.2.self_attn.v_proj", "layers.2.other.v_proj"))
    refused(source, "peft", "--base", tiny("llama").path, saying="has no weight")


def test_a_head_as_peft_saves_it(
    train: Train, convert: Convert, attempt: Callable[..., Any],
    tiny: Tiny, peers: ModuleType,
) -> None:  # fmt: skip
    """PEFT saves the whole head beside its LoRA: a copy of the base's, or it is another base."""
    source = train(["q_proj", "lm_head"])
    key = f"{PREFIX}lm_head.base_layer.weight"
    assert key in peers.raw_tensors(source / peers.PEFT_WEIGHTS)
    base = tiny("llama").path
    expected = peers.peft_deltas(base, source)
    result = convert(source, "peft", "--base", base)
    assert key not in peers.raw_tensors(result / peers.PEFT_WEIGHTS)
    peers.assert_same_deltas(peers.peft_deltas(base, result), expected)
    peers.assert_same_deltas(
        peers.mlx_deltas(base, convert(source, "mlx", "--base", base)), expected
    )
    edit(peers, source, lambda ts: ts.update({key: ts[key] + 0.01}))
    assert "not the base's" in attempt(source, "peft", "--base", base).err


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_an_adapter_that_is_not_there(
    kind: str, train: Train, convert: Convert, refused: Callable[..., str]
) -> None:
    """--adapter with a name that nothing has must not take another one."""
    source = train(["q_proj"])
    if kind == "mlx":
        source = convert(source, "mlx")
        source = source.rename(source.parent.parent / "mlx")
    refused(source, "peft", "--adapter", "stile", saying="stile")


def test_a_scale_of_zero_keeps_the_record(
    train: Train, convert: Convert, peers: ModuleType
) -> None:
    """One module that alpha 0 switches off is zeroed, and the config still comes back."""
    pattern = {"layers.0.self_attn.q_proj": 0}
    source = train(["q_proj", "v_proj"], use_rslora=True, alpha_pattern=pattern)
    back = convert(convert(source, "mlx"), "peft")
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)


@pytest.mark.parametrize("options", [["--exclude", ".*"], ["--include", "nope"]])
def test_nothing_left(options: list[str], train: Train, refused: Callable[..., str]) -> None:
    """Leaving everything out is refused, with --uniform too."""
    refused(train(["q_proj"]), "peft", "--uniform", *options, saying="no low-rank update")


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_a_scale_that_is_no_number(scale: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """Wrong usage, not a traceback."""
    done = run("convert", tmp_path, "--to", "peft", "-o", tmp_path / "o", "--scale", scale)
    assert done.exit_code == 2


def test_what_is_said_of_the_config(train: Train, attempt: Callable[..., Any]) -> None:
    """ "Kept as it was" only when it was."""
    source = train(["q_proj", "v_proj"], alpha_pattern={"q_proj": 3})
    assert "kept as it was" in attempt(source, "peft").out
    changed = attempt(source, "peft", "--uniform").out
    assert "kept as it was" not in changed
    assert "alpha_pattern = {}" in changed


def test_the_card_names_the_library(train: Train, convert: Convert) -> None:
    """A model hub reads library_name: it must be the one that loads the folder now."""
    source = train(["q_proj"])
    there = convert(source, "mlx")
    assert "library_name: mlx\n" in (there / "README.md").read_text()
    back = convert(there, "peft")
    assert (back / "README.md").read_bytes() == (source / "README.md").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_old_npz_of_any_dtype(
    dtype: str, convert: Convert, peers: ModuleType, tmp_path: Path
) -> None:
    """mlx saves bfloat16 to .npz in a way numpy has no name for."""
    import mlx.core as mx

    folder = tmp_path / "old"
    folder.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    a, b = mx.random.normal((8, 2)), mx.random.normal((2, 6))
    arrays = {f"{module}.lora_a": a, f"{module}.lora_b": b}
    arrays = {k: v.astype(getattr(mx, dtype)) for k, v in arrays.items()}
    mx.savez(str(folder / "adapters.npz"), **arrays)
    result = convert(folder, "peft")
    found = peers.float64_tensors(result / peers.PEFT_WEIGHTS)
    expected = np.array(arrays[f"{module}.lora_a"].astype(mx.float32)).T
    np.testing.assert_array_equal(found[f"{PREFIX}{module}.lora_A.weight"], expected)


def test_conv1d_with_its_base(
    convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """GPT-2 stores its weights transposed: their shapes are no reason to refuse the base."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=zoo.VOCABULARY)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = peers.lora(["c_attn"], fan_in_fan_out=True)
    peers.save_peft(tmp_path / "base", tmp_path / "peft", adapter, zoo.TOKENS)
    convert(tmp_path / "peft", "peft", "--base", tmp_path / "base")


def test_shards_and_their_index(
    train: Train, convert: Convert, attempt: Callable[..., Any], peers: ModuleType
) -> None:
    """Large adapters come in shards; the index must name exactly the tensors there are."""
    source = train(["q_proj", "v_proj"])
    whole = source / peers.PEFT_WEIGHTS
    expected = convert(source, "mlx")
    tensors = peers.load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"adapter_model-0000{i}-of-00002.safetensors"
        peers.rewrite_tensors(source / shard, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    whole.unlink()
    index = source / f"{peers.PEFT_WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = convert(source, "mlx")
    assert not peers.changed_tensors(expected / peers.MLX_WEIGHTS, found / peers.MLX_WEIGHTS)
    index.write_text(json.dumps({"weight_map": {n: weight_map[n] for n in names[1:]}}))
    outcome = attempt(source, "mlx")
    assert outcome.code == 1
    assert names[0] in outcome.err


def test_positions_of_gpt2_in_a_square_table(
    convert: Convert, cli: Callable[..., Any], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """A table as long as it is wide fits both ways round; MLX's factors must not come in turned."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    torch.manual_seed(0)
    small = transformers.GPT2Config(
        vocab_size=zoo.VOCABULARY, n_embd=64, n_positions=64, n_layer=2, n_head=4
    )
    transformers.GPT2LMHeadModel(small).save_pretrained(base)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["wpe"])
    model = get_peft_model(peers.hf_base(base), config)
    for name, value in model.named_parameters():
        if "lora_embedding" in name:
            value.data = 0.2 * torch.randn_like(value)
    expected = peers.torch_logits(model, zoo.TOKENS)
    model.save_pretrained(tmp_path / "peft")
    there = convert(tmp_path / "peft", "mlx", "--base", base)
    fused = cli("fuse", there, "--base", base, "-o", tmp_path / "fused")
    assert fused.exit_code == 0, fused.output
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    peers.assert_same_logits(peers.torch_logits(found, zoo.TOKENS), expected, plain)
