"""A tiny model with a tokenizer, an adapter trained on some text, and its conversion to MLX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
LINES = [f"the {n} tall trees stand by the {w} river" for n in "abcdefgh" for w in ("old", "red")]


class World(NamedTuple):
    """``text``: a JSONL file of sixteen texts that the adapter was trained on."""

    base: Path
    peft: Path
    mlx: Path
    text: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch = pytest.importorskip("torch")
    from click.testing import CliRunner
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from loraduct.cli import main

    here = tmp_path_factory.mktemp("validate")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(here / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        tie_word_embeddings=False, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(here / "base")
    edited = json.loads((here / "base" / "config.json").read_text()) | {"rope_theta": 10000.0}
    (here / "base" / "config.json").write_text(json.dumps(edited))
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    ids = torch.tensor([tokenizer(line[:36].ljust(36))["input_ids"] for line in LINES])
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.save_pretrained(here / "peft")
    args = ["convert", here / "peft", "--to", "mlx", "-o", here / "mlx", "--base", here / "base"]
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    text = here / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return World(here / "base", here / "peft", here / "mlx", text)
