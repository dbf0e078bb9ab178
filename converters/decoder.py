"""What a decoder of the llama family computes, as data: one table of features for all builders.

Every family is the same graph with features switched on. What a config says is read from the
config; ``FAMILIES`` holds only what the architecture's code in transformers 5 fixes (files
``models/*/modeling_*.py``). Whether a layer has a bias is seen from the base's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loraduct.converters.rope import Rope, rope_of
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.text import printable, several

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What an architecture's code fixes.

    ``norm_plus_one``: RMSNorm multiplies by 1 + weight. ``sandwich``: norms after attention and
    feed-forward too. ``fused``: one qkv_proj and one gate_up_proj. ``windowed``: which layers slide
    when the config lists no ``layer_types``: none, all, those of a rule.
    """

    norm_plus_one: bool = False
    embed_scaled: bool = False
    sandwich: bool = False
    qk_norm: bool = False
    fused: bool = False
    windowed: str = "none"
    rope_local: bool = False
    no_rope: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(windowed="all"),
    "qwen2": Family(windowed="late"),
    "qwen3": Family(windowed="late", qk_norm=True),
    "gemma2": Family(norm_plus_one=True, embed_scaled=True, sandwich=True, windowed="even"),
    "gemma3_text": Family(
        norm_plus_one=True, embed_scaled=True, sandwich=True, qk_norm=True, windowed="pattern",
        rope_local=True,
    ),
    "phi3": Family(fused=True, windowed="all"),
    "smollm3": Family(windowed="nope", no_rope=True),
}  # fmt: skip
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


@dataclass(frozen=True)
class Decoder:
    """A decoder's graph in numbers. Lengths per layer: ``windows``, ``ropes``.

    ``scale`` multiplies q k^T; ``windows``: how many positions a layer looks back (None: all);
    ``ropes``: which of ``tables`` turns a layer's q and k (None: no rotation).
    """

    model_type: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    positions: int
    eps: float
    activation: str
    scale: float
    tied: bool
    embed_scale: float | None
    attention_cap: float | None
    logits_cap: float | None
    windows: tuple[int | None, ...]
    ropes: tuple[str | None, ...]
    tables: Mapping[str, Rope]


def describe(base: Base) -> Decoder:
    """The decoder of a base model folder. Raises Refused for what no feature covers."""
    config = base.text_config
    file = base.path / "config.json"
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or config is not base.config:
        what = printable(repr(base.config.get("model_type")), 60)
        raise Refused(
            file, f"model_type {what} can't be built; known: {several(list(FAMILIES), 20)}"
        )

    def number(key: str, default: Any = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 31:
            found = printable(repr(value), 60)
            raise Refused(file, f"{key} is {found}, expected a positive integer")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim", hidden // heads if heads <= hidden else None)
    layers = number("num_hidden_layers")
    kv_heads = number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise Refused(file, f"{heads} heads are no multiple of {kv_heads} key and value heads")
    if config.get("use_bidirectional_attention"):
        raise Refused(file, "use_bidirectional_attention: a causal decoder is expected")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise Refused(file, f"activation {printable(repr(activation), 60)} is not known")
    types = _layer_types(config, family, layers)
    window = config.get("sliding_window")
    tables = {FULL: rope_of(config, head_dim, file)}
    if family.rope_local:
        tables[SLIDING] = rope_of(config, head_dim, file, local=True)
    tied = base.tied
    return Decoder(
        model_type=str(kind),
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=number("intermediate_size"),
        positions=number("max_position_embeddings", 2048),
        eps=float(config.get("rms_norm_eps") or 1e-6),
        activation=ACTIVATIONS[activation],
        scale=float(config.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        tied="lm_head.weight" not in base.tensors if tied is None else tied,
        embed_scale=math.sqrt(hidden) if family.embed_scaled else None,
        attention_cap=config.get("attn_logit_softcapping"),
        logits_cap=config.get("final_logit_softcapping"),
        windows=tuple(window if t == SLIDING and window else None for t in types),
        ropes=tuple(
            None
            if family.no_rope and not _uses_rope(config, i)
            else (t if t in tables and family.rope_local else FULL)
            for i, t in enumerate(types)
        ),
        tables=tables,
    )


def _uses_rope(config: Mapping[str, Any], layer: int) -> bool:
    """smollm3: ``no_rope_layers`` holds 1 where a layer rotates; else every n-th layer doesn't."""
    listed = config.get("no_rope_layers")
    if isinstance(listed, list) and layer < len(listed):
        return bool(listed[layer])
    return (layer + 1) % int(config.get("no_rope_layer_interval") or 4) != 0


def _layer_types(config: Mapping[str, Any], family: Family, layers: int) -> tuple[str, ...]:
    """Full or sliding, per layer (transformers 5's configurations give the same defaults)."""
    listed = config.get("layer_types")
    if family.windowed == "all":
        return (SLIDING,) * layers
    if family.windowed in ("late", "nope") and not config.get("use_sliding_window"):
        return (FULL,) * layers
    if isinstance(listed, list) and len(listed) >= layers:
        return tuple(str(t) for t in listed[:layers])
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    rules: dict[str, Callable[[int], bool]] = {
        "none": lambda i: False,
        "late": lambda i: i >= (config.get("max_window_layers") or 0),
        "even": lambda i: i % 2 == 0,
        "pattern": lambda i: (i + 1) % int(every) != 0,
        "nope": lambda i: not _uses_rope(config, i),
    }
    slides = rules[family.windowed]
    return tuple(SLIDING if slides(i) else FULL for i in range(layers))
