"""One test per known trap of the PEFT side: each fails for a converter that walks into it.

The numbers merely give each trap a name that stays; MLX's traps are in test_traps_mlx.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def exact(tiny: Tiny, peers: ModuleType, convert: Convert) -> Callable[..., Any]:
    """Convert to MLX; every module must move as PEFT moves it. Returns PEFT's deltas."""

    def check(source: Path, base: str = "llama", strict: bool = True) -> Any:
        expected = peers.peft_deltas(tiny(base).path, source, strict=strict)
        result = convert(source, "mlx", "--base", tiny(base).path)
        peers.assert_same_deltas(peers.mlx_deltas(tiny(base).path, result), expected)
        return expected

    return check


def _scale(peers: ModuleType, source: Path, deltas: Any, layer: int = 0) -> float:
    """The multiplier PEFT used for q_proj of that layer, worked out from its own numbers."""
    path = f"model.layers.{layer}.self_attn.q_proj"
    tensors = peers.float64_tensors(source / peers.PEFT_WEIGHTS)
    stem = f"{peers.PEFT_PREFIX}{path}"
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    return float((deltas[path] * product).sum() / (product * product).sum())


def test_trap_01_the_first_pattern_that_matches_wins(
    train: Callable[..., Path], exact: Callable[..., Any], peers: ModuleType
) -> None:
    """Not the most specific one: layer 0 gets rank 5 and alpha 15, not 16 and 64."""
    source = train(
        rank_pattern={".*q_proj": 5, "layers.0.self_attn.q_proj": 16},
        alpha_pattern={".*q_proj": 15, "layers.0.self_attn.q_proj": 64},
    )
    assert _scale(peers, source, exact(source)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("alphas", "scale"),
    [
        ({"q_proj": 15, "layers.0.self_attn.q_proj": 64}, 15 / 4),
        ({"layers.0.self_attn.q_proj": 64, "q_proj": 15}, 64 / 4),
    ],
)
def test_trap_01_first_means_first_in_the_file(
    alphas: dict[str, int],
    scale: float,
    train: Callable[..., Path],
    exact: Callable[..., Any],
    peers: ModuleType,
) -> None:
    """PEFT sorts the patterns it saves but takes them in any order: reading mustn't sort."""
    source = train()
    peers.edit_json(source / peers.CONFIG, alpha_pattern=alphas)
    assert _scale(peers, source, exact(source)) == pytest.approx(scale)


def test_trap_02_a_pattern_with_the_file_prefix_matches_nothing(
    train: Callable[..., Path], exact: Callable[..., Any], peers: ModuleType
) -> None:
    """Tensor names start with base_model.model., patterns are matched without it."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    source = train(rank_pattern={name: 16}, alpha_pattern={name: 64})
    assert _scale(peers, source, exact(source, strict=False)) == pytest.approx(10 / 4)


def test_trap_03_rslora_is_told_by_the_config_alone(
    train: Callable[..., Path], exact: Callable[..., Any], peers: ModuleType
) -> None:
    """The same tensors mean twice as much with use_rslora and rank 4."""
    source = train()
    plain = _scale(peers, source, exact(source))
    peers.edit_json(source / peers.CONFIG, use_rslora=True)
    assert _scale(peers, source, exact(source)) == pytest.approx(2 * plain)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 10 / 16), (True, 10 / 4)])
def test_trap_04_a_rank_pattern_alone_changes_the_scale(
    rslora: bool,
    scale: float,
    train: Callable[..., Path],
    exact: Callable[..., Any],
    peers: ModuleType,
) -> None:
    """alpha stays, so alpha / r shrinks with the rank."""
    source = train(rank_pattern={"layers.0.self_attn.q_proj": 16}, use_rslora=rslora)
    deltas = exact(source)
    assert _scale(peers, source, deltas) == pytest.approx(scale)
    assert _scale(peers, source, deltas, layer=1) == pytest.approx(5.0 if rslora else 2.5)


def test_trap_05_tensors_that_peft_ignores(
    train: Callable[..., Path],
    attempt: Callable[..., Any],
    tiny: Tiny,
    peers: ModuleType,
) -> None:
    """k_proj is in the file but no target: PEFT drops it without a word, we say so."""
    source = train()
    base = tiny("llama").path
    expected = peers.peft_deltas(base, source)
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    extra = {
        name.replace("q_proj", "k_proj"): t[:48].clone() if "lora_B" in name else t.clone()
        for name, t in tensors.items()
    }
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors | extra)
    outcome = attempt(source, "mlx", "--base", base)
    assert "k_proj" in outcome.text
    if outcome.code == 0:
        peers.assert_same_deltas(peers.mlx_deltas(base, outcome.path), expected)
    else:
        assert outcome.code == 1
        assert not outcome.path.exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_trap_06_half_a_pair_is_no_adapter(
    factor: str, train: Callable[..., Path], refused: Refused, tiny: Tiny, peers: ModuleType
) -> None:
    """PEFT warns, keeps the missing half at its initial value, and goes on."""
    source = train()
    name = f"{peers.PEFT_PREFIX}model.layers.0.self_attn.q_proj.{factor}.weight"
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    del tensors[name]
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors)
    refused(source, "mlx", "--base", tiny("llama").path, saying="layers.0.self_attn.q_proj")


def test_trap_06_a_magnitude_is_missing(
    train: Callable[..., Path], refused: Refused, tiny: Tiny, peers: ModuleType
) -> None:
    """Both runtimes would take the base's norm for it and be silently wrong."""
    source = train(use_dora=True)
    stem = f"{peers.PEFT_PREFIX}model.layers.0.self_attn.q_proj"
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    del tensors[f"{stem}.lora_magnitude_vector"]
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors)
    refused(source, "mlx", "--base", tiny("llama").path, saying="magnitude")


def test_trap_06_a_module_that_is_absent_has_no_effect(
    train: Callable[..., Path],
    attempt: Callable[..., Any],
    tiny: Tiny,
    peers: ModuleType,
) -> None:
    """A target without tensors: same numbers as PEFT's, which warns; or refused by name."""
    source = train()
    base = tiny("llama").path
    kept = {
        name: tensor
        for name, tensor in peers.load_file(source / peers.PEFT_WEIGHTS).items()
        if "layers.0." not in name
    }
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, kept)
    expected = peers.peft_deltas(base, source, strict=False)
    outcome = attempt(source, "mlx", "--base", base)
    if outcome.code == 0:
        peers.assert_same_deltas(peers.mlx_deltas(base, outcome.path), expected)
    else:
        assert outcome.code == 1
        assert "layers.0.self_attn.q_proj" in outcome.err


def test_trap_07_modules_to_save_matches_by_suffix(
    train: Callable[..., Path], refused: Refused, convert: Convert, tiny: Tiny, peers: ModuleType
) -> None:
    """["norm"] saves every module whose name ends so: eight tensors of it, not one."""
    source = train(modules_to_save=["norm"])
    norms = {n for n in peers.raw_tensors(source / peers.PEFT_WEIGHTS) if "norm.weight" in n}
    assert len(norms) == 7
    assert "input_layernorm" in refused(
        source, "mlx", "--base", tiny("llama").path, saying="modules_to_save"
    )
    uniform = convert(source, "peft", "--uniform") / peers.PEFT_WEIGHTS
    changed = peers.changed_tensors(source / peers.PEFT_WEIGHTS, uniform)
    assert not norms & set(changed)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_trap_08_the_base_weight_in_the_file_is_no_update(
    target: str,
    train: Callable[..., Path],
    attempt: Callable[..., Any],
    tiny: Tiny,
    peers: ModuleType,
) -> None:
    """Targeting the vocabulary makes PEFT save the whole base weight beside A and B."""
    source = train(("q_proj", target))
    names = peers.raw_tensors(source / peers.PEFT_WEIGHTS)
    assert any(name.endswith(f"{target}.base_layer.weight") for name in names)
    base = tiny("llama").path
    outcome = attempt(source, "mlx", "--base", base)
    assert outcome.code == 0, outcome.text
    assert "set aside" in outcome.out
    assert not [n for n in peers.raw_tensors(outcome.path / peers.MLX_WEIGHTS) if "base" in n]


def test_trap_09_trained_tokens_are_replaced_rows(
    train: Callable[..., Path], refused: Refused, tiny: Tiny
) -> None:
    """trainable_tokens_delta holds rows, not differences; MLX has no place for either."""
    source = train(trainable_token_indices=[5, 9])
    refused(source, "mlx", "--base", tiny("llama").path, saying="token")


def test_trap_10_adalora_scales_by_its_initial_rank(
    train: Callable[..., Path], exact: Callable[..., Any]
) -> None:
    """And has a third factor, and a rank_pattern of another meaning."""
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=8, total_step=10, target_modules=["q_proj"]
    )
    exact(train(config))


@pytest.mark.parametrize("way", ["pissa", "olora", "pissa_niter_2"])
def test_trap_11_initialisations_that_move_the_base(
    way: str, train: Callable[..., Path], refused: Refused
) -> None:
    """B @ A relative to the original base is not what was trained: it looks plain and is wrong."""
    refused(train(init_lora_weights=way), "mlx", saying=way[:5])


@pytest.mark.parametrize("way", ["loftq", "corda", "lora_ga", "pissa_niter_16"])
def test_trap_11_initialisations_told_by_the_config_alone(
    way: str, train: Callable[..., Path], refused: Refused, peers: ModuleType
) -> None:
    """These need data or other packages to run; the field of the config is all there is to see."""
    source = train()
    peers.edit_json(source / peers.CONFIG, init_lora_weights=way)
    refused(source, "mlx", saying=way)


@pytest.mark.parametrize("way", ["gaussian", "orthogonal", "mica", "eva", True, False])
def test_trap_11_initialisations_that_leave_the_base_alone(
    way: str | bool,
    train: Callable[..., Path],
    convert: Convert,
    tiny: Tiny,
    peers: ModuleType,
) -> None:
    """How A and B began doesn't matter once they are trained."""
    source = train()
    expected = peers.peft_deltas(tiny("llama").path, source)
    peers.edit_json(source / peers.CONFIG, init_lora_weights=way)
    result = convert(source, "mlx")
    peers.assert_same_deltas(peers.mlx_deltas(tiny("llama").path, result), expected)


def test_trap_13_the_magnitude_goes_by_three_names(
    train: Callable[..., Path], exact: Callable[..., Any], convert: Convert, peers: ModuleType
) -> None:
    """No `.weight` in PEFT's file, `m` in MLX's, and (out,) in both."""
    source = train(["q_proj", "k_proj"], use_dora=True)
    exact(source)
    stem = "model.layers.0.self_attn.k_proj"
    mlx = peers.raw_tensors(convert(source, "mlx") / peers.MLX_WEIGHTS)
    peft = peers.raw_tensors(source / peers.PEFT_WEIGHTS)
    assert mlx[f"{stem}.m"] == peft[f"{peers.PEFT_PREFIX}{stem}.lora_magnitude_vector"]
    assert mlx[f"{stem}.m"][1] == (48,)


@pytest.mark.parametrize(
    "pattern", [r"(h|layers)", r"model\.layers", ["x", "la.*s"], "model.layers"]
)
def test_layers_pattern_is_a_regex(
    pattern: Any, train: Callable[..., Path], exact: Callable[..., Any], convert: Convert,
    tiny: Tiny, peers: ModuleType,
) -> None:  # fmt: skip
    """PEFT puts it into one; the layers it reads are those it adapts, on the way back as well."""
    source = train(layers_to_transform=[0, 2], layers_pattern=pattern)
    expected = exact(source)
    assert {name.split(".")[2] for name in expected} == {"0", "2"}
    narrowed = convert(source, "peft", "--exclude", "layers.2")
    assert peers.peft_deltas(tiny("llama").path, narrowed).keys() == {
        "model.layers.0.self_attn.q_proj"
    }


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trap_34_saved_biases_are_absolute(
    bias: str, train: Callable[..., Path], refused: Refused, convert: Convert, peers: ModuleType
) -> None:
    """Folding a scale into them, or adding them to the base's own, would both be wrong."""
    patterns = {"alpha_pattern": {"q_proj": 33}}
    source = train(("q_proj", "c_fc"), base="starcoder2", bias=bias, **patterns)
    names = {n for n in peers.raw_tensors(source / peers.PEFT_WEIGHTS) if n.endswith("bias")}
    assert any(name.endswith("q_proj.base_layer.bias") for name in names)
    assert any(name.endswith("k_proj.bias") for name in names) == (bias == "all")
    refused(source, "mlx", saying="bias")
    uniform = convert(source, "peft", "--uniform") / peers.PEFT_WEIGHTS
    changed = peers.changed_tensors(source / peers.PEFT_WEIGHTS, uniform)
    assert changed
    assert not names & set(changed)


@pytest.mark.parametrize("name", ["default", "style", "v1-2"])
def test_trap_35_adapter_names_inside_the_keys(
    name: str,
    train: Callable[..., Path],
    convert: Convert,
    tiny: Tiny,
    peers: ModuleType,
) -> None:
    """Raw dumps of a model carry the adapter's name in every tensor name."""
    source = train(("q_proj", "k_proj"), use_dora=True)
    expected = peers.peft_deltas(tiny("llama").path, source)
    raw = {
        re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{name}.weight", key).replace(
            "lora_magnitude_vector", f"lora_magnitude_vector.{name}.weight"
        ): tensor
        for key, tensor in peers.load_file(source / peers.PEFT_WEIGHTS).items()
    }
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, raw)
    if name == "default":  # the one stock PEFT reads as well
        peers.assert_same_deltas(peers.peft_deltas(tiny("llama").path, source), expected)
    result = convert(source, "mlx")
    peers.assert_same_deltas(peers.mlx_deltas(tiny("llama").path, result), expected)


def test_trap_39_uniform_is_what_engines_read(
    train: Callable[..., Path], convert: Convert, tiny: Tiny, peers: ModuleType
) -> None:
    """One r, one lora_alpha, no rsLoRA; power-of-two folds keep even the bits of A."""
    source = train(("q_proj", "v_proj"), rank_pattern={"v_proj": 16}, use_rslora=True)
    result = convert(source, "peft", "--uniform")
    config = peers.read_json(result / peers.CONFIG)
    assert config["r"] == 16
    assert not any(config[key] for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
    expected = peers.peft_deltas(tiny("llama").path, source)
    peers.assert_same_deltas(peers.peft_deltas(tiny("llama").path, result), expected)
    padded = peers.load_file(result / peers.PEFT_WEIGHTS)
    for key, tensor in peers.load_file(source / peers.PEFT_WEIGHTS).items():
        if "lora_A" in key:
            assert np.array_equal(padded[key][: tensor.shape[0]].numpy(), tensor.numpy())
            assert not padded[key][tensor.shape[0] :].any()


def test_trap_41_the_quantised_base_is_told_by_its_name_alone(
    train: Callable[..., Path], attempt: Callable[..., Any], peers: ModuleType
) -> None:
    """No field says that the adapter was trained on 4-bit weights: keep the name, and say so."""
    source = train()
    name = "acme/tiny-llama-bnb-4bit"
    peers.edit_json(source / peers.CONFIG, base_model_name_or_path=name)
    outcome = attempt(source, "mlx")
    assert outcome.code == 0, outcome.text
    assert peers.read_json(outcome.path / peers.CONFIG)["model"] == name
    assert "4-bit bitsandbytes" in outcome.out
