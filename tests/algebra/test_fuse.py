"""`loraduct fuse` against stock PEFT and dense float64 arithmetic."""

from __future__ import annotations

import json
import shutil

import fusing
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraduct.formats import base as base_folder
from loraduct.halves import narrowed, widened

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": ("llama", {"target_modules": ALL}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "rslora with patterns": ("llama", {
        "target_modules": ALL, "use_rslora": True, "rank_pattern": {"layers.1.*q_proj": 7}}),
    "low-rank bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained bias": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "both biases": ("llama", {
        "target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "lora_only"}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied, embedding": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, head": ("qwen2", {"target_modules": ["lm_head"]}),
    "tied in mlx always": ("gemma2", {"target_modules": ["embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, dora": ("gpt2", {
        "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "other names in files": ("mixtral", {
        "target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    "experts": ("qwen3_moe", {
        "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj",
                                                            "mlp.experts.down_proj"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(name, dtype=torch.float32, **more):
        key = name, dtype, *more
        if key not in made:
            made[key] = fusing.saved(name, tmp_path_factory.mktemp("base"), dtype, **more)
        return made[key]

    return get


def fused(cli, base, out, *words):
    done = cli("fuse", *words, "--base", base, "-o", out)
    assert done.exit_code == 0, done.stderr
    return out


@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(cli, bases, tmp_path, case):
    name, config = CASES[case]
    base = bases(name)
    adapter = fusing.trained(base, tmp_path / "a", **config)
    out = fused(cli, base, tmp_path / "out", adapter)
    wanted, plain = fusing.unfused(base, (adapter, 1.0)), fusing.logits(fusing.loaded(base))
    found = fusing.logits(fusing.loaded(out))
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()
    assert np.abs(plain - wanted).max() > 1000 * np.abs(found - wanted).max()


def test_weights_of_several(cli, bases, tmp_path):
    base = bases("llama")
    one = fusing.trained(base, tmp_path / "a", 1, target_modules=ALL)
    two = fusing.trained(base, tmp_path / "b", 2, target_modules=["q_proj"], r=3)
    out = fused(cli, base, tmp_path / "out", f"{one}:-0.5", f"{two}:2")
    wanted = fusing.unfused(base, (one, -0.5), (two, 2.0))
    assert np.abs(fusing.logits(fusing.loaded(out)) - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("turned", [False, True])
def test_dora_multiplies_what_stands_before_it(cli, bases, tmp_path, turned):
    """As in stock PEFT's forward pass; so the order counts. The length is of the base's own rows."""
    base = bases("llama")
    one = fusing.trained(base, tmp_path / "a", 1, target_modules=["q_proj"])
    two = fusing.trained(base, tmp_path / "b", 2, target_modules=["q_proj"], use_dora=True)
    given = [two, f"{one}:0.5"] if turned else [f"{one}:0.5", two]
    after = fusing.tensors(fused(cli, base, tmp_path / "out", *given))
    for module, (a, b) in fusing.factors(one).items():
        weight = fusing.tensors(base)[f"{module}.weight"].double().numpy()
        a2, b2 = fusing.factors(two)[module]
        m = fusing.tensors(two)[f"base_model.model.{module}.lora_magnitude_vector"].double().numpy()
        moved = weight + 1.5 * b2 @ a2
        factor = (m / np.linalg.norm(moved, axis=1))[:, None]
        plain = 0.75 * b @ a
        wanted = moved * factor + plain if turned else (moved + plain) * factor
        assert np.abs(after[f"{module}.weight"].double().numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["keep", "f16", "bf16"])
def test_rounded_once(cli, bases, tmp_path, dtype, way):
    """Every value is the stored one nearest to a sum that float32 arithmetic is off by at most."""
    base = bases("llama", dtype)
    adapter = fusing.trained(base, tmp_path / "a", target_modules=ALL)
    out = fused(cli, base, tmp_path / "out", adapter, "--dtype", way)
    before, after = fusing.tensors(base), fusing.tensors(out)
    kind = {"keep": dtype, "f16": torch.float16, "bf16": torch.bfloat16}[way]
    assert list(before) == list(after)
    for module, (a, b) in fusing.factors(adapter).items():
        weight, got = before[f"{module}.weight"].double().numpy(), after[f"{module}.weight"]
        assert got.dtype == kind
        exact, stored = weight + 1.5 * b @ a, got.double().numpy()
        slack = 2e-6 * (np.abs(weight) + 1.5 * np.abs(b) @ np.abs(a))
        low, high = (
            torch.from_numpy(exact + s).to(torch.float32).to(kind).double().numpy()
            for s in (-slack, slack)
        )
        assert ((low <= stored) & (stored <= high)).all()
        assert np.mean(low == high) > (0.5 if kind == torch.float32 else 0.95) or (
            kind == torch.float32
        )
    assert json.loads((out / "config.json").read_text())["dtype"] == str(kind).removeprefix(
        "torch."
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bit_equal_to_a_float32_sum(cli, bases, tmp_path, dtype):
    """Factors of few bits, whose products are exact in float32 in whichever order they are added: then
    only the sum with the weight is rounded to float32, and once more to what is stored."""
    base = bases("llama", dtype)
    adapter = fusing.trained(base, tmp_path / "a", target_modules=ALL)
    file = adapter / "adapter_model.safetensors"
    held = {n: (t * 256).round().clamp(-63, 63) / 256 for n, t in load_file(file).items()}
    save_file(held, file, {"format": "pt"})
    before, after = (
        fusing.tensors(base),
        fusing.tensors(fused(cli, base, tmp_path / "out", adapter)),
    )
    for module, (a, b) in fusing.factors(adapter).items():
        weight = before[f"{module}.weight"].float()
        wanted = (weight + torch.from_numpy(1.5 * b @ a).float()).to(dtype)
        assert torch.equal(after[f"{module}.weight"], wanted), module
        assert not torch.equal(wanted, before[f"{module}.weight"])


def test_shards_in_and_out(cli, bases, tmp_path):
    base = bases("llama", torch.bfloat16, max_shard_size="50KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    (base / "tokenizer.json").write_text("{}")
    one = fused(cli, base, tmp_path / "one", adapter)
    many = fused(cli, base, tmp_path / "many", adapter, "--shard-size", "50KB")
    assert [p.name for p in one.glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    sizes = {n: (many / n).stat().st_size for n in set(index["weight_map"].values())}
    assert len(sizes) > 2
    assert (many / "tokenizer.json").read_text() == "{}"
    left, right = fusing.tensors(one), fusing.tensors(many)
    assert left.keys() == right.keys() == index["weight_map"].keys()
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert torch.equal(left["model.norm.weight"], fusing.tensors(base)["model.norm.weight"])
    assert np.array_equal(*(fusing.logits(fusing.loaded(f)) for f in (one, many)))


def test_same_bytes_again_and_force(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    out = fused(cli, base, tmp_path / "out", adapter)
    before = (out / "model.safetensors").read_bytes()
    refused = cli("fuse", adapter, "--base", base, "-o", out)
    assert refused.exit_code == 1
    assert "exists; use --force" in refused.stderr
    fused(cli, base, out, adapter, "--force")
    assert (out / "model.safetensors").read_bytes() == before
    (out / "mine.txt").write_text("")
    refused = cli("fuse", adapter, "--base", base, "-o", out, "--force")
    assert "not a model's (mine.txt)" in refused.stderr


def test_what_the_model_needs_is_carried_and_the_rest_is_named(cli, bases, tmp_path):
    """With code that its config names and what this imports, which transformers then loads."""
    from transformers import AutoConfig

    base = shutil.copytree(bases("llama"), tmp_path / "base")
    config = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "other/repo--modeling_y.Y"}
    fusing.edited(base, auto_map=config, model_type="x_llama")
    imports = "from .helper_x import SIZE\nfrom transformers import LlamaConfig\n"
    code = imports + "class XConfig(LlamaConfig):\n    model_type = 'x_llama'\n    size = SIZE\n"
    (base / "configuration_x.py").write_text(code)
    (base / "helper_x.py").write_text("SIZE = 7\n")
    (base / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tok_x.T", null]}}'
    )
    templates = base / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    (tmp_path / "secret").write_text("mine")
    (templates / "out.jinja").symlink_to(tmp_path / "secret")
    kept = ("tok_x.py", "qwen.tiktoken", "tokenizer.model.v3", "chat_template.jinja", "LICENSE")
    for name in (*kept, "modeling_y.py", "setup.py", "params.json", ".gitattributes"):
        (base / name).write_text("")
    adapter = fusing.trained(bases("llama"), tmp_path / "a", target_modules=["q_proj"])
    words = ("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    done = cli(*words)
    assert done.exit_code == 0, done.stderr
    assert "note: left behind: modeling_y.py, params.json, setup.py\n" in done.stdout
    out = tmp_path / "out"
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    code = {"configuration_x.py", "helper_x.py", "tokenizer_config.json"}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert there == {*kept, *code, *weights, "additional_chat_templates/tool.jinja"}
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).size == 7
    assert cli(*words, "--force").exit_code == 0
    (out / "setup.py").write_text("")
    assert "not a model's (setup.py)" in cli(*words, "--force").stderr


def test_dry_run_writes_nothing(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    done = cli("fuse", adapter, "--base", base, "--dry-run", "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["parameters"] == 2
    assert said["output"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_bias_that_the_base_lacks_is_refused(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["up_proj"], lora_bias=True)
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "trains a bias that the base does not have" in done.stderr


def test_positions_are_no_conv1d(cli, bases, tmp_path):
    """As many of them as there are columns: the update is not turned, whatever the file says it is."""
    base = bases("gpt2")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    stem = "base_model.model.transformer.wpe.lora_"
    save_file(
        load_file(file) | {f"{stem}A.weight": a, f"{stem}B.weight": b}, file, {"format": "pt"}
    )
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"target_modules": ["c_attn", "wpe"]}))
    after = fusing.tensors(fused(cli, base, tmp_path / "out", adapter))["transformer.wpe.weight"]
    wanted = fusing.tensors(base)["transformer.wpe.weight"] + 1.5 * b @ a
    assert torch.allclose(after, wanted, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"bias": "lora_only"}, {"lora_bias": True}),
        ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 44]}),
        ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3, 44]}),
        ({"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, {}),
    ],
    ids=["bias", "embedding", "adapted embedding", "matrix"],
)
def test_what_one_replaces_no_other_changes(cli, bases, tmp_path, one, two, turned):
    base, q_proj = bases("llama"), {"target_modules": ["q_proj"]}
    first = fusing.trained(base, tmp_path / "a", 1, **q_proj | one)
    second = fusing.trained(base, tmp_path / "b", 2, **q_proj | two)
    given = [second, first] if turned else [first, second]
    done = cli("fuse", *given, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "is changed by another adapter too" in done.stderr
    assert not (tmp_path / "out").exists()


def _nan(base, adapter):
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    next(iter(held.values()))[0, 0] = float("nan")
    save_file(held, file, {"format": "pt"})


def _wide(base, adapter):
    file = adapter / "adapter_model.safetensors"
    held = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in load_file(file).items()}
    save_file(held, file, {"format": "pt"})


def _elsewhere(base, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({n.replace("layers.", "blocks."): t for n, t in load_file(file).items()}, file,
              {"format": "pt"})  # fmt: skip


def _gptq(base, adapter):
    fusing.edited(base, quantization_config={"quant_method": "gptq", "bits": 4})


def _huge(base, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e4 for n, t in load_file(file).items()}, file, {"format": "pt"})


def _record(base, adapter):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "base_sha256": "0" * 64})


BROKEN = {
    "NaN": (_nan, "holds NaN or Inf"),
    "shapes": (_wide, "updates a weight of shape [64, 128], the base"),
    "no common modules": (_elsewhere, "blocks.0.self_attn.q_proj: the base"),
    "GPTQ": (_gptq, "is quantised by gptq: give the unquantised model"),
    "overflow": (_huge, "does not fit F16 with the adapter in it"),
    "another copy": (_record, "its bytes are not those of the base the adapter records"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused_in_one_line_and_nothing_written(cli, bases, tmp_path, case):
    base = shutil.copytree(bases("llama", torch.float16), tmp_path / "base")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    change, says = BROKEN[case]
    change(base, adapter)
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("split", [False, True], ids=["one adapter", "two"])
def test_tokens_and_a_tied_head_are_not_parted_silently(cli, bases, tmp_path, split):
    base, tokens = bases("qwen2"), {"trainable_token_indices": [3, 44]}
    first = {"target_modules": ["q_proj"]} if split else {"target_modules": ["lm_head"]}
    adapters = [fusing.trained(base, tmp_path / "a", 1, **first, **tokens)]
    if split:
        adapters.append(fusing.trained(base, tmp_path / "b", 2, target_modules=["lm_head"]))
    done = cli("fuse", *adapters, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "trainable_tokens_delta: trains tokens, rows of embedding and head alike" in done.stderr
    assert not (tmp_path / "out").exists()


def test_exact_base_is_proven_and_kin_is_a_flag(cli, bases, tmp_path):
    from loraduct.converters.fuse_folder import fingerprint

    base = bases("llama", torch.float16)
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    record = fingerprint(base_folder.read(base))
    save_file(load_file(file), file, {"format": "pt", "base_sha256": record})
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert "byte for byte the one it was made for" in done.stdout
    other = bases("llama", torch.bfloat16)
    assert cli("fuse", adapter, "--base", other, "-o", tmp_path / "kin").exit_code == 1
    done = cli("fuse", adapter, "--base", other, "-o", tmp_path / "kin", "--allow-kin")
    assert done.exit_code == 0
    assert "taken for a copy of its base" in done.stdout


def test_no_record_is_said(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert "records no fingerprint of its base" in done.stdout


def test_weights_of_nothing_and_no_numbers(cli, bases, tmp_path):
    base = bases("llama")
    one = fusing.trained(base, tmp_path / "a", 1, target_modules=["q_proj"])
    two = fusing.trained(base, tmp_path / "b", 2, target_modules=["q_proj"])
    out = "--base", base, "-o", tmp_path / "out"
    for words, code, says in (
        ([f"{one}:0"], 1, "every weight is 0: nothing is left to fuse"),
        ([f"{one}:nan"], 2, "nan is no weight"),
        ([one, "--min-effect", "nan"], 2, "nan is not a finite number"),
        ([one, "--growth", "nan"], 2, "nan is not a finite number"),
    ):
        done = cli("fuse", *words, *out)
        assert done.exit_code == code
        assert says in done.stderr
        assert not (tmp_path / "out").exists()
    done = cli("fuse", one, f"{two}:0", *out)
    assert done.exit_code == 0
    assert "note: b: has weight 0: it contributes nothing" in done.stdout


def test_another_base_is_refused(cli, bases, tmp_path):
    adapter = fusing.trained(bases("llama"), tmp_path / "a", target_modules=["q_proj"])
    done = cli("fuse", adapter, "--base", bases("gpt2"), "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "made for another base" in done.stderr


def test_halves_as_numpy_has_them():
    codes = np.arange(65536, dtype=np.uint16)
    finite = codes[np.isfinite(codes.view(np.float16))]
    wide = widened(finite, np.empty(finite.shape, np.float32))
    assert np.array_equal(wide.view(np.uint32), finite.view(np.float16).astype("f4").view("u4"))
    rng = np.random.default_rng(0)
    any_ = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    exact = np.sort(finite.view(np.float16).astype(np.float64))
    middle = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    edges = np.float32([65519, 65520, 65536, 1e30, -1e30, 0, -0.0, np.inf])
    values = np.concatenate([any_[np.isfinite(any_)], middle, edges])
    with np.errstate(over="ignore"):
        assert np.array_equal(narrowed(values), values.astype(np.float16).view(np.uint16))
