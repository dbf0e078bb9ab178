"""What a token costs, against counts of torch's parameters and of the files themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mil_build
import numpy as np
import pytest
from click.testing import CliRunner

from loraduct.cli import main
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats import read
from loraduct.formats.coreml.package import read as read_package
from loraduct.formats.options import ReadOptions
from loraduct.validation import workload

LAYERS, HIDDEN, INNER, VOCABULARY, NARROW = 2, 64, 128, 160, 32
# of the tiny llama, by hand: q and o, k and v, three of the feed-forward
BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * NARROW + 3 * HIDDEN * INNER
HEAD = VOCABULARY * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN


def parameters(folder: Path) -> dict[str, int]:
    """Name -> values, as torch counts them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: p.numel() for n, p in model.named_parameters()}


def test_a_tied_base(tied: Path) -> None:
    load = workload.of_base(base_folder.read(tied))
    counts = parameters(tied)
    assert load.weight_bytes == 4 * sum(counts.values())  # the embedding is the head: all is read
    assert load.stored_bytes == load.weight_bytes
    assert load.macs == LAYERS * BLOCK + HEAD == sum(counts.values()) - NORMS
    assert load.layers == LAYERS
    assert load.cache_bytes == LAYERS * 2 * NARROW * 2  # k and v, half precision
    assert load.width == HIDDEN
    assert load.context == 128


def test_an_untied_base(untied: Path) -> None:
    load = workload.of_base(base_folder.read(untied))
    total = 4 * sum(parameters(untied).values())
    assert load.stored_bytes == total
    assert load.weight_bytes == total - 4 * HEAD  # rows of the embedding are looked up
    assert load.macs == LAYERS * BLOCK + HEAD


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_a_config_alone_tells_the_same(which: str, tmp_path: Path, request: Any) -> None:
    folder = request.getfixturevalue(which)
    shutil.copy(folder / "config.json", tmp_path)
    alone = workload.of_base(base_folder.read(tmp_path))
    whole = workload.of_base(base_folder.read(folder))
    assert alone.macs == whole.macs
    assert alone.weight_bytes == whole.weight_bytes - 4 * NORMS
    assert alone.cache_bytes == whole.cache_bytes
    assert alone.stored_bytes == whole.stored_bytes - 4 * NORMS


def test_a_base_packed_by_mlx(tied: Path, tmp_path: Path) -> None:
    from mlx_lm.convert import convert

    out = tmp_path / "packed"
    shutil.copytree(tied, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    convert(str(tmp_path / "base"), str(out), quantize=True, q_bits=4, q_group_size=32)
    load = workload.of_base(base_folder.read(out))
    matrices = LAYERS * BLOCK + HEAD
    assert load.macs == matrices
    # 4 bits, and a scale and a bias of 4 bytes (float32) for each 32
    assert load.weight_bytes == matrices // 2 + matrices // 32 * 8 + 4 * NORMS
    (tmp_path / "config").mkdir()
    shutil.copy(out / "config.json", tmp_path / "config")
    alone = workload.of_base(base_folder.read(tmp_path / "config"))
    assert alone.weight_bytes == matrices // 2 + matrices // 32 * 4  # scales in half precision


TOKENIZER = json.dumps(
    {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
     "pre_tokenizer": None, "post_processor": None, "decoder": None,
     "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)  # fmt: skip


def test_of_experts_only_those_that_are_visited(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "moe")
    load = workload.of_base(base_folder.read(tmp_path / "moe"))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n) - HEAD
    assert load.weight_bytes == pytest.approx(4 * (experts / 4 + others), abs=8)
    broken = json.loads((tmp_path / "moe/config.json").read_text())
    del broken["num_experts_per_tok"]
    (tmp_path / "moe/config.json").write_text(json.dumps(broken))
    with pytest.raises(Refused, match="how many experts"):
        workload.of_base(base_folder.read(tmp_path / "moe"))


def test_latent_attention_keeps_less(tied: Path, tmp_path: Path) -> None:
    config = json.loads((tied / "config.json").read_text())
    config |= {"kv_lora_rank": 20, "qk_rope_head_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load = workload.of_base(base_folder.read(tmp_path))
    assert load.cache_bytes == LAYERS * (20 + 4) * 2  # one vector for k and v


def test_an_adapter_beside_its_base(tied: Path, adapter: Path) -> None:
    plain = workload.of_base(base_folder.read(tied))
    load = workload.with_adapter(plain, read(adapter), base_folder.read(tied))
    modules = 2 * LAYERS
    values = LAYERS * 4 * ((HIDDEN + HIDDEN) + (HIDDEN + NARROW))
    assert (load.adapter_macs, load.adapter_bytes) == (values, 4 * values)
    assert load.adapter_ops == 4 * modules
    assert (load.weight_bytes, load.macs) == (plain.weight_bytes, plain.macs)
    fused = workload.with_adapter(plain, read(adapter), base_folder.read(tied), fused=True)
    assert (fused.adapter_bytes, fused.adapter_macs, fused.adapter_ops) == (0, 0, 0)


def test_dora_reads_the_weights_anew(tied: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tied)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    get_peft_model(model, config).save_pretrained(tmp_path)
    plain = workload.of_base(base_folder.read(tied))
    base = base_folder.read(tied)
    lora = workload.with_adapter(plain, read(adapter), base)
    dora = workload.with_adapter(plain, read(tmp_path), base)
    magnitudes = LAYERS * (HIDDEN + NARROW)
    weights = LAYERS * (HIDDEN * HIDDEN + HIDDEN * NARROW)
    assert dora.adapter_bytes - lora.adapter_bytes == 4 * magnitudes + 3 * 2 * weights
    assert dora.adapter_ops == 2 * lora.adapter_ops


def beside(base: Path, adapter: Path) -> workload.Workload:
    model = base_folder.read(base)
    found = read(adapter, ReadOptions(base=model, restore=False))
    return workload.with_adapter(workload.of_base(model), found, model)


def trained(base: Path, out: Path, **config: Any) -> Path:
    """An adapter of rank 4 as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lora = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **config))
    lora.save_pretrained(out, save_embedding_layers=False)
    return out


def test_of_an_adapters_experts_only_those_that_are_visited(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts, visited, moe = 8, 2, 32
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=experts,
        num_experts_per_tok=visited, moe_intermediate_size=moe,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    out = trained(
        tmp_path / "moe", tmp_path / "a", target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    load = beside(tmp_path / "moe", out)
    # of one expert: A and B of gate and up together, and of down
    each = 4 * (HIDDEN + 2 * moe) + 4 * (moe + HIDDEN)
    values = visited * each + 4 * (HIDDEN + 4 * 16)
    assert (load.adapter_macs, load.adapter_bytes) == (values, 4 * values)
    assert load.adapter_ops == 3 * 4


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_embedding_is_looked_up(untied: Path, tmp_path: Path, dora: bool) -> None:
    """One row of A, and all of B; of PEFT's DoRA the norm of the whole table."""
    out = trained(untied, tmp_path, target_modules=["embed_tokens"], use_dora=dora)
    load = beside(untied, out)
    if dora:
        whole = 4 * (VOCABULARY + HIDDEN)
        assert load.adapter_macs == whole
        assert load.adapter_bytes == 4 * (whole + HIDDEN) + 3 * 2 * VOCABULARY * HIDDEN
        return
    assert load.adapter_macs == 4 * HIDDEN
    assert load.adapter_bytes == 4 * (4 + 4 * HIDDEN)


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("alone", [False, True])
def test_mlx_moves_a_tied_head_too(
    which: str, alone: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """mlx-lm's as_linear takes the whole of A, where the embedding is the head."""
    import mlx.core as mx

    tensors = {
        "model.embed_tokens.lora_a": mx.ones((VOCABULARY, 4)),
        "model.embed_tokens.lora_b": mx.ones((4, HIDDEN)),
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "lora", "num_layers": LAYERS,
        "lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["model.embed_tokens"]},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = request.getfixturevalue(which)
    if alone:
        (tmp_path / "base").mkdir()
        shutil.copy(base / "config.json", tmp_path / "base")
        base = tmp_path / "base"
    load = beside(base, tmp_path)
    assert load.adapter_macs == 4 * (HIDDEN + (VOCABULARY if which == "tied" else 0))
    assert load.adapter_bytes == 4 * 4 * (HIDDEN + (VOCABULARY if which == "tied" else 1))


def test_positions_are_looked_up(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=VOCABULARY)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    load = workload.of_base(base_folder.read(tmp_path))
    assert load.macs == 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256) + VOCABULARY * 64
    assert load.stored_bytes - load.weight_bytes == 4 * 512 * 64
    assert load.context == 512


def test_a_package(tied: Path, package: Path) -> None:
    """Half precision: the weights of the base once, whether a function has an adapter or not."""
    found, function = workload.read_package(package, None)
    load = workload.of_package(found, function)
    counts = parameters(tied)
    assert load.macs == sum(counts.values()) - NORMS
    # the embedding is the head; tables of the rotation, 48 tokens, are looked up
    assert 0 <= load.weight_bytes - 2 * sum(counts.values()) < 2000
    assert load.layers == LAYERS
    assert load.buffer_tokens == 48
    assert load.buffer_bytes == LAYERS * 2 * NARROW * 2 * 48
    assert load.cache_bytes == LAYERS * 2 * NARROW * 2
    assert load.adapter_ops == 0


def test_a_package_with_its_adapter(package: Path) -> None:
    found, function = workload.read_package(package, "a")
    assert function == "a"
    load = workload.of_package(found, function)
    values = LAYERS * 4 * ((HIDDEN + HIDDEN) + (HIDDEN + NARROW))
    assert load.adapter_macs == values
    assert load.adapter_bytes == 2 * values
    assert load.adapter_ops >= 3 * 2 * LAYERS  # linear, linear, add, and a scale where it is not 1
    with pytest.raises(Refused, match="no function or adapter"):
        workload.read_package(package, "b")
    with pytest.raises(Refused, match="no function"):
        workload.of_package(found, "b")


def test_a_compressed_package_reads_less(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.mlpackage"
    args = ["compress", package, "--palettize", 4, "-o", out, "--json"]
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    name = workload.read_package(package, None)[1]
    before = workload.of_package(read_package(package), name)
    after = workload.of_package(read_package(out), name)
    assert after.macs == before.macs
    # every matrix of the blocks at 4 bits with a table of 16; the head too, or left alone
    matrices = LAYERS * BLOCK
    tables = 7 * LAYERS * 32
    smallest = (matrices + HEAD) // 2 + tables
    assert smallest <= after.weight_bytes <= matrices // 2 + tables + 2 * HEAD + 2 * NORMS + 2000
    weights = (out / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert after.weight_bytes < weights


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": None}, "number of layers"),
        ({"dtype": "float3", "torch_dtype": "float3"}, "float3"),
        ({"vocab_size": "x"}, "vocab_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "bits 0"),
    ],
)
def test_configs_that_say_too_little(
    tied: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    config = json.loads((tied / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=r"config\.json") as e:
        workload.of_base(base_folder.read(tmp_path))
    assert what in str(e.value)


def test_a_shared_weight_is_read_once(tmp_path: Path) -> None:
    """A weight that two operations share is read once; one that is only looked up is not."""
    mb, types = mil_build.mb, mil_build.types
    weight = np.ones((8, 8), np.float16)

    def body(x: Any, i: Any) -> Any:
        shared = mb.const(val=weight)
        table = mb.const(val=np.ones((512, 8), np.float16))
        once = mb.linear(x=x, weight=shared)
        again = mb.linear(x=once, weight=shared)
        return mb.add(x=again, y=mb.gather(x=table, indices=i, axis=0))

    made = mil_build.one(tmp_path, body, x=((1, 8), types.fp16), i=((1,), types.int32))
    load = workload.of_package(read_package(made), "main")
    assert load.weight_bytes == weight.nbytes
    assert load.macs == 2 * 64
    assert load.stored_bytes == weight.nbytes + 512 * 8 * 2


def test_compressed_constants_that_are_made_of_others(tmp_path: Path) -> None:
    """Codes, their table and a scale on top, each in an operation of its own: all are read."""
    mb, types = mil_build.mb, mil_build.types
    rows, columns = 64, 128

    def body(x: Any) -> Any:
        uint4 = types.type_mapping.nptype_from_builtin(types.uint4)
        codes = np.zeros((rows, columns)).astype(uint4)
        tables = np.ones((rows // 4, 1, 16, 1), np.float16)
        table = mb.constexpr_lut_to_dense(indices=codes, lut=tables)
        scale = np.ones((rows, 1), np.float16)
        weight = mb.constexpr_blockwise_shift_scale(data=table, scale=scale)
        return mb.linear(x=x, weight=weight)

    made = mil_build.one(tmp_path, body, x=((1, columns), types.fp16))
    load = workload.of_package(read_package(made), "main")
    bias = 2 * rows  # coremltools gives every linear operation one, of zeros
    assert load.weight_bytes - bias == rows * columns // 2 + rows // 4 * 16 * 2 + rows * 2
    assert load.macs == rows * columns
