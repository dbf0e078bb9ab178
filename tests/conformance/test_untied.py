"""LoRA on tied embeddings, PEFT to MLX, made exact by an untied copy of the base.

Stock PEFT on the tied base is the oracle of what the adapter computes; stock mlx-lm runs what we
wrote on the copy.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Refused = Callable[..., str]
SIDES = (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def tied(zoo: ModuleType, tmp_path: Path) -> Callable[[str], Path]:
    """tied("llama") -> a tiny base of that type with tied embeddings, by transformers."""

    def make(name: str) -> Path:
        one = zoo.ARCHITECTURES[name]
        own = replace(one, config=one.config | zoo.TIED)
        path: Path = zoo.build(name, tmp_path / "base", own).path
        assert "lm_head.weight" not in load_file(path / "model.safetensors")
        return path

    return make


def made(
    peers: ModuleType, zoo: ModuleType, base: Path, folder: Path, targets: list[str], **options: Any
) -> np.ndarray:
    logits: np.ndarray = peers.save_peft(base, folder, peers.lora(targets, **options), zoo.TOKENS)
    return logits


@pytest.mark.parametrize("targets", SIDES, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "starcoder2", "granite"])
def test_untied_base_is_exact(
    name: str, targets: list[str], tied: Callable[[str], Path], convert: Convert, tiny: Tiny,
    zoo: ModuleType, peers: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    """Stock PEFT on the tied base, stock mlx-lm on its untied copy: the same logits."""
    base, new = tied(name), tmp_path / "untied"
    expected = made(peers, zoo, base, tmp_path / "peft", ["q_proj", *targets])
    there = convert(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(peers.mlx_logits(new, there, zoo.TOKENS), expected, plain)
    # the copy is the base: in both libraries
    assert np.abs(peers.torch_logits(peers.hf_base(new), zoo.TOKENS) - plain).max() == 0
    assert peers.read_json(there / peers.CONFIG)["model"] == str(new)
    back = convert(there, "peft", "--base", new)
    changed = peers.changed_tensors(
        tmp_path / "peft" / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS
    )
    assert set(changed.values()) <= {"gone"}
    assert all(n.endswith("base_layer.weight") for n in changed)


@pytest.mark.heavy
def test_untied_base_of_every_architecture(
    architecture: str, tied: Callable[[str], Path], attempt: Callable[..., Any], zoo: ModuleType,
    peers: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    """Exact, or refused because stock mlx-lm's class has no head."""
    from mlx_lm.utils import _get_classes

    base, new = tied(architecture), tmp_path / "untied"
    expected = made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    done = attempt(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    config = peers.read_json(base / "config.json") | {"tie_word_embeddings": False}
    model, arguments = _get_classes(config)
    assert (done.code == 0) == hasattr(model(arguments.from_dict(config)), "lm_head")
    if done.code == 0:
        plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
        peers.assert_same_logits(peers.mlx_logits(new, done.path, zoo.TOKENS), expected, plain)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "cohere"])
def test_architectures_without_an_untied_form(
    name: str, tiny: Tiny, refused: Refused, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """mlx-lm's class has no head: a head that is stored would be refused or ignored there."""
    made(peers, zoo, tiny(name).path, tmp_path / "peft", ["q_proj", "embed_tokens"])
    new = tmp_path / "untied"
    options = ("--base", tiny(name).path, "--untie-base", new)
    said = refused(tmp_path / "peft", "mlx", *options, saying=f"is a {name} model")
    assert "--allow-approximate" in said
    said = refused(tmp_path / "peft", "mlx", *options[:2], saying="--allow-approximate")
    assert "--untie-base" not in said
    assert not new.exists()
    # and that is so in stock mlx-lm: a head that is stored is one parameter too many
    copy = shutil.copytree(tiny(name).path, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    head = {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}
    save_file({**weights, **head}, copy / "model.safetensors", metadata={"format": "pt"})
    peers.edit_json(copy / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        peers.mlx_logits(copy, None, zoo.TOKENS)


def test_sharded_base(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """The shards are copied as they are, the head gets one of its own, the index knows it."""
    base, new = tmp_path / "base", tmp_path / "untied"
    model = peers.hf_base(tiny("qwen2").path)
    model.save_pretrained(base, max_shard_size="100KB")
    shutil.copy(tiny("qwen2").path / "config.json", base)
    (base / "tokenizer.json").write_text("{}")
    (base / "train.log").write_text("no companion")
    expected = made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    there = convert(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(peers.mlx_logits(new, there, zoo.TOKENS), expected, plain)
    assert np.array_equal(peers.torch_logits(peers.hf_base(new), zoo.TOKENS), plain)
    old, index = (peers.read_json(p / "model.safetensors.index.json") for p in (base, new))
    shards = set(old["weight_map"].values())
    assert len(shards) > 1
    assert all((base / s).read_bytes() == (new / s).read_bytes() for s in shards)
    assert index["weight_map"].keys() - old["weight_map"].keys() == {"lm_head.weight"}
    stored = sum(
        t.nbytes for s in {*index["weight_map"].values()} for t in load_file(new / s).values()
    )
    assert index["metadata"]["total_size"] == stored
    assert (new / "tokenizer.json").read_text() == "{}"
    assert not (new / "train.log").exists()


def test_packed_base(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """Scales and biases of a packed embedding go with it: mlx-lm computes the very same."""
    from mlx_lm import convert as mlx_convert

    base, new = tmp_path / "packed", tmp_path / "untied"
    (shutil.copytree(tiny("qwen2").path, tmp_path / "base") / "tokenizer.json").write_text(
        TOKENIZER
    )
    mlx_convert(str(tmp_path / "base"), str(base), quantize=True, q_bits=4, q_group_size=32)
    assert "model.embed_tokens.scales" in load_file(base / "model.safetensors")
    made(peers, zoo, tiny("qwen2").path, tmp_path / "peft", ["q_proj", "embed_tokens"])
    convert(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    packed, untied = (peers.mlx_logits(p, None, zoo.TOKENS) for p in (base, new))
    assert np.array_equal(packed, untied)


TOKENIZER = json.dumps(
    {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
)  # fmt: skip


def test_the_untied_base_is_the_adapters_and_the_tied_one_is_not(
    tiny: Tiny, convert: Convert, run: Callable[..., Any], attempt: Callable[..., Any],
    zoo: ModuleType, peers: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    """`validate` takes the copy, by its sampled weights too; on the tied base it would be another adapter."""
    base, new = tiny("qwen2").path, tmp_path / "untied"
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    there = convert(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    result = run("validate", tmp_path / "peft", there, "--base", new, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"]["max_difference"] < 1e-4
    assert run("validate", there, "--base", base).exit_code == 3
    outcome = attempt(there, "peft", "--base", base)
    assert (outcome.code, outcome.path.exists()) == (1, False)
    assert "ties the head to the embedding" in outcome.err


def test_untied_folders_are_written_whole_or_not_at_all(
    tiny: Tiny, attempt: Callable[..., Any], refused: Refused, zoo: ModuleType, peers: ModuleType,
    tmp_path: Path,
) -> None:  # fmt: skip
    """An existing folder is kept; an adapter that can't be written leaves no base behind."""
    base, new = tiny("qwen2").path, tmp_path / "untied"
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    options = ("--base", base, "--untie-base", new)
    assert attempt(tmp_path / "peft", "mlx", *options, "--dry-run").code == 0
    assert not new.exists()
    new.mkdir()
    refused(tmp_path / "peft", "mlx", *options, saying="exists")
    new.rmdir()
    refused(
        tmp_path / "peft", "mlx", "--base", base, "--untie-base", base / "x", saying="lies in it"
    )
    path = tmp_path / "peft" / peers.PEFT_WEIGHTS
    tensors = load_file(path)
    tensors[f"{peers.PEFT_PREFIX}{Q}.lora_B.weight"][0, 0] = float("nan")
    peers.rewrite_tensors(path, tensors)
    refused(tmp_path / "peft", "mlx", *options, saying="NaN")
    assert not new.exists()


def test_a_full_disk_leaves_neither_folder(
    tiny: Tiny, attempt: Callable[..., Any], zoo: ModuleType, peers: ModuleType, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever sync fails: both folders are there, or none is."""
    base, new = tiny("qwen2").path, tmp_path / "untied"
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    fsync, count = os.fsync, 0

    def failing(number: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, "no space", str(new))
        fsync(number)

    monkeypatch.setattr(os, "fsync", failing)
    failed = 0
    for at in range(1, 40):
        count = 0
        done = attempt(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
        whole = done.path.exists(), new.exists()
        if done.code == 0:
            assert whole == (True, True)
            shutil.rmtree(new)
        else:
            assert (done.code, whole) == (1, (False, False))
            failed += 1
        if count < at:
            break
    assert failed >= 5
    assert not list(tmp_path.glob(".untied*"))


def test_untying_has_to_be_of_use(
    tiny: Tiny, refused: Refused, run: Callable[..., Any], zoo: ModuleType, peers: ModuleType,
    tmp_path: Path,
) -> None:  # fmt: skip
    base, new = tiny("qwen2").path, tmp_path / "untied"
    made(peers, zoo, base, tmp_path / "peft", ["q_proj"])
    refused(
        tmp_path / "peft", "mlx", "--base", base, "--untie-base", new, saying="leave --untie-base"
    )
    other = tiny("llama").path
    made(peers, zoo, other, tmp_path / "other", ["embed_tokens"])
    refused(tmp_path / "other", "mlx", "--base", other, "--untie-base", new, saying="already")
    words = ("convert", tmp_path / "peft", "-o", tmp_path / "x", "--untie-base", new)
    assert run(*words, "--to", "mlx").exit_code == 2
    assert run(*words, "--to", "peft", "--base", base).exit_code == 2


def test_what_the_embedding_cannot_hold_of_a_head(
    tied: Callable[[str], Path], attempt: Callable[..., Any], zoo: ModuleType, peers: ModuleType,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A DoRA magnitude of the head, which goes to an untied base exactly."""
    base, new = tied("llama"), tmp_path / "untied"
    expected = made(peers, zoo, base, tmp_path / "peft", ["q_proj", "lm_head"], use_dora=True)
    said = attempt(tmp_path / "peft", "mlx", "--base", base, "--allow-approximate")
    assert said.code == 1
    assert "DoRA magnitude" in said.err
    assert "--untie-base" in said.err
    done = attempt(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    assert done.code == 0, done.text
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(peers.mlx_logits(new, done.path, zoo.TOKENS), expected, plain)


def test_templates_and_code_go_along(
    tied: Callable[[str], Path],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """What a fused copy keeps, an untied one keeps too."""
    base, new = tied("llama"), tmp_path / "untied"
    made(peers, zoo, base, tmp_path / "peft", ["lm_head", "q_proj"])
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_own.py").write_text("class Own: ...\n")
    convert(tmp_path / "peft", "mlx", "--base", base, "--untie-base", new)
    for name in ("additional_chat_templates/tool.jinja", "configuration_own.py"):
        assert (new / name).read_bytes() == (base / name).read_bytes()
