"""PEFT's methods other than LoRA, one by one: what is special about a method or an option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tuners import (
    TARGETS,
    assert_same,
    config_of,
    merged,
    randomise,
)

from loraduct.formats.peft_tuners import TUNERS


def test_energy_chooses_the_rank(saved: Any, run: Any, tmp_path: Path, peers: ModuleType) -> None:
    source, base = saved("OFT")
    words = ["convert", source, "--to", "peft", "-o", tmp_path / "out", "--base", base, "--json"]
    done = run(*words, "--energy", 0.9, "--allow-approximate")
    assert done.exit_code == 0, done.output
    config = peers.read_json(tmp_path / "out" / "adapter_config.json")
    ranks = {}
    for name, delta in merged(peers, base, source).items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        ranks[name.removesuffix(".weight")] = int(
            np.searchsorted(np.cumsum(squares), 0.9 * squares.sum()) + 1
        )
    found = {m: config["rank_pattern"].get(m, config["r"]) for m in ranks}
    assert found == ranks
    assert max(json.loads(done.stdout)["residuals"].values()) <= 0.1**0.5 + 1e-6


def test_rank_has_nothing_to_do_in_an_exact_form(saved: Any, refused: Callable[..., str]) -> None:
    source, _ = saved("LOHA")
    refused(source, "peft", "--rank", 4, "--allow-approximate", saying="nothing to do")


def test_pruned_adalora(
    saved: Any, convert: Any, peers: ModuleType, tiny: Any, tmp_path: Path
) -> None:
    """rank_pattern holds masks; the scale's divisor stays init_r; a module may have no rank left."""
    import torch
    from peft import get_peft_model

    config = config_of("ADALORA", 0)
    model = get_peft_model(peers.hf_base(tiny("llama").path), config)
    randomise(model)
    torch.manual_seed(0)
    masks = {}
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ == "SVDLinear":
            kept = [bool(i % 2) for i in range(6)] if "q_proj" in name else [True] * 6
            masks[f"{name}.lora_E"] = [False] * 6 if "0.self_attn.v_proj" in name else kept
    model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(tmp_path / "pruned")
    made = convert(tmp_path / "pruned", "peft")
    base = tiny("llama").path
    ranks = {3, 6}
    config_made = peers.read_json(made / "adapter_config.json")
    assert {config_made["r"], *config_made["rank_pattern"].values()} == ranks
    assert_same(merged(peers, base, made), merged(peers, base, tmp_path / "pruned"))


class _BlockDiagonal:
    """What PEFT's CUDA extension computes, by its documentation: blocks on the diagonal."""

    @staticmethod
    def forward(blocks: Any) -> list[Any]:
        import torch

        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


def test_boft_with_more_factors(
    saved: Any, convert: Any, refused: Callable[..., str], peers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """PEFT has them only with its CUDA extension; the rest of its code runs as it is."""
    from peft import BOFTConfig

    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", _BlockDiagonal)
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=TARGETS)
    source, base = saved("BOFT", config=config)
    flags = ["--base", base, "--rank", 112, "--allow-approximate"]
    file = source / "adapter_model.safetensors"
    assert {t[1][0] for n, t in peers.raw_tensors(file).items() if "boft_R" in n} == {3}
    peers.edit_json(source / peers.CONFIG, boft_n_butterfly_factor=2)
    refused(source, "peft", *flags, saying="3 butterfly factors, the config says 2")
    peers.edit_json(source / peers.CONFIG, boft_n_butterfly_factor=3)
    made = convert(source, "peft", *flags)
    assert_same(merged(peers, base, made), merged(peers, base, source))


def test_beft_moves_biases(saved: Any, convert: Any, peers: ModuleType, zoo: ModuleType) -> None:
    """A bias of its own, on modules with one: LoRA of zeros with a lora_bias."""
    from peft import PeftModel

    source, base = saved("BEFT")
    made = convert(source, "peft", "--base", base)
    logits = [
        peers.torch_logits(PeftModel.from_pretrained(peers.hf_base(base), f), zoo.TOKENS)
        for f in (source, made)
    ]
    unadapted = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    peers.assert_same_logits(logits[1], logits[0], unadapted)


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "VERA", "HRA", "OFT", "IA3", "C3A"])
def test_to_mlx(kind: str, saved: Any, convert: Any, peers: ModuleType) -> None:
    source, base = saved(kind)
    flags = ["--rank", 112, "--allow-approximate"] if TUNERS[kind].form == "dense" else []
    made = convert(source, "mlx", "--base", base, *flags)
    found = {f"{name}.weight": d for name, d in peers.mlx_deltas(base, made).items()}
    expected = merged(peers, base, source)
    # mlx-lm fuses in float32: what the base's own values round away is not the adapter's
    assert_same(found, expected, 1e-4)


def test_scaled_biases_have_no_place_in_mlx(saved: Any, refused: Callable[..., str]) -> None:
    source, base = saved("IA3", 1)
    flags = ["--base", base, "--rank", 8, "--allow-approximate"]
    refused(source, "mlx", *flags, saying="replaced parameter (bias)")


def test_layer_norms(
    saved: Any, convert: Any, refused: Callable[..., str], peers: ModuleType, zoo: ModuleType
) -> None:
    """Norms are replaced: MLX's full form holds them, a LoRA has no place for them alone."""
    from peft import LNTuningConfig, PeftModel

    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
    source, base = saved("LN_TUNING", config=config)
    refused(source, "mlx", saying="--base")
    refused(source, "peft", saying="LN tuning")
    made = convert(source, "mlx", "--base", base)
    expected = peers.torch_logits(
        PeftModel.from_pretrained(peers.hf_base(base), source), zoo.TOKENS
    )
    found = peers.mlx_logits(base, made, zoo.TOKENS)
    peers.assert_same_logits(found, expected, peers.torch_logits(peers.hf_base(base), zoo.TOKENS))


@pytest.mark.parametrize("on", ["llama", "qwen2"])  # the head is tied in one of them
def test_trainable_tokens(
    on: str, tiny: Any, convert: Any, run: Any, refused: Callable[..., str], peers: ModuleType,
    zoo: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    """Rows of the embedding as a method of their own: kept in PEFT, no place in mlx-lm."""
    from peft import PeftModel, TrainableTokensConfig, get_peft_model

    base, source = tiny(on).path, tmp_path / "peft"
    model = get_peft_model(peers.hf_base(base), TrainableTokensConfig(token_indices=[5, 9]))
    randomise(model)
    model.save_pretrained(source)
    said = refused(source, "mlx", "--base", base, saying="trainable_tokens_delta")
    assert "replaced" in said
    made = convert(source, "peft", "--dtype", "f32")
    file = "adapter_model.safetensors"
    assert not peers.changed_tensors(source / file, made / file)
    assert peers.read_json(made / peers.CONFIG) == peers.read_json(source / peers.CONFIG)
    logits = [
        peers.torch_logits(PeftModel.from_pretrained(peers.hf_base(base), f), zoo.TOKENS)
        for f in (source, made)
    ]
    assert (logits[0] == logits[1]).all()
    document = json.loads(run("inspect", source, "--json").stdout)
    assert document["kind"] == "trainable tokens"
    peers.edit_json(source / peers.CONFIG, token_indices=[5])
    done = run("inspect", source)
    assert done.exit_code == 1
    assert "token_indices" in done.stderr


@pytest.mark.parametrize(
    ("kind", "options", "saying"),
    [
        ("VERA", {"r": 4, "save_projection": False}, "save_projection"),
        ("UNILORA", {"r": 4, "theta_d_length": 128}, "save_indices"),
        ("WAVEFT", {"n_frequency": 20, "wavelet_family": "db2"}, "db1"),
        ("PVERA", {"r": 4, "sample_at_inference": True}, "samples at inference"),
    ],
)
def test_what_a_file_does_not_tell(
    kind: str, options: dict[str, Any], saying: str, saved: Any, refused: Callable[..., str]
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    config = CONFIGS[kind](task_type="CAUSAL_LM", target_modules=TARGETS, **options)
    source, base = saved(kind, config=config)
    refused(source, "peft", "--base", base, saying=saying)


def test_draws_as_torch_draws() -> None:
    """Places of FourierFT and WaveFT come from torch's generator; ours are drawn without it."""
    import torch

    from loraduct.formats.peft_tuners_dense import first_of_randperm

    for n, count, seed in ((10, 10, 0), (6144, 50, 777), (1_000_003, 1000, 2**32 - 1)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.randperm(n, generator=generator)[:count].numpy()
        assert (first_of_randperm(n, count, seed) == expected).all()


def test_draws_normal_numbers_as_torch_does() -> None:
    """By which TinyLoRA's file tells where in the model a module is."""
    import torch

    from loraduct.formats.torch_draws import first_normals

    for n, seed in ((3, 1), (12, 42), (16, 7), (18, 42), (31, 2**31), (32, 0), (1000, 5)):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.normal(0.0, 1.0, (n,), generator=generator).numpy()
        found = first_normals(n, seed)
        assert len(found) == (2 if n < 16 else 16)
        np.testing.assert_allclose(found, expected[: len(found)], atol=3e-6)


def test_tinylora_by_another_seed(
    saved: Any, refused: Callable[..., str], peers: ModuleType
) -> None:
    """Then no place in the model has these values, and the module's vector can't be told."""
    source, _ = saved("TINYLORA", 1)
    peers.edit_json(source / peers.CONFIG, projection_seed=41_000)
    refused(source, "peft", saying="drawn for 0 places of 9")


def test_round_trip_stays_lora(saved: Any, convert: Any, peers: ModuleType) -> None:
    """What was made of another method goes to MLX and back like any LoRA."""
    source, base = saved("VBLORA")
    first = convert(source, "peft")
    back = convert(convert(first, "mlx", "--base", base), "peft")
    assert not peers.changed_tensors(
        first / "adapter_model.safetensors", back / "adapter_model.safetensors"
    )
    direct = convert(convert(source, "mlx", "--base", base), "peft")
    assert_same(merged(peers, base, direct), merged(peers, base, source))


@pytest.mark.parametrize("kind", ["LOHA", "VERA", "OFT"])
def test_validate_proves_what_was_made(kind: str, saved: Any, convert: Any, run: Any) -> None:
    """validate's own derivation and both runtimes agree; a poor approximation does not pass."""
    source, base = saved(kind)
    full = TUNERS[kind].form == "dense"
    flags = ["--rank", 112, "--allow-approximate"] if full else []
    made = convert(source, "mlx", "--base", base, *flags)
    done = run("validate", source, made, "--base", base)
    assert done.exit_code == 0, done.output
    if full:
        poor = convert(source, "mlx", "--base", base, "--rank", 2, "--allow-approximate")
        done = run("validate", source, poor, "--base", base)
        assert done.exit_code == 3
        assert "full rank" in done.stdout


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "VERA", "FOURIERFT"])
def test_inspect_needs_no_base(kind: str, saved: Any, run: Any, peers: ModuleType) -> None:
    """Method by name and the file's own size, also where the update depends on the base."""
    source, _ = saved(kind)
    done = run("inspect", source, "--json", "--stats")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["kind"] == TUNERS[kind].name
    sizes = [len(t[2]) for t in peers.raw_tensors(source / "adapter_model.safetensors").values()]
    assert document["bytes"] == sum(sizes)
