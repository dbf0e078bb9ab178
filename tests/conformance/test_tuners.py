"""PEFT's methods other than LoRA: what we make of them is what PEFT merges into the weights.

The oracle is stock PEFT: the adapter it saved, loaded and merged in float64, less the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from loraduct.formats import peft_config
from loraduct.formats.peft_tuners import TUNERS

TARGETS = ["q_proj", "v_proj", "down_proj"]  # (96, 64), (48, 64) and (64, 112) in the tiny llama
WITH_BIAS = "qwen2"  # its q, k and v projections have biases
# method -> settings to try; none is PEFT's default, and all sizes fit the tiny models
CASES: dict[str, list[dict[str, Any]]] = {
    "ADALORA": [
        {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 20},
        {"init_r": 3, "total_step": 10, "r": 5, "bias": "all", "on": WITH_BIAS},
    ],
    "LOHA": [{"r": 4, "alpha": 6, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 2}}],
    "LOKR": [
        {"r": 3, "decompose_factor": 4, "alpha": 5},
        {"r": 2, "decompose_both": True, "decompose_factor": 8},
    ],
    "VERA": [{"r": 6}, {"r": 5, "bias": "vera_only", "on": WITH_BIAS}],
    "PVERA": [{"r": 6, "sample_at_inference": False}],
    "VBLORA": [
        {"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 3},
        {"r": 3, "num_vectors": 20, "vector_length": 8, "save_only_topk_weights": True},
    ],
    "DELORA": [{"r": 4, "rank_pattern": {"q_proj": 3}}],
    "GRALORA": [
        {"r": 6, "gralora_k": 2, "alpha": 10},
        {"r": 4, "gralora_k": 4, "alpha": 10, "hybrid_r": 3},
    ],
    "TINYLORA": [{"r": 3, "u": 4, "weight_tying": 1.0}],
    "UNILORA": [{"r": 4, "theta_d_length": 128, "save_indices": True}],
    "MISS": [
        {"r": 6},  # divides none of the widths
        {"r": 4, "init_weights": "mini", "mini_r": 8},
        {"r": 4, "init_weights": "bat", "dense": True, "target_modules": ["q_proj", "v_proj"]},
    ],
    "HRA": [{"r": 4}, {"r": 3, "apply_GS": True}],
    "DEFT": [
        {"r": 4},
        {"r": 4, "decomposition_method": "qr", "alpha": 6},
        {"r": 3, "para": True},
    ],
    "PEANUT": [{"r": 4}, {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5}],
    "BEFT": [{"on": WITH_BIAS, "target_modules": ["q_proj", "v_proj"]}],
    "FOURIERFT": [{"n_frequency": 50, "scaling": 80.0, "random_loc_seed": 5}],
    "WAVEFT": [{"n_frequency": 50}, {"n_frequency": 40, "use_idwt": False, "random_loc_seed": 3}],
    "C3A": [{"block_size": 8, "block_size_pattern": {"v_proj": 16}}],
    "SHIRA": [{"r": 2}],
    "SUPERTUNING": [{}, {"r": 3, "lora_alpha": 6}],
    "RANDLORA": [{"r": 5}],
    "IA3": [
        {"feedforward_modules": ["down_proj"]},
        {"feedforward_modules": ["down_proj"], "on": WITH_BIAS},
    ],
    "OFT": [
        {"oft_block_size": 4},
        {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 0, "r": 4, "use_cayley_neumann": False, "coft": True, "eps": 0.05},
    ],
    "BOFT": [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 4}],
    "ROAD": [
        {"group_size": 8},
        {"group_size": 8, "variant": "road_2", "on": WITH_BIAS},
        {"group_size": 4, "variant": "road_4"},
    ],
    "HIRA": [{"r": 4}],
    "GLORA": [
        {"r": 3},
        {"r": 3, "config_C": "lora", "config_D_E": "vector", "on": WITH_BIAS},
        {"r": 3, "config_A_B": "vector", "config_C": "vector", "on": WITH_BIAS},
        {"r": 3, "config_A_B": "constant", "config_C": "none", "on": WITH_BIAS},
    ],
    "OSF": [{"effective_rank": 40}],
    "FROD": [{}],
}
EVERY = [(kind, i) for kind, cases in CASES.items() for i in range(len(cases))]
EXACT = [(k, i) for k, i in EVERY if TUNERS[k].form == "low-rank" and "dense" not in CASES[k][i]]
DENSE = [case for case in EVERY if case not in EXACT]
REFUSED = [kind for kind, tuner in TUNERS.items() if tuner.form == "refused"]
Deltas = dict[str, np.ndarray]


def test_every_method_of_peft_is_known() -> None:
    """A new PEFT brings new methods: the table, and the cases here, must say what they are."""
    from peft.utils.peft_types import PeftType

    assert {t.value for t in PeftType} - {"LORA"} <= set(TUNERS)
    assert set(TUNERS) == peft_config.KINDS - {"LORA"}
    assert set(TUNERS) - set(REFUSED) - {"LN_TUNING"} == set(CASES)


def randomise(model: Any) -> None:
    """Move everything that is trained, by a seed."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise / max(1, parameter.shape[-1]) ** 0.5)


def config_of(kind: str, number: int) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    options = {k: v for k, v in CASES[kind][number].items() if k not in ("on", "dense")}
    return CONFIGS[kind](task_type="CAUSAL_LM", **{"target_modules": TARGETS, **options})


@pytest.fixture
def saved(
    tiny: Callable[[str], Any], peers: ModuleType, tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """saved(kind, number) -> (the folder stock PEFT saved, the base's)."""
    import torch
    from peft import get_peft_model

    def make(kind: str, number: int = 0, config: Any = None) -> tuple[Path, Path]:
        on = CASES[kind][number].get("on", "llama") if config is None else "llama"
        torch.manual_seed(0)
        model = get_peft_model(peers.hf_base(tiny(on).path), config or config_of(kind, number))
        randomise(model)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", tiny(on).path

    return make


def merged(peers: ModuleType, base: Path, folder: Path) -> Deltas:
    """Every parameter that stock PEFT changes when it merges the folder, and by how much."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(peers.hf_base(base)).double(), folder)
    changed = dict(model.double().eval().merge_and_unload().named_parameters())
    found = {}
    for name, before in peers.hf_base(base).named_parameters():
        delta = (changed[name] - before.double()).detach().numpy()
        if np.abs(delta).max() > 0:
            found[name] = delta
    return found


def assert_same(found: Deltas, expected: Deltas, tolerance: float = 1e-5) -> None:
    assert expected, "PEFT changes nothing"
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        error = float(np.linalg.norm(found[name] - delta) / np.linalg.norm(delta))
        assert error < tolerance, f"{name}: {error:.1e}"


def options_for(kind: str, base: Path, number: int = 0) -> list[Any]:
    bat = CASES.get(kind, [{}])[number].get("init_weights") == "bat"
    return ["--base", base] if TUNERS[kind].base or bat else []


@pytest.mark.parametrize(("kind", "number"), [c for c in EXACT if c[0] != "BEFT"])
def test_exact_form(kind: str, number: int, saved: Any, convert: Any, peers: ModuleType) -> None:
    """Without any flag, the LoRA is what the method did."""
    source, base = saved(kind, number)
    made = convert(source, "peft", *options_for(kind, base, number))
    assert peers.read_json(made / "adapter_config.json")["peft_type"] == "LORA"
    assert_same(merged(peers, base, made), merged(peers, base, source))


@pytest.mark.parametrize(("kind", "number"), DENSE)
def test_dense_at_full_rank(
    kind: str, number: int, saved: Any, convert: Any, peers: ModuleType
) -> None:
    """At the rank that leaves nothing out, the approximation is the update."""
    source, base = saved(kind, number)
    flags = ["--rank", 112, "--allow-approximate"]
    made = convert(source, "peft", *options_for(kind, base, number), *flags)
    # OSF: PEFT takes the parts it replaces from an SVD in float32
    tolerance = 1e-4 if kind == "OSF" else 1e-5
    assert_same(merged(peers, base, made), merged(peers, base, source), tolerance)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in DENSE}))
def test_dense_at_low_rank(
    kind: str, saved: Any, run: Any, tmp_path: Path, peers: ModuleType
) -> None:
    """The residual in the account is the optimum, and the written adapter has it."""
    number = next(i for k, i in DENSE if k == kind)
    source, base = saved(kind, number)
    words = ["convert", source, "--to", "peft", "-o", tmp_path / "out", "--json"]
    words += [*options_for(kind, base, number), "--rank", 5, "--allow-approximate"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    account = json.loads(done.stdout)
    expected, found = merged(peers, base, source), merged(peers, base, tmp_path / "out")
    weights = {n.removesuffix(".weight"): d for n, d in expected.items() if n.endswith(".weight")}
    assert account["residuals"].keys() == weights.keys()
    for module, delta in weights.items():
        norm = np.linalg.norm(delta)
        best = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[5:]) / norm
        error = np.linalg.norm(found[f"{module}.weight"] - delta) / norm
        assert account["residuals"][module] == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert error == pytest.approx(best, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("kind", "number"), EVERY)
def test_every_tensor_is_accounted_for(
    kind: str, number: int, saved: Any, run: Any, peers: ModuleType
) -> None:
    source, base = saved(kind, number)
    words = ["convert", source, "--to", "peft", "--dry-run", "--json"]
    words += options_for(kind, base, number)
    words += ["--rank", 3, "--allow-approximate"] if (kind, number) in DENSE else []
    done = run(*words)
    assert done.exit_code == 0, done.output
    sources = {t["source"] for t in json.loads(done.stdout)["tensors"]}
    assert sources == peers.raw_tensors(source / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("kind", [k for k in CASES if TUNERS[k].base])
def test_needs_the_base(kind: str, saved: Any, refused: Callable[..., str]) -> None:
    source, _ = saved(kind)
    said = refused(source, "peft", saying=f"is a {TUNERS[kind].name} adapter")
    assert "--base" in said


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in DENSE}))
def test_full_rank_is_refused_unless_allowed(
    kind: str, saved: Any, refused: Callable[..., str]
) -> None:
    number = next(i for k, i in DENSE if k == kind)
    source, base = saved(kind, number)
    known = options_for(kind, base, number)
    said = refused(source, "peft", *known, saying=TUNERS[kind].name)
    assert "full rank" in said
    assert "--allow-approximate" in said
    refused(source, "peft", *known, "--rank", 4, saying="--allow-approximate")
    refused(source, "peft", *known, "--allow-approximate", saying="--rank N")


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "source" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    said = refused(folder, "mlx", saying=TUNERS[kind].name)
    assert TUNERS[kind].why[:40] in said


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


@pytest.mark.parametrize(
    ("kind", "options", "saying"),
    [
        ("VERA", {"r": 4, "save_projection": False}, "save_projection"),
        ("UNILORA", {"r": 4, "theta_d_length": 128}, "save_indices"),
        ("TINYLORA", {"r": 2, "u": 3}, "weight_tying"),
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
