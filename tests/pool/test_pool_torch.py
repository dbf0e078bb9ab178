"""The pool on torch against stock PEFT's logits, and the base's bytes."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraduct import AdapterPool
from loraduct.errors import LoraductError, Refused

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": ("llama", {"target_modules": ALL}),
    "rslora with patterns": ("llama", {
        "target_modules": ALL, "use_rslora": True, "rank_pattern": {"layers.1.*q_proj": 7}}),
    "dora, with biases in the base": ("llama", {"target_modules": ALL, "use_dora": True}),
    "low-rank bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained bias": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied, embedding": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, head": ("qwen2", {"target_modules": ["lm_head"]}),
    "scaled embedding": ("gemma2", {"target_modules": ["embed_tokens"]}),
    "scaled embedding, dora": ("gemma2", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]}),
    "tokens, tied": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, dora": ("gpt2", {
        "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "experts": ("qwen3_moe", {
        "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj",
                                                            "mlp.experts.down_proj"]}),
}  # fmt: skip


def fingerprint(model):
    """Of every parameter and buffer: name, identity, bytes; and of every hook."""
    found = hashlib.sha256()
    for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found.update(f"{name} {id(t)} {t.data_ptr()}".encode())
        found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return found.hexdigest(), hooks


def close(found, wanted, tolerance=1e-5):
    return np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(fusing, bases, tmp_path, case, fused):
    name, config = CASES[case]
    base = bases(name)
    adapter = fusing.trained(base, tmp_path / "a", **config)
    wanted = fusing.unfused(base, (adapter, 1.0))
    model = fusing.loaded(base)
    before, plain = fingerprint(model), fusing.logits(model)
    with AdapterPool(model, base, fused=fused) as pool:
        pool.load("a", adapter)
        assert np.array_equal(fusing.logits(model), plain)
        pool.activate("a")
        found = fusing.logits(model)
        assert close(found, wanted)
        assert np.abs(plain - wanted).max() > 1000 * np.abs(found - wanted).max()
        pool.deactivate()
        assert np.array_equal(fusing.logits(model), plain)
        pool.activate("a")
    assert np.array_equal(fusing.logits(model), plain)
    assert fingerprint(model) == before


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    "stack",
    [
        (("one", 0.5), ("two", -1.5)),
        (("one", 0.5), ("dora", 1.0)),
        (("dora", 1.0), ("one", 0.5)),
        (("two", 2.0), ("norms", 1.0)),
        (("one", 0.25), ("dora", 1.0), ("two", 3.0)),
    ],
)
def test_stack_in_pefts_order(fusing, bases, adapters, stack, fused):
    """DoRA multiplies what stands before it, as in PEFT's forward pass."""
    base = bases("llama")
    wanted = fusing.unfused(base, *((adapters[n], w) for n, w in stack))
    model = fusing.loaded(base)
    with AdapterPool(model, base, fused=fused) as pool:
        for name in adapters:
            pool.load(name, adapters[name])
        pool.activate("two")  # of what was active before, nothing may be left
        pool.activate(*stack)
        assert close(fusing.logits(model), wanted)


def test_unfused_touches_no_weight_of_a_plain_lora(fusing, bases, adapters):
    model = fusing.loaded(bases("llama"))
    before = fingerprint(model)[0]
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("one", adapters["one"])
        pool.load("dora", adapters["dora"])
        pool.activate("one", "dora")
        fusing.logits(model)
        assert fingerprint(model)[0] == before
        assert pool.exchanged_bytes == 0


def test_fused_rounds_once_and_restores_half_precision(fusing, bases, adapters, tmp_path):
    """W + dW in float32, rounded once; a subtraction would not give float16 weights back."""
    model = fusing.loaded(bases("llama")).half()
    before, layer = fingerprint(model), model.model.layers[1].self_attn.q_proj
    weight = layer.weight.detach().double().numpy()
    with AdapterPool(model, bases("llama"), fused=True) as pool:
        pool.load("one", adapters["one"])
        pool.activate("one")
        a, b = fusing.factors(adapters["one"])["model.layers.1.self_attn.q_proj"]
        exact = weight + 1.5 * b @ a
        error = np.abs(layer.weight.detach().double().numpy() - exact)
        assert (error <= 2.0**-11 * np.abs(exact) * 1.001 + 1e-7).all()
        assert (layer.weight.detach().double().numpy() != weight).any()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("adapter", "factor", "fused", "what"),
    [
        ("one", 1e4, True, "weight: does not fit the model's float16"),
        ("norms", 1e6, False, "input_layernorm.weight: does not fit the model's float16"),
        ("tokens", 1e6, False, "embed_tokens.weight: does not fit the model's float16"),
        ("biases", 1e6, True, "bias: does not fit the model's float16"),
    ],
)
def test_what_overflows_half_precision_is_refused(
    fusing, bases, adapters, tmp_path, adapter, factor, fused, what
):
    """Finite in the file, Inf in the model: refused before anything changes."""
    if adapter == "biases":
        config = {"target_modules": ["q_proj"], "lora_bias": True}
        source = fusing.trained(bases("llama"), tmp_path / "biases", **config)
        kept = ("lora_A", "lora_B.weight")
    else:
        source, kept = adapters[adapter], ("q_proj.lora_A",)
        kept += ("lora_A", "lora_B") if adapter in ("norms", "tokens") else ()
    tensors = fusing.tensors(source)
    scaled = {n: t if any(k in n for k in kept) else t * factor for n, t in tensors.items()}
    assert all(t.isfinite().all() for t in scaled.values())
    folder = stored(source, tmp_path / "large", scaled)
    model = fusing.loaded(bases("llama")).half()
    before = fingerprint(model)

    def taken(pool, path):
        pool.load("a", path)
        pool.activate("a")

    with AdapterPool(model, bases("llama"), fused=fused) as pool:
        with pytest.raises(Refused, match=what) as caught:
            taken(pool, folder)
        assert "\n" not in str(caught.value)
        assert "load the base in bfloat16 or float32" in str(caught.value)
        assert pool.active == ()
        assert fingerprint(model)[0] == before[0]
    wide = fusing.loaded(bases("llama")).bfloat16()  # the way out that the message names
    with AdapterPool(wide, bases("llama"), fused=fused) as pool:
        taken(pool, folder)


def test_conv(tmp_path):
    """A convolution with stride and padding, LoRA and DoRA, against PEFT on the same module."""
    from peft import LoraConfig, get_peft_model

    from loraduct.converters.pool_parts import Held, Low
    from loraduct.converters.pool_torch import Torch, _lengths

    for dora in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(5, 7, (3, 2), stride=2, padding=1))
        x = torch.randn(2, 5, 9, 8)
        base = net[0].weight.detach().clone()
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=dora)
        peft = get_peft_model(net, config)
        conv = peft.base_model.model[0]
        with torch.no_grad():
            conv.lora_B["default"].weight.normal_(0, 0.1)
            if dora:
                conv.lora_magnitude_vector["default"].weight.mul_(1.2)
            wanted = peft(x)
            a, b = conv.lora_A["default"].weight.clone(), conv.lora_B["default"].weight.clone()
            plain = torch.nn.Sequential(conv.base_layer)
            for fused in (False, True):
                runtime = Torch(plain, fused)
                low = Low(a, b, 2.0, "conv")
                if dora:
                    m = conv.lora_magnitude_vector["default"].weight.reshape(-1)
                    low.factor = m / _lengths(plain[0], low, base)
                runtime.show([(Held(tmp_path, 0, {"0": low}), 1.0)])
                assert torch.allclose(plain(x), wanted, atol=1e-5)
                runtime.show(())
                assert torch.equal(plain[0].weight, base)


@pytest.mark.parametrize(
    ("stack", "what"),
    [
        ([("dora", 0.5)], "is DoRA.*weight other than 1 is not defined"),
        ([("norms", 0.5)], "replaces this weight: weighted by 0.5"),
        ([("norms", 1.0), ("norms2", 1.0)], "changed by another adapter too"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_changes(
    fusing, bases, adapters, stack, what
):
    model = fusing.loaded(bases("llama"))
    with AdapterPool(model, bases("llama")) as pool:
        for name, path in {**adapters, "norms2": adapters["norms"]}.items():
            pool.load(name, path)
        pool.activate("one")
        before = fusing.logits(model)
        with pytest.raises(Refused, match=what) as caught:
            pool.activate(*stack)
        assert "\n" not in str(caught.value)
        assert np.array_equal(fusing.logits(model), before)
        assert pool.active == (("one", 1.0),)


def test_another_base_is_refused(fusing, bases, adapters, tmp_path):
    other = fusing.trained(bases("qwen2"), tmp_path / "a", target_modules=["up_proj"])
    moe = fusing.trained(
        bases("qwen3_moe"), tmp_path / "b", target_parameters=["mlp.experts.down_proj"]
    )
    model = fusing.loaded(bases("llama"))
    before = fingerprint(model)
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", other)  # a tiny qwen2 has the same up_proj: nothing tells them apart
        for path in (moe, adapters["one"].parent / "none"):
            with pytest.raises(LoraductError) as caught:
                pool.load("b", path)
            assert "\n" not in str(caught.value)
    assert fingerprint(model) == before
    # the folder is right, the live model isn't
    narrow = fusing.loaded(bases("gpt2"))
    with AdapterPool(narrow, bases("llama")) as pool, pytest.raises(Refused, match="no such place"):
        pool.load("one", adapters["one"])


def test_peft_model_is_refused(fusing, bases, adapters):
    from peft import PeftModel

    model = PeftModel.from_pretrained(fusing.loaded(bases("llama")), adapters["one"])
    with pytest.raises(LoraductError, match="give the base model itself"):
        AdapterPool(model, bases("llama"))


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_every_format_on_one_model(cli, repo, fusing, bases, adapters, tmp_path, fused):
    """MLX's folder, packed ones and a package's adapter: stock PEFT with the numbers that each holds."""
    base, source = bases("llama"), adapters["one"]
    made = {name: tmp_path / name for name in ("mlx", "int8", "lut3")}
    package = tmp_path / "p.mlpackage"
    for words in (
        ["convert", source, "--to", "mlx", "--base", base, "-o", made["mlx"]],
        ["compress", source, "--quantize", "int8", "-o", made["int8"]],
        ["compress", source, "--palettize", "3", "-o", made["lut3"]],
        ["package", "--base", base, "-a", f"one={source}", "--context", "40", "-o", package],
    ):
        done = cli(*words)
        assert done.exit_code == 0, done.stderr
    halves = {n: t.half() for n, t in fusing.tensors(source).items()}  # as packages store factors
    wanted = {
        "mlx": source,
        "package": stored(source, tmp_path / "halves", halves),
        **{
            n: stored(source, tmp_path / f"{n}-plain", packed(repo, made[n]))
            for n in ("int8", "lut3")
        },
    }
    logits = {n: fusing.unfused(base, (folder, 1.0)) for n, folder in wanted.items()}
    # what the forms hold differs by more than what the pool may be off
    assert not any(close(logits[n], logits["mlx"]) for n in ("int8", "lut3"))
    model = fusing.loaded(base)
    before, plain = fingerprint(model), fusing.logits(model)
    with AdapterPool(model, base, fused=fused) as pool:
        for name, path in {**made, "package": Path(f"{package}:one")}.items():
            pool.load(name, path)
            with pool.using(name):
                assert close(fusing.logits(model), logits[name]), name
            assert np.array_equal(fusing.logits(model), plain)
    assert fingerprint(model) == before


def packed(repo, folder):
    """The numbers of a packed adapter, by the reader that docs/packed.md gives."""
    code = re.search(r"```python\n(.*?)```", (repo / "docs/packed.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code[1], "docs/packed.md", "exec"), names)  # noqa: S102
    found = names["read_packed"](folder / "adapter_packed.safetensors")
    return {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in found.items()}


def stored(source, folder, tensors):
    """PEFT's folder with other numbers."""
    folder.mkdir()
    shutil.copy(source / "adapter_config.json", folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_recomputed_would_be_seen(fusing, bases, adapters):
    """A pool that subtracts what it added, or gives an equal copy back, does not pass for ours."""
    for copied in (False, True):
        model = fusing.loaded(bases("llama"))
        before = fingerprint(model)
        pool = AdapterPool(model, bases("llama"), fused=True)
        runtime, own = pool._runtime, {n: p.detach().clone() for n, p in model.named_parameters()}
        pool.load("one", adapters["one"])
        pool.activate("one")
        for name, kept in runtime._kept.items():
            fused = model.get_parameter(name).detach()
            given = own[name] if copied else fused - (fused - kept.detach())
            runtime._kept[name] = torch.nn.Parameter(given, requires_grad=False)
        pool.close()
        assert fingerprint(model) != before
        same = all(torch.equal(p, own[n]) for n, p in model.named_parameters())
        assert same == copied  # the subtraction changed bits


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("split", [False, True], ids=["one adapter", "two"])
def test_tokens_beside_an_update_of_a_tied_weight_are_refused(
    fusing, bases, tmp_path, fused, side, split
):
    """Of an embedding PEFT can't train both in one adapter; the model stays as it was."""
    base, tokens = bases("qwen2"), {"trainable_token_indices": [3, 44]}
    if side == "embed_tokens" and not split:
        with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
            fusing.trained(base, tmp_path / "a", target_modules=[side], **tokens)
        return
    first = ["q_proj"] if split else [side]
    given = {"a": fusing.trained(base, tmp_path / "a", 1, target_modules=first, **tokens)}
    if split:
        given["b"] = fusing.trained(base, tmp_path / "b", 2, target_modules=[side])
    model = fusing.loaded(base)
    before = fingerprint(model)
    with AdapterPool(model, base, fused=fused) as pool:
        for name, folder in given.items():
            pool.load(name, folder)
        with pytest.raises(Refused, match="is adapted and replaced at once") as caught:
            pool.activate(*given)
        assert "\n" not in str(caught.value)
        assert fingerprint(model)[0] == before[0]
    assert fingerprint(model) == before
