"""Mixtures of experts, both ways: PEFT's flattened parameters, mlx-lm's three axes, older names.

A wrong order of experts, a gate taken for an up projection, or rows that should be columns all
have the right shape: only the logits of the stock libraries tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from zoo_moe import MOE

pytestmark = pytest.mark.filterwarnings("ignore")
Convert = Callable[..., Path]
HERE = Path(__file__).parent
PREFIX = "base_model.model."


# mlx-lm 0.32.2 can't load what transformers saves of gpt_oss, and can't train phimoe's router
RUN = sorted(MOE.keys() - {"gpt_oss"})
FROM_MLX = sorted(MOE.keys() - {"gpt_oss", "phimoe"})


@pytest.fixture(scope="module")
def moe(zoo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """moe("mixtral") -> the folder of a tiny base."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            entry = MOE[name]
            architecture = zoo.Architecture(
                zoo.rope() | entry.config, tuple(entry.modules), entry.mlx_config
            )
            folder = tmp_path_factory.mktemp("moe") / name
            built[name] = zoo.build(name, folder, architecture).path
        return built[name]

    return get


@pytest.fixture
def trained(moe: Callable[[str], Path], zoo: ModuleType, peers: ModuleType, tmp_path: Path) -> Any:
    """trained("mixtral") -> (base, folder saved by stock PEFT, its logits, the base's logits)."""

    def make(name: str, parameters: list[str] | None = None, **options: Any) -> tuple[Any, ...]:
        base = moe(name)
        config = peers.lora(
            MOE[name].modules,
            lora_dropout=0.0,
            target_parameters=MOE[name].parameters if parameters is None else parameters,
            **options,
        )
        logits = peers.save_peft(base, tmp_path / "peft", config, zoo.TOKENS)
        return base, tmp_path / "peft", logits, peers.torch_logits(peers.hf_base(base), zoo.TOKENS)

    return make


@pytest.mark.parametrize("name", RUN)
def test_from_peft(
    name: str, trained: Any, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """Attention, router and experts: mlx-lm answers as PEFT does, and the way back is exact."""
    base, source, expected, plain = trained(name)
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    if name == "qwen2_moe":  # its shared expert can't be targeted by name in PEFT any more
        return
    back = convert(there, "peft", "--base", base)
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)


@pytest.mark.parametrize("name", FROM_MLX)
def test_from_mlx(
    name: str,
    moe: Callable[[str], Path],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Everything mlx-lm adapts in a block by default, loaded strictly by PEFT."""
    base = moe(name)
    expected = peers.save_mlx(base, tmp_path / "mlx", zoo.TOKENS, num_layers=2)
    result = convert(tmp_path / "mlx", "peft", "--base", base)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    found = peers.torch_logits(peers.load_peft(base, result), zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)
    again = convert(result, "mlx", "--base", base)
    assert not peers.changed_tensors(
        tmp_path / "mlx" / peers.MLX_WEIGHTS, again / peers.MLX_WEIGHTS
    )


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_trap_16_one_parameter_is_told_by_the_config(
    leaf: str, trained: Any, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """Adapted alone, both have the same key in PEFT's file."""
    base, source, expected, plain = trained("qwen3_moe", [f"mlp.experts.{leaf}"])
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)


def test_trap_16_their_order_in_the_config_means_nothing(
    trained: Any, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """PEFT nests parameters in the order in which the module declares them."""
    base, source, expected, plain = trained("qwen3_moe")
    names = peers.read_json(source / peers.CONFIG)["target_parameters"]
    assert len(names) > 1
    peers.edit_json(source / peers.CONFIG, target_parameters=names[::-1])
    found = peers.torch_logits(peers.load_peft(base, source), zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)  # stock PEFT agrees
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"down_proj": 6}}])
def test_scales_and_ranks_of_parameters(
    options: dict[str, Any], trained: Any, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """Patterns are matched against a parameter's own path."""
    base, source, expected, plain = trained("mixtral", **options)
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    uniform = convert(source, "peft", "--uniform", "--base", base)
    found = peers.torch_logits(peers.load_peft(base, uniform), zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)


MIXTRAL = {"w1": (112, 64), "w2": (64, 112), "w3": (112, 64)}


def old_names(
    peers: ModuleType,
    folder: Path,
    experts: int,
    ranks: dict[str, int],
    shapes: dict[str, tuple[int, int]] = MIXTRAL,
    block: str = "block_sparse_moe",
) -> Path:
    """An adapter of experts as PEFT saved it under transformers 4: one pair an expert."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(3):
        for expert in range(experts):
            for leaf, (out, inner) in shapes.items():
                stem = f"{PREFIX}model.layers.{layer}.{block}.experts.{expert}.{leaf}"
                rank = ranks.get(leaf, 4)
                a = torch.randn(rank, inner, generator=generator) / inner**0.5
                tensors[f"{stem}.lora_A.weight"] = a
                tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(
                    out, rank, generator=generator
                )
    folder.mkdir()
    peers.rewrite_tensors(folder / peers.PEFT_WEIGHTS, tensors)
    config = peers.lora(list(shapes), lora_dropout=0.0).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / peers.CONFIG).write_text("{}")
    peers.edit_json(folder / peers.CONFIG, **config)
    return folder


def test_trap_18_names_of_transformers_4(
    moe: Callable[[str], Path], convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """One pair an expert, w1 w2 w3 in block_sparse_moe: stacked for MLX, as PEFT fuses them."""
    base = moe("mixtral")
    source = old_names(peers, tmp_path / "old", 4, {})
    expected = peers.torch_logits(
        peers.PeftModel.from_pretrained(peers.hf_base(base), source), zoo.TOKENS
    )
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)


def test_trap_18_names_of_transformers_4_that_kept_their_place(
    moe: Callable[[str], Path], convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """Qwen3's experts are mlp.experts.N.gate_proj there, and one parameter for all now."""
    base = moe("qwen3_moe")
    shapes = {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}
    source = old_names(peers, tmp_path / "old", 4, {}, shapes, "mlp")
    expected = peers.torch_logits(
        peers.PeftModel.from_pretrained(peers.hf_base(base), source), zoo.TOKENS
    )
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    back = convert(there, "peft", "--base", base)  # in the names of transformers 5
    found = peers.torch_logits(peers.load_peft(base, back), zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)


def test_an_expert_is_missing(
    moe: Callable[[str], Path], refused: Callable[..., str], peers: ModuleType, tmp_path: Path
) -> None:
    """Three experts of four: neither stacked nor guessed."""
    source = old_names(peers, tmp_path / "old", 4, {})
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    kept = {n: t for n, t in tensors.items() if "experts.1.w2" not in n}
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, kept)
    refused(source, "mlx", "--base", moe("mixtral"), saying="expert 1")


def test_experts_of_another_base(
    moe: Callable[[str], Path], refused: Callable[..., str], peers: ModuleType, tmp_path: Path
) -> None:
    """Two experts where the base has four."""
    source = old_names(peers, tmp_path / "old", 2, {})
    refused(source, "mlx", "--base", moe("mixtral"), saying="experts")


def test_names_of_two_versions_in_one_file(
    trained: Any, attempt: Callable[..., Any], peers: ModuleType, tmp_path: Path
) -> None:
    """The same experts by their old and their new names."""
    base, source, *_ = trained("mixtral")
    old = peers.load_file(old_names(peers, tmp_path / "old", 4, {}) / peers.PEFT_WEIGHTS)
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors | old)
    config = peers.read_json(source / peers.CONFIG)
    targets = [*config["target_modules"], "w1", "w2", "w3"]
    peers.edit_json(source / peers.CONFIG, target_modules=targets)
    outcome = attempt(source, "mlx", "--base", base)
    assert outcome.code == 1
    assert "two versions" in outcome.err


def test_trap_17_interleaved_rows(trained: Any, convert: Convert, peers: ModuleType) -> None:
    """gpt_oss keeps gate and up row by row; the oracle is PEFT's own merge of its parameter."""
    base, source, *_ = trained("gpt_oss")
    model = peers.PeftModel.from_pretrained(peers.hf_base(base).double(), source)
    before = peers.hf_base(base).double()
    merged = model.merge_and_unload()
    there = convert(source, "mlx", "--base", base)
    tensors = peers.float64_tensors(there / peers.MLX_WEIGHTS)
    scale = peers.read_json(there / peers.CONFIG)["lora_parameters"]["scale"]
    for layer in range(3):
        experts, old = (
            merged.model.layers[layer].mlp.experts,
            before.model.layers[layer].mlp.experts,
        )
        moved = (experts.gate_up_proj - old.gate_up_proj).detach().numpy()  # (E, in, 2 I)
        for leaf, first in (("gate_proj", 0), ("up_proj", 1)):
            stem = f"model.layers.{layer}.mlp.experts.{leaf}"
            found = scale * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]  # (E, I, in)
            np.testing.assert_allclose(found, moved[:, :, first::2].swapaxes(1, 2), atol=1e-6)
    back = convert(there, "peft", "--base", base)
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)


def test_trap_25_the_older_layout_of_switch_layers(
    moe: Callable[[str], Path],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Before 2025-10-02 mlx-lm kept lora_a of experts as (experts * rank, in)."""
    base = moe("mixtral")
    peers.save_mlx(base, tmp_path / "mlx", zoo.TOKENS, num_layers=2)
    path = tmp_path / "mlx" / peers.MLX_WEIGHTS
    expected = convert(tmp_path / "mlx", "peft", "--base", base)
    tensors = peers.load_file(path)
    flat = {
        n: t.flatten(0, 1) if n.endswith("a") and t.ndim == 3 else t for n, t in tensors.items()
    }
    peers.rewrite_tensors(path, flat)
    found = convert(tmp_path / "mlx", "peft", "--base", base)
    assert not peers.changed_tensors(expected / peers.PEFT_WEIGHTS, found / peers.PEFT_WEIGHTS)


def test_only_one_half(
    moe: Callable[[str], Path],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """MLX may adapt gate_proj alone; PEFT's fused parameter then has zeros in the other half."""
    base = moe("qwen3_moe")
    keys = ["mlp.switch_mlp.gate_proj", "self_attn.q_proj"]
    expected = peers.save_mlx(base, tmp_path / "mlx", zoo.TOKENS, keys=keys)
    result = convert(tmp_path / "mlx", "peft", "--base", base)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    found = peers.torch_logits(peers.load_peft(base, result), zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)


def test_the_proof_compares_experts(
    trained: Any, convert: Convert, run: Callable[..., Any], peers: ModuleType
) -> None:
    """validate passes what is right, and names the projection of which one expert is wrong."""
    base, source, *_ = trained("mixtral")
    there = convert(source, "mlx", "--base", base)
    done = run("validate", source, there, "--base", base)
    assert done.exit_code == 0, done.output
    path = there / peers.MLX_WEIGHTS
    name = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    tensors = peers.load_file(path)
    tensors[f"{name}.lora_b"][2] *= 1.1
    peers.rewrite_tensors(path, tensors)
    done = run("validate", source, there, "--base", base)
    assert done.exit_code == 3
    assert name in done.output


def test_inspect_tells_experts(trained: Any, run: Callable[..., Any], peers: ModuleType) -> None:
    """Shapes and norms of all experts of a layer; the oracle is PEFT's own merge."""
    base, source, *_ = trained("mixtral")
    found = json.loads(run("inspect", source, "--stats", "--json").stdout)
    row = next(r for r in found["targets"] if r["module"] == "mlp.experts.gate_up_proj")
    assert row["shape"] == [4, 224, 64]
    merged = peers.PeftModel.from_pretrained(peers.hf_base(base).double(), source)
    moved = merged.merge_and_unload().model.layers[0].mlp.experts.gate_up_proj
    plain = peers.hf_base(base).double().model.layers[0].mlp.experts.gate_up_proj
    norm = float((moved - plain).norm())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stats = next(m for m in found["stats"]["modules"] if m["module"] == name)
    assert stats["norm"] == pytest.approx(norm, rel=1e-5)
