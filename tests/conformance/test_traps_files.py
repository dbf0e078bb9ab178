"""What travels beside the factors: companion files, copies of the base's weights, odd bases.

Each test fails for a converter that drops one of them in silence, or carries on where a stock
library could not load the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Train = Callable[..., Path]
Convert = Callable[..., Path]
Refused = Callable[..., str]
Attempt = Callable[..., Any]
COMPANIONS = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "LICENSE.txt", "NOTICE", "processor_config.json",
    "sentencepiece.bpe.model", "tekken.json", "vocab.json", "merges.txt", "generation_config.json",
}  # fmt: skip
EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


def test_trap_44_companions_travel_both_ways(
    train: Train, attempt: Attempt, peers: ModuleType
) -> None:
    """A tokenizer with added tokens belongs to the adapter; training state stays behind."""
    source = train(["q_proj"])
    for name in COMPANIONS:
        (source / name).write_bytes(f"\xff{name}\r\n".encode("latin-1"))
    for name in ("training_args.bin", "optimizer.pt", "state.pkl"):
        (source / name).write_bytes(b"not to be opened")
    (source / "additional_chat_templates").mkdir()
    there = attempt(source, "mlx")
    back = attempt(there.path, "peft")
    ours = {peers.CONFIG, "README.md"}
    for outcome, weights in ((there, peers.MLX_WEIGHTS), (back, peers.PEFT_WEIGHTS)):
        assert outcome.code == 0, outcome.text
        found = {path.name for path in outcome.path.iterdir()}
        assert found == COMPANIONS | ours | {weights}
        for name in COMPANIONS:
            assert (outcome.path / name).read_bytes() == (source / name).read_bytes()
            assert name in outcome.out
    assert "additional_chat_templates" in there.text


def test_trap_08_a_copy_that_nothing_was_compared_with_is_kept(
    train: Train, convert: Convert, tiny: Tiny, zoo: ModuleType, peers: ModuleType
) -> None:
    """A resized or trained embedding is part of what PEFT loads: without a base it must stay."""
    source = train(["q_proj", "embed_tokens"])
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    tensors[EMBEDDING] += 0.5
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors)
    base = tiny("llama").path

    def logits(folder: Path) -> np.ndarray:
        model = peers.PeftModel.from_pretrained(peers.hf_base(base), folder)
        return np.asarray(peers.torch_logits(model, zoo.TOKENS))

    expected = logits(source)
    for options in ([], ["--uniform"]):
        np.testing.assert_allclose(logits(convert(source, "peft", *options)), expected, atol=1e-5)
    left = convert(source, "peft", "--exclude", "embed_tokens")
    assert EMBEDDING not in peers.raw_tensors(left / peers.PEFT_WEIGHTS)


def test_trap_08_a_copy_that_was_not_compared_is_said(
    train: Train, attempt: Attempt, tiny: Tiny, tmp_path: Path
) -> None:
    """MLX has no place for it; with the base's config alone nobody knows that it is the base's."""
    source = train(["q_proj", "embed_tokens"])
    base = tiny("llama").path
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")
    said = attempt(source, "mlx", "--base", tmp_path / "config")
    assert said.code == 0, said.text
    assert EMBEDDING in said.out
    assert EMBEDDING not in attempt(source, "mlx", "--base", base).out


@pytest.mark.parametrize("change", ["rows", "values", "nan"])
def test_trap_08_a_copy_that_is_not_the_bases(
    change: str, train: Train, refused: Refused, tiny: Tiny, peers: ModuleType
) -> None:
    """Compared wherever the base has weights: more rows, other values, NaN."""
    source = train(["q_proj", "embed_tokens"])
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    if change == "rows":
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], tensors[EMBEDDING][:3]])
    else:
        tensors[EMBEDDING][-1, -1] = float("nan") if change == "nan" else 3.0
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors)
    for to in ("peft", "mlx"):
        refused(source, to, "--base", tiny("llama").path, saying="not the base's")


def test_a_whole_embedding_beside_the_adapter(
    train: Train, refused: Refused, convert: Convert, tiny: Tiny, peers: ModuleType
) -> None:
    """PEFT saves one when the vocabulary was resized; named in modules_to_save it is carried."""
    source = train(["q_proj"])
    key = "base_model.model.model.embed_tokens.weight"
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    own = peers.load_file(tiny("llama").path / "model.safetensors")["model.embed_tokens.weight"]
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors | {key: own + 0.5})
    assert "save_embedding_layers" in refused(source, "peft", saying="modules_to_save")
    peers.edit_json(source / peers.CONFIG, modules_to_save=["embed_tokens"])
    result = convert(source, "peft", "--dtype", "f32")
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, result / peers.PEFT_WEIGHTS)


def test_a_grouped_convolution_is_named(refused: Refused, tmp_path: Path) -> None:
    """PEFT groups lora_B alone, so that the two factors seem to differ in rank."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plane = nn.Conv2d(8, 16, 3, groups=2)

    config = LoraConfig(r=4, target_modules=["plane"])
    get_peft_model(Grouped(), config).save_pretrained(tmp_path / "peft")
    refused(tmp_path / "peft", "peft", saying="convolution with groups")


def test_a_field_that_peft_does_not_know(train: Train, attempt: Attempt, peers: ModuleType) -> None:
    """PEFT drops it with a warning; nobody knows what it does to the numbers, so it is named."""
    source = train()
    peers.edit_json(source / peers.CONFIG, a_field_of_tomorrow=5, peft_version="99.0")
    outcome = attempt(source, "mlx")
    assert outcome.code == 0
    assert "a_field_of_tomorrow" in outcome.out


def _packed(base: Path, folder: Path, bits: int) -> Path:
    """The base as stock mlx-lm packs it."""
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = quantize_model(*load_model(base), 32, bits)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_trap_27_dora_on_packed_weights(
    bits: int, train: Train, attempt: Attempt, tiny: Tiny, zoo: ModuleType, peers: ModuleType,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What mlx-lm can't load on this base is refused, and only that; LoRA it takes on all."""
    base = _packed(tiny("llama").path, tmp_path / "packed", bits)
    for dora in (False, True):
        source = train(["q_proj"], use_dora=dora)
        outcome = attempt(source, "mlx", "--base", base)
        shutil.rmtree(source)
        if dora and bits in (3, 5, 6):
            assert outcome.code == 1
            assert f"{bits} bits" in outcome.err
            assert "model.layers.0.self_attn.q_proj" in outcome.err
            result = attempt(train(["q_proj"], use_dora=True), "mlx").path
            with pytest.raises(ValueError, match="incompatible"):
                peers.mlx_model(base, result)
        else:
            assert outcome.code == 0, outcome.text
            assert np.isfinite(peers.mlx_logits(base, outcome.path, zoo.TOKENS)).all()
