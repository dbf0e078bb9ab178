"""The pool on MLX against stock mlx-lm's `load_adapters`, and for what only PEFT has, against PEFT."""

from __future__ import annotations

import numpy as np
import pytest

from loraduct import AdapterPool
from loraduct.errors import LoraductError, Refused

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
CASES = {
    "lora": ("llama", {"keys": [*ATTENTION, "mlp.down_proj"]}),
    "dora": ("llama", {"keys": ATTENTION, "kind": "dora"}),
    "last layer": ("llama", {"keys": ATTENTION, "num_layers": 1}),
    "embedding": ("llama", {"keys": ["model.embed_tokens"]}),
    "tied embedding": ("qwen2", {"keys": ["model.embed_tokens", "self_attn.q_proj"]}),
    "experts": ("qwen3_moe", {"keys": ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"]}),
}


def arrays(model):
    """Every array by its path: its identity and bytes; and every module's type."""
    from mlx.utils import tree_flatten

    held = {n: (id(a), np.array(a).tobytes()) for n, a in tree_flatten(model.parameters())}
    return held, {n: type(m).__name__ for n, m in model.named_modules()}


def run(peers, fusing, model):
    return peers.mlx_run(model, fusing.IDS.numpy())[0]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_computes_what_mlx_lm_computes(peers, fusing, bases, tmp_path, case, fused):
    name, given = CASES[case]
    base = bases(name)
    peers.save_mlx(base, tmp_path / "a", fusing.IDS.numpy(), **given)
    wanted = peers.mlx_logits(base, tmp_path / "a", fusing.IDS.numpy())[0]
    model = peers.mlx_base(base)
    before, plain = arrays(model), run(peers, fusing, model)
    with AdapterPool(model, base, fused=fused) as pool:
        pool.load("a", tmp_path / "a")
        pool.activate("a")
        found = run(peers, fusing, model)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
        assert np.abs(plain - wanted).max() > 1000 * np.abs(found - wanted).max()
        pool.deactivate()
        assert np.array_equal(run(peers, fusing, model), plain)
        pool.activate("a")
    assert np.array_equal(run(peers, fusing, model), plain)
    assert arrays(model) == before


PEFTS = {
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
    "low-rank bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "trained bias": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]}),
    "tied, one side": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied, the other": ("qwen2", {"target_modules": ["lm_head"]}),
    "tied, tokens": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]}),
    "tied, tokens beside the head": ("qwen2", {
        "target_modules": ["lm_head"], "trainable_token_indices": [3, 44]}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"],
                              "target_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFTS)
def test_pefts_adapters_on_mlx(peers, fusing, bases, tmp_path, case):
    """Some have no form in mlx-lm's files; beside a live model they need none."""
    name, config = PEFTS[case]
    base = bases(name)
    adapter = fusing.trained(base, tmp_path / "a", **config)
    wanted = fusing.unfused(base, (adapter, 1.0))
    model = peers.mlx_base(base)
    before, plain = arrays(model), run(peers, fusing, model)
    with AdapterPool(model, base) as pool:
        pool.load("a", adapter)
        pool.activate("a")
        found = run(peers, fusing, model)
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
        assert np.abs(plain - wanted).max() > 100 * np.abs(found - wanted).max()
    assert arrays(model) == before


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    "stack", [(("one", 0.5), ("dora", 1.0)), (("dora", 1.0), ("one", 0.5)), (("two", -2.0),)]
)
def test_stack_in_pefts_order(peers, fusing, bases, adapters, stack, fused):
    base = bases("llama")
    wanted = fusing.unfused(base, *((adapters[n], w) for n, w in stack))
    model = peers.mlx_base(base)
    with AdapterPool(model, base, fused=fused) as pool:
        for name in ("one", "two", "dora"):
            pool.load(name, adapters[name])
        pool.activate("two")
        pool.activate(*stack)
        found = run(peers, fusing, model)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packed_base(peers, fusing, bases, tmp_path, kind):
    """On a 4-bit base, as mlx-lm's own loader; fusing into it is refused by name."""
    import json

    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(bases("llama"))
    model, config = quantize_model(model, config, group_size=64, bits=4)
    base = tmp_path / "base"
    save_model(base, model)
    (base / "config.json").write_text(json.dumps(config))
    keys = ["self_attn.q_proj", "self_attn.o_proj"]
    peers.save_mlx(base, tmp_path / "a", fusing.IDS.numpy(), keys=keys, kind=kind)
    wanted = peers.mlx_logits(base, tmp_path / "a", fusing.IDS.numpy())[0]
    live = peers.mlx_base(base)
    plain = run(peers, fusing, live)
    with AdapterPool(live, base) as pool:
        pool.load("a", tmp_path / "a")
        pool.activate("a")
        found = run(peers, fusing, live)
        # kernels for packed weights and plain ones sum in different orders
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
        assert np.abs(plain - wanted).max() > 100 * np.abs(found - wanted).max()
    with (
        AdapterPool(live, base, fused=True) as pool,
        pytest.raises(Refused, match="is packed in this model"),
    ):
        pool.load("a", tmp_path / "a")
    assert mx.array_equal(mx.array(plain), mx.array(run(peers, fusing, live)))


def test_read_in_another_thread_runs_in_this_one(peers, fusing, bases, adapters):
    model = peers.mlx_base(bases("llama"))
    wanted = fusing.unfused(bases("llama"), (adapters["dora"], 1.0))
    with AdapterPool(model, bases("llama"), fused=False) as pool:
        pool.prefetch("dora", adapters["dora"]).result(timeout=60)
        with pool.using("dora") as live:
            found = run(peers, fusing, live)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("more", [{}, {"trainable_token_indices": [3, 44]}], ids=["", "tokens"])
def test_what_fusing_would_do_to_the_other_side_is_refused(peers, fusing, bases, tmp_path, more):
    adapter = fusing.trained(bases("qwen2"), tmp_path / "a", target_modules=["lm_head"], **more)
    model = peers.mlx_base(bases("qwen2"))
    with (
        AdapterPool(model, bases("qwen2"), fused=True) as pool,
        pytest.raises(Refused, match="tied to the other side") as caught,
    ):
        pool.load("a", adapter)
    assert "\n" not in str(caught.value)


SEED_OSS = {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True,
            "attention_out_bias": False}  # fmt: skip


@pytest.fixture
def by_weight(fusing, bases, monkeypatch):
    """A tied base whose head mlx-lm computes as `h @ embed_tokens.weight.T`."""
    import inspect

    from mlx_lm.models import seed_oss

    assert "embed_tokens.weight.T" in inspect.getsource(seed_oss)
    monkeypatch.setitem(fusing.BASES, "seed_oss", SEED_OSS)
    return bases("seed_oss")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"], "use_rslora": True},
    ],
    ids=["head", "dora", "embedding", "head and more"],
)
def test_head_of_a_model_that_multiplies_by_its_embedding(
    peers, fusing, by_weight, tmp_path, config
):
    adapter = fusing.trained(by_weight, tmp_path / "a", **config)
    other = fusing.trained(by_weight, tmp_path / "b", 2, target_modules=["lm_head"])
    wanted = fusing.unfused(by_weight, (adapter, 1.0))
    both = fusing.unfused(by_weight, (adapter, 1.0), (other, 0.5))
    model = peers.mlx_base(by_weight)
    before, plain = arrays(model), run(peers, fusing, model)
    with AdapterPool(model, by_weight) as pool:
        pool.load("a", adapter)
        pool.load("b", other)
        for stack, logits in ((["a"], wanted), (["a", ("b", 0.5)], both)):
            pool.activate(*stack)
            found = run(peers, fusing, model)
            assert np.abs(found - logits).max() <= 2e-5 * np.abs(logits).max()
            assert np.abs(plain - logits).max() > 100 * np.abs(found - logits).max()
        size = model.model.embed_tokens.inner.weight.nbytes
        assert pool.exchanged_bytes == size  # what stands for the head
        pool.deactivate()
        assert pool.exchanged_bytes == 0
        assert np.array_equal(run(peers, fusing, model), plain)
    assert arrays(model) == before


def test_bias_of_such_a_head_is_refused(peers, fusing, by_weight, tmp_path):
    adapter = fusing.trained(by_weight, tmp_path / "a", target_modules=["lm_head"], lora_bias=True)
    model = peers.mlx_base(by_weight)
    with AdapterPool(model, by_weight) as pool:
        pool.load("a", adapter)
        pool.activate("a")
        with pytest.raises(Refused, match="for which this model has no place") as caught:
            run(peers, fusing, model)
        assert "\n" not in str(caught.value)


def test_a_layer_whose_weight_the_model_reads(tmp_path):
    """As routers of some of mlx-lm's models: the weight that they see is W + dW."""
    import mlx.core as mx
    import mlx.nn as nn

    from loraduct.converters.pool_mlx import Mlx
    from loraduct.converters.pool_parts import Held, Low

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3, bias=False)

        def __call__(self, x):
            return x @ self.gate.weight.T

    mx.random.seed(1)
    model, x = Reads(), mx.random.normal((5, 8))
    a, b = mx.random.normal((2, 8)), mx.random.normal((3, 2))
    w = np.array(model.gate.weight, np.float64)
    runtime = Mlx(model, False)
    runtime.show([(Held(tmp_path, 0, {"gate": Low(a, b, 1.5, "linear")}), 0.5)])
    wanted = np.array(x, np.float64) @ (w + 0.75 * np.array(b) @ np.array(a)).T
    assert np.abs(np.array(model(x)) - wanted).max() < 1e-5
    runtime.show(())
    assert np.array_equal(np.array(model.gate.weight), w.astype(np.float32))


@pytest.mark.parametrize(
    ("adapter", "fused", "what"),
    [
        ("one", True, "proj.weight: does not fit the model's float16"),
        ("norms", False, "input_layernorm.weight: does not fit the model's float16"),
        ("tokens", False, "embed_tokens.weight: does not fit the model's float16"),
    ],
)
def test_what_overflows_half_precision_is_refused(
    peers, fusing, bases, adapters, tmp_path, adapter, fused, what
):
    import shutil

    import mlx.core as mx
    from safetensors.torch import save_file

    tensors = {
        n: t if "lora_A" in n or (not fused and "lora_" in n) else t * 1e6
        for n, t in fusing.tensors(adapters[adapter]).items()
    }
    shutil.copytree(adapters[adapter], tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    model = peers.mlx_base(bases("llama"))
    model.set_dtype(mx.float16)
    before = arrays(model)

    def taken(pool, path):
        pool.load("a", path)
        pool.activate("a")

    with AdapterPool(model, bases("llama"), fused=fused) as pool:
        with pytest.raises(Refused, match=what) as caught:
            taken(pool, tmp_path / "a")
        assert "\n" not in str(caught.value)
        assert arrays(model) == before


def test_a_second_pool_is_refused(peers, bases):
    model = peers.mlx_base(bases("llama"))
    with (
        AdapterPool(model, bases("llama")),
        pytest.raises(LoraductError, match="is in a pool already"),
    ):
        AdapterPool(model, bases("llama"))
    AdapterPool(model, bases("llama")).close()


def test_model_with_adapters_is_refused(peers, fusing, bases, tmp_path):
    peers.save_mlx(bases("llama"), tmp_path / "a", fusing.IDS.numpy(), keys=ATTENTION)
    with pytest.raises(LoraductError, match="give the base model itself"):
        AdapterPool(peers.mlx_model(bases("llama"), tmp_path / "a"), bases("llama"))
