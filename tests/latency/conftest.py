"""A tiny base with adapters that stock libraries made, for what is measured and forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LAYERS, HIDDEN, INNER, HEADS, KV, VOCABULARY = 2, 64, 128, 4, 2, 160


def made(folder: Path, *, tied: bool) -> Path:
    """A base as transformers saves one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=128,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head and embedding share a weight; float32."""
    return made(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head has a weight of its own."""
    return made(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def adapter(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 on q and v, saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(tied)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mlx_adapter(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same modules, as mlx-lm saves them."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("mlx") / "adapter"
    folder.mkdir()
    tensors = {}
    for i in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", HIDDEN * KV // HEADS)):
            stem = f"model.layers.{i}.self_attn.{name}"
            tensors[f"{stem}.lora_a"] = mx.random.normal((HIDDEN, 4))
            tensors[f"{stem}.lora_b"] = mx.random.normal((4, out))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "lora",
        "num_layers": LAYERS,
        "lora_parameters": {
            "rank": 4, "scale": 2.0, "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        },
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def package(tied: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and the adapter in a package, with a cache of 48 tokens."""
    from click.testing import CliRunner

    from loraduct.cli import main

    out = tmp_path_factory.mktemp("package") / "tiny.mlpackage"
    args = ["package", "--base", tied, "-a", f"a={adapter}", "--context", 48, "-o", out]
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    return out
