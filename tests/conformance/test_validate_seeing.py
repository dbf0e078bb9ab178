"""`validate` on models that also see: transformers has no causal class for them, and their files
keep older names than the live model has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_every_architecture as every
import torch
import zoo_more as more

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parent


WITHOUT_CAUSAL = (
    "kimi_k25",
    "llava",
    "minimax_m3_vl",
    "mistral3",
    "mistral4",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
)


def test_the_list_is_whole() -> None:
    """What stock transformers loads as a causal model is not here, and all else is."""
    from transformers import AutoModelForImageTextToText

    seeing = {n for n in more.MORE if more.model_class(n) is AutoModelForImageTextToText}
    assert seeing == set(WITHOUT_CAUSAL)


@pytest.fixture(scope="module")
def pair(
    zoo: ModuleType, peers: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """pair("llava") -> a base, and a PEFT adapter on all its language part, as PEFT saved it."""

    @cache
    def get(name: str) -> tuple[Path, Path]:
        from peft import get_peft_model

        folder = tmp_path_factory.mktemp("seeing")
        built = more.build(name, folder / name, zoo._randomise)
        model = more.model_class(name).from_pretrained(built.hf, dtype=torch.float32).eval()
        left_out = more.MORE[name].refused + more.MORE[name].not_in_peft
        found = [every.matching(paths, left_out, False) for paths in every.targets(model, name)]
        torch.manual_seed(0)
        peft = get_peft_model(model, every.lora(peers, *found))
        peers.randomise_peft(peft)
        peft.save_pretrained(folder / "peft")
        return built.mlx, folder / "peft"

    return get


@pytest.fixture
def proof(run: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Validate; the document, its checks by (name, status)."""

    def call(*words: object) -> dict[str, Any]:
        result = run("validate", *words, "--json")
        document: dict[str, Any] = json.loads(result.stdout)
        assert document["passed"] == (result.exit_code == 0)
        return document | {"by": {(c["name"], c["status"]): c for c in document["checks"]}}

    return call


@pytest.mark.parametrize("name", WITHOUT_CAUSAL)
def test_proven_in_both_runtimes(
    name: str,
    pair: Callable[[str], tuple[Path, Path]],
    convert: Callable[..., Path],
    proof: Callable[..., dict[str, Any]],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    base, source = pair(name)
    there = convert(source, "mlx", "--base", base)
    d = proof(source, there, "--base", base)
    assert d["passed"], d["checks"]
    assert ("logits", "passed") in d["by"]
    assert d["parity"]["runtimes"] == ["torch", "mlx"]
    assert d["parity"]["effect"] > 1000 * d["parity"]["max_difference"]
    assert d["parity"]["greedy_equal"]
    # nothing is said to be selected and missing: names of files are no live names
    assert ("targets", "warning") not in d["by"], d["by"]["targets", "warning"]
    wrong = peers.copy_adapter(there, tmp_path / "wrong")
    tensors = peers.load_file(wrong / peers.MLX_WEIGHTS)
    changed = next(n for n in sorted(tensors) if n.endswith("o_proj.lora_b"))
    tensors[changed] *= 1.05
    peers.rewrite_tensors(wrong / peers.MLX_WEIGHTS, tensors)
    d = proof(source, wrong, "--base", base)
    guilty = re.findall(r"layers\.\d+\.\S+", d["by"]["dW", "failed"]["module"])
    assert guilty
    assert changed.removesuffix(".lora_b").endswith(guilty[0])
    assert ("logits", "failed") in d["by"]


def test_greedy_tokens_do_not_depend_on_the_cache(
    pair: Callable[[str], tuple[Path, Path]],
) -> None:
    """Positions of a model that sees are counted by itself, from step to step."""
    from loraduct.formats import base as base_folder
    from loraduct.validation import runtimes

    base, _ = pair("qwen2_vl")
    ids = [5, 9, 23, 81]
    found = runtimes.run("torch", base_folder.read(base), None, [ids]).greedy
    model = more.model_class("qwen2_vl").from_pretrained(base, dtype=torch.float32).eval()
    tokens = list(ids)
    with torch.inference_mode():
        for _ in found:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert tokens[len(ids) :] == found
    assert len(set(found)) > 3
