"""Adapters of PEFT's methods other than LoRA, and what stock PEFT makes of them: cases and oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

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
    "TINYLORA": [
        {"r": 3, "u": 4, "weight_tying": 1.0},
        {"r": 3, "u": 3},  # a vector for each module
        {"r": 2, "u": 3, "weight_tying": 0.55},  # 12 values drawn, nine modules in four groups
    ],
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
