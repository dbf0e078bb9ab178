"""LoRA on tied embeddings, PEFT to MLX: refused, or approximated and measured.

Stock PEFT on the tied base is the oracle of what the adapter computes, stock mlx-lm on what we
wrote the other side; what is printed of an approximation is held against dense matrices.
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
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Refused = Callable[..., str]
SIDES = (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])


def made(
    peers: ModuleType, zoo: ModuleType, base: Path, folder: Path, targets: list[str], **options: Any
) -> np.ndarray:
    logits: np.ndarray = peers.save_peft(base, folder, peers.lora(targets, **options), zoo.TOKENS)
    return logits


@pytest.mark.parametrize("targets", SIDES, ids="+".join)
def test_refused_with_the_ways_out(
    targets: list[str],
    tiny: Tiny,
    refused: Refused,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    base = tiny("qwen2").path
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", *targets])
    said = refused(tmp_path / "peft", "mlx", "--base", base, saying="tie_word_embeddings")
    assert "--allow-approximate" in said
    assert "--untie-base DIR" in said


def dense(peers: ModuleType, folder: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """dW (tokens, dim) of the embedding and of the head, from the raw PEFT file."""
    raw = peers.float64_tensors(folder / peers.PEFT_WEIGHTS)
    raw = {n.removeprefix(peers.PEFT_PREFIX): t for n, t in raw.items()}
    embedding = head = None
    if "model.embed_tokens.lora_embedding_A" in raw:
        a, b = (raw[f"model.embed_tokens.lora_embedding_{s}"] for s in "AB")
        embedding = 2.5 * (b @ a).T
    if "lm_head.lora_A.weight" in raw:
        head = 2.5 * raw["lm_head.lora_B.weight"] @ raw["lm_head.lora_A.weight"]
    return embedding, head


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@pytest.mark.parametrize("targets", SIDES, ids="+".join)
def test_the_measured_difference_is_the_dense_one(
    name: str, targets: list[str], tiny: Tiny, attempt: Callable[..., Any], zoo: ModuleType,
    peers: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    """||what a side gets too much or too little|| over ||E||; and MLX's module does just that."""
    base = tiny(name).path
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", *targets])
    outcome = attempt(tmp_path / "peft", "mlx", "--base", base, "--allow-approximate", "--json")
    assert outcome.code == 0, outcome.text
    sides = {s["side"]: s for s in json.loads(outcome.out)["tied"]}
    embedding, head = dense(peers, tmp_path / "peft")
    zero = np.zeros_like(embedding if embedding is not None else head)
    raw = peers.float64_tensors(outcome.path / peers.MLX_WEIGHTS)
    scale = peers.read_json(outcome.path / peers.CONFIG)["lora_parameters"]["scale"]
    a, b = (raw[f"model.embed_tokens.lora_{s}"] for s in "ab")
    found = scale * a @ b
    size = np.linalg.norm(
        load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    )
    off = {
        "input embedding": np.linalg.norm(found - (zero if embedding is None else embedding)),
        "output head": np.linalg.norm(found - (zero if head is None else head)),
    }
    for side, norm in off.items():
        if norm < 1e-6:
            assert side not in sides  # exact: the update is its own
            continue
        assert sides[side]["norm"] == pytest.approx(norm, rel=1e-6)
        assert sides[side]["relative"] == pytest.approx(norm / size, rel=1e-6)
    assert len(sides) == (2 if len(targets) == 2 else 1)
    # what mlx-lm computes is PEFT with that one update on both sides
    both = {
        f"{peers.PEFT_PREFIX}model.embed_tokens.lora_embedding_A": a.T,
        f"{peers.PEFT_PREFIX}model.embed_tokens.lora_embedding_B": scale * b.T,
        f"{peers.PEFT_PREFIX}lm_head.lora_A.weight": b,
        f"{peers.PEFT_PREFIX}lm_head.lora_B.weight": scale * a,
        **{
            f"{peers.PEFT_PREFIX}{n[: -len('.lora_a')]}.lora_{s.upper()}.weight": (
                raw[n[:-1] + s].T * (scale if s == "b" else 1)
            )
            for n in raw if n.endswith("q_proj.lora_a") for s in "ab"
        },
    }  # fmt: skip
    rank = a.shape[1]
    config = peers.lora(["q_proj", "embed_tokens", "lm_head"], r=rank, lora_alpha=rank)
    made_both = tmp_path / "both"
    peers.save_peft(base, made_both, config, zoo.TOKENS)
    peers.rewrite_tensors(
        made_both / peers.PEFT_WEIGHTS,
        {n: torch.from_numpy(np.ascontiguousarray(v)).float() for n, v in both.items()},
    )
    expected = peers.peft_logits(base, made_both, zoo.TOKENS)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(peers.mlx_logits(base, outcome.path, zoo.TOKENS), expected, plain)


def test_it_is_printed(
    tiny: Tiny, attempt: Callable[..., Any], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """With a base that is a config alone: the norm, and that there was nothing to compare it with."""
    base = tiny("qwen2").path
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    norm = np.linalg.norm(dense(peers, tmp_path / "peft")[0])
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")
    for given, wanted in ((base, "of the base's weight"), (tmp_path / "config", "not there")):
        done = attempt(tmp_path / "peft", "mlx", "--base", given, "--allow-approximate")
        assert done.code == 0, done.text
        line = next(ln for ln in done.out.splitlines() if "approximated" in ln)
        assert f"{norm:.4g}" in line
        assert wanted in line


@pytest.mark.parametrize("way", ["mlx", "ensure_weight_tying"])
def test_one_update_for_both_sides_is_exact(
    way: str, tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """As conversion from MLX writes it, and as PEFT does with ensure_weight_tying: no flag needed."""
    base = tiny("qwen2").path
    if way == "mlx":
        keys = ["self_attn.q_proj", "model.embed_tokens"]
        peers.save_mlx(base, tmp_path / "mlx", zoo.TOKENS, keys=keys, num_layers=2)
        source = convert(tmp_path / "mlx", "peft", "--base", base)
        expected = peers.peft_logits(base, source, zoo.TOKENS)
    else:
        source = tmp_path / "peft"
        made(peers, zoo, base, source, ["q_proj", "embed_tokens"], ensure_weight_tying=True)
        model = peers.PeftModel.from_pretrained(peers.hf_base(base), source)
        expected = peers.torch_logits(model, zoo.TOKENS)
    there = convert(source, "mlx", "--base", base)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    if way == "mlx":
        assert not peers.changed_tensors(
            tmp_path / "mlx" / peers.MLX_WEIGHTS, there / peers.MLX_WEIGHTS
        )
        old, new = (peers.read_json(p / peers.CONFIG) for p in (tmp_path / "mlx", there))
        assert old == new


def test_a_config_that_does_not_say_is_not_guessed(
    tiny: Tiny, refused: Refused, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """Libraries and models have different defaults; a head that is stored may count or not."""
    base = Path(shutil.copytree(tiny("llama").path, tmp_path / "base"))
    made(peers, zoo, base, tmp_path / "peft", ["q_proj", "embed_tokens"])
    peers.edit_json(base / "config.json", tie_word_embeddings=...)
    for options in ([], ["--allow-approximate"]):
        refused(tmp_path / "peft", "mlx", "--base", base, *options, saying="does not say whether")
    untie = ("--base", base, "--untie-base", tmp_path / "new")
    refused(tmp_path / "peft", "mlx", *untie, saying="which one counts")
