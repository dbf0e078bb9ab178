"""Tiny bases of every other model type of the table: mixtures, mixers, latent attention, vision.

What makes a small model of a type that has one of each of its layers is known already to
scripts/tiny_configs.py, from which the table is derived. Here stands what it takes to *run* it the
same in both libraries: values of the config, keys mlx-lm reads elsewhere, weights that one of them
ignores. A comment says why where the reason is a difference between the libraries.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Config = dict[str, Any]
Hook = Callable[[str, Any], tuple[str, Any]]
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _tiny_configs() -> ModuleType:
    path = SCRIPTS / "tiny_configs.py"
    spec = importlib.util.spec_from_file_location("conformance_tiny_configs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SMALL = _tiny_configs().TINY


@dataclass(frozen=True)
class More:
    """One model type, as it runs alike in both libraries."""

    hf: Config = field(default_factory=dict)  # laid over what scripts/tiny_configs.py has
    mlx: Config = field(default_factory=dict)  # keys of config.json that only mlx-lm reads
    still: str = "$^"  # parameters that stay zero, as mlx-lm leaves them out
    large: str = "$^"  # weights times twenty: what follows is a norm with another epsilon
    only_mlx: Hook | None = None  # name and tensor, saved -> as mlx-lm can load it
    not_in_mlx: str = "$^"  # weights that mlx-lm has no place for
    lost: str = "$^"  # PEFT's tensors of which a part without effect doesn't come back from MLX
    refused: tuple[str, ...] = ()  # linear layers, experts or routers that can't be carried to MLX
    refused_back: tuple[str, ...] = ()  # what mlx-lm adapts by default and can't be carried to PEFT
    not_in_peft: tuple[str, ...] = ()  # linear layers that PEFT can't adapt, or not in effect


def rope(**values: Any) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, **values}}


TIED = {"tie_word_embeddings": True}
QKV = r"in_proj_qkv|conv1d"  # both normalise q and k, at different places
WHOLE = rope(partial_rotary_factor=1.0)
MROPE = rope(mrope_section=[2, 3, 3])
BARE = (r"mlp\.gate$",)  # a bare parameter in mlx-lm as well
HEADS = (r"kv_b_proj",)
LATENT = HEADS + BARE
NO_MULTIPLIERS = dict.fromkeys(
    (
        "embedding_multiplier",
        "lm_head_multiplier",
        "attention_in_multiplier",
        "attention_out_multiplier",
        "key_multiplier",
        "ssm_in_multiplier",
        "ssm_out_multiplier",
    ),
    1.0,
) | {"mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5}
FALCON = (r"[qko]_proj", r"(gate|down)_proj", r"in_proj")
OUT_PROJ = (r"(mixer|mamba)\.out_proj",)
DT_PROJ = (r"(mixer|mamba)\.dt_proj",)
OUT_DT = OUT_PROJ + DT_PROJ


def _olmo_norms(name: str, value: Any) -> tuple[str, Any]:
    """mlx-lm's olmo_hybrid calls the norms of linear layers otherwise than checkpoints do."""
    name = name.replace("attention_layer_norm", "input_layernorm")
    return name.replace("feedforward_layer_norm", "post_attention_layernorm"), value


def _kimi_projector(name: str, value: Any) -> tuple[str, Any]:
    """mlx-lm drops the projector only by its name on the hub."""
    return name.removeprefix("model.") if "mm_projector" in name else name, value


MORE: dict[str, More] = {
    "afmoe": More(),
    "dbrx": More(refused_back=(r"experts\.",), not_in_peft=(r"experts\.",)),
    "deepseek_v2": More({"head_dim": 8} | WHOLE, refused=BARE),
    # with fewer tokens than index_topk the indexer chooses nothing, and its layers move nothing
    "deepseek_v32": More({"index_topk": 64} | WHOLE, refused=LATENT),
    "ernie4_5_moe": More(still="e_score_correction_bias"),
    "exaone_moe": More(refused=BARE),
    # mlx-lm folds most multipliers into weights, and forgets key_multiplier
    "falcon_h1": More(
        NO_MULTIPLIERS, refused=FALCON, refused_back=FALCON + OUT_PROJ, not_in_peft=OUT_PROJ
    ),
    "falcon_mamba": More({"state_size": 8}, refused_back=OUT_DT, not_in_peft=OUT_DT),
    "gemma3": More(
        TIED
        | {
            "sliding_window": 64,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {"sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "gemma4": More(TIED | {"pad_token_id": 0}),
    "gemma4_text": More(SMALL["gemma4_text"].also[0]),  # with experts
    "glm4_moe_lite": More({"head_dim": 8, "rms_norm_eps": 1e-6} | WHOLE, refused=LATENT),
    "glm_moe_dsa": More({"index_topk": 64} | WHOLE, refused=LATENT),
    "gpt2": More(TIED),
    # mlx-lm has one kind of GELU in each of these two, whatever the config says
    "gpt_bigcode": More({"activation_function": "gelu"}),
    "gpt_neox": More({"hidden_act": "gelu_new"}),
    "gptj": More(),
    "granitemoehybrid": More(mlx={"position_embedding_type": "nope"}),
    "granitemoehybrid without experts": More(mlx={"position_embedding_type": "nope"}),
    "hunyuan_v1_dense": More(),
    "internlm3": More(),
    "iquestcoder": More(),
    # of fewer experts than all, mlx-lm normalises the weights and transformers does not
    "jamba": More({"num_experts_per_tok": 4}, refused_back=DT_PROJ, not_in_peft=DT_PROJ),
    "kimi_k25": More(only_mlx=_kimi_projector, refused=LATENT),
    "kimi_linear": More({"rms_norm_eps": 1e-6}, {"rope_theta": 1e4}, refused=HEADS),
    # PEFT can save, and not load, an adapter of laguna's shared experts
    "laguna": More(refused_back=(r"shared_expert\.",), not_in_peft=(r"shared_experts\.",)),
    "lfm2": More(TIED),
    # mlx-lm asks for a fourth layer
    "llama4": More(rope() | {"num_hidden_layers": 4, "moe_layers": [1, 3], "rms_norm_eps": 1e-6}),
    "llama4_text": More(),
    "llava": More(),
    # transformers saves weights of its zero experts, which nothing reads
    "longcat_flash": More(
        {"head_dim": 8},
        large="q_a_proj|kv_a_proj",
        not_in_mlx=r"experts\.[45]\.(gate|up)_proj",
        lost=r"mlp\.experts\.(base_layer\.)?lora_[AB]",
        refused=HEADS,
        refused_back=(r"router\.classifier",),
        not_in_peft=(r"router\.classifier",),
    ),
    "mamba": More(refused_back=OUT_DT, not_in_peft=OUT_DT),
    "mamba2": More(refused_back=OUT_PROJ, not_in_peft=OUT_PROJ),
    "mellum": More(),
    "mimo_v2_flash": More(mlx={"rope_theta": 5e6, "partial_rotary_factor": 0.334}, refused=BARE),
    "minicpm3": More(
        mlx={"rope_scaling": {"original_max_position_embeddings": 256}},
        large="q_a_proj|kv_a_proj",
    ),
    "minimax_m2": More({"head_dim": 24} | rope(partial_rotary_factor=0.5), {"rotary_dim": 12}),
    "minimax_m3_vl": More({"head_dim": 24, "rotary_dim": 12} | rope(partial_rotary_factor=0.5)),
    "mistral3": More(),
    "mistral4": More(refused=HEADS),
    # transformers clamps the time step at time_step_min, mlx-lm at time_step_limit
    "nemotron_h": More(
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "head_dim": 24,
            "moe_shared_expert_intermediate_size": 40,
        },
        {"time_step_limit": [0.001, 1e9]},
        refused=(r"mixer\.gate$",),
        refused_back=OUT_PROJ,
        not_in_peft=OUT_PROJ,
    ),
    # transformers saves the convolution of q, k and v in thirds, which have to be equal
    "olmo_hybrid": More(
        {"linear_value_head_dim": 12}, large=r"conv1d|linear_attn\.[qk]_proj", only_mlx=_olmo_norms
    ),
    "qwen2_5_vl": More(MROPE),
    "qwen2_vl": More(MROPE),
    "qwen3_5": More(large=QKV),
    "qwen3_5_moe": More(large=QKV),
    "qwen3_next": More(large=QKV),
    "qwen3_vl": More(),
    "qwen3_vl_moe": More(),
    "recurrent_gemma": More(TIED),
    "solar_open": More({"head_dim": 32} | WHOLE, refused=BARE),
}
# What transformers takes the weight of, passing PEFT's layer by: an adapter of it has no effect.
PASSED_BY: dict[str, str] = {
    "falcon_mamba": r"\.dt_proj",
    "jamba": r"\.dt_proj",
    "longcat_flash": r"router\.classifier",
    "mamba": r"\.dt_proj",
}
# What mlx-lm can run and not train, so that no adapter of it comes from there.
UNTRAINED: dict[str, str] = {
    "recurrent_gemma": "mlx-lm's Model lacks what freezing needs (it never calls Module.__init__)",
}
# What no run can compare, and why; its modules are all refused.
NOT_RUN: dict[str, str] = {
    "bitnet": "mlx-lm loads packed ternary weights alone, and can adapt none of its layers",
}


@dataclass(frozen=True)
class Pair:
    """A base on disk: for transformers, and for mlx-lm (mostly the same folder)."""

    name: str
    hf: Path
    mlx: Path


def model_class(name: str) -> Any:
    """What loads this type in transformers: the causal model where there is one."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[name.split()[0]]
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    return next(auto for auto in autos if config_class in auto._model_mapping)


def build(name: str, folder: Path, randomise: Callable[[torch.nn.Module], None]) -> Pair:
    """Write a tiny model of this type, whole (with its vision part, where it has one)."""
    import torch
    import transformers

    entry, small = MORE[name], SMALL[name]
    config = transformers.AutoConfig.for_model(name.split()[0], **small.config(entry.hf))
    autos = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    auto = next(a for a in autos if type(config) in a._model_mapping)
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    randomise(model)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if re.search(entry.still, path):
                parameter.zero_()
            if re.search(entry.large, path):
                parameter.mul_(20)
    model.save_pretrained(folder)
    if small.fused:
        _rewrite(folder, model.state_dict())
    if small.hub:
        _rewrite(folder, dict(small.hub(*item) for item in _saved(folder).items()))
    _complete(folder / "config.json", small.mlx | entry.mlx)
    if entry.only_mlx is None and entry.not_in_mlx == "$^":
        return Pair(name, folder, folder)
    other = Path(shutil.copytree(folder, folder.with_name(f"{name}-mlx")))
    kept = [(n, v) for n, v in _saved(other).items() if not re.search(entry.not_in_mlx, n)]
    _rewrite(other, dict(entry.only_mlx(*item) if entry.only_mlx else item for item in kept))
    return Pair(name, folder, other)


def _saved(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def _rewrite(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    kept = {name: value.contiguous() for name, value in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _complete(path: Path, extra: Config) -> None:
    """Add what mlx-lm wants, and rope values where transformers 4 had them."""
    config = json.loads(path.read_text())
    config = _old_rope(config) | extra
    if "text_config" in config:
        config["text_config"] = _old_rope(config["text_config"]) | extra
    path.write_text(json.dumps(config, indent=2))


def _old_rope(config: Config) -> Config:
    values = dict(config.get("rope_parameters") or {})
    theta = values.pop("rope_theta", None)
    if theta is None or any(isinstance(value, dict) for value in values.values()):
        return config  # none, or one for each type of layer, which mlx-lm reads where they are
    old: Config = {"rope_theta": theta, "rope_scaling": None}
    if values["rope_type"] != "default":
        old["rope_scaling"] = values
    if "partial_rotary_factor" in values:
        old["partial_rotary_factor"] = values["partial_rotary_factor"]
    return config | old
