"""What a module's path says: its block, its pattern, what kind of matrix it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a module is, by the last part of its name. Parents matter for two names only.
_ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "Wqkv",
    "c_attn",
    "query_key_value",
    "wqkv",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "att_proj",
    "qkv",
)
_PROJECTION = ("o_proj", "out_proj", "dense", "wo", "attn_out")
_FEED_FORWARD = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "c_fc",
    "w1",
    "w2",
    "w3",
    "fc_in",
    "fc_out",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "ff_proj",
    "ff_out",
    "proj_1",
    "proj_2",
)
_HEADS = ("lm_head", "embed_out", "output", "score", "classifier")
_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "tok_embeddings",
    "word_embeddings",
    "embeddings",  # Mamba's, Nemotron H's
)
KINDS = (
    "attention matrices",
    "attention projection",
    "feed-forward",
    "experts",
    "other mixers",
    "embedding",
    "output head",
    "other",
)


def kind_of_module(module: str) -> str:
    """One of KINDS for a module path."""
    parts = module.split(".")
    leaf = parts[-1].partition("[")[0]  # qkv_proj[0]: a part of it
    if "experts" in parts or "switch_mlp" in parts:
        return "experts"
    if any(p in ("mixer", "mamba", "conv", "linear_attn", "temporal_block") for p in parts):
        return "other mixers"
    feed_forward = any(p in ("mlp", "feed_forward", "ffn", "mlp_block") for p in parts)
    for names, kind in (
        (_ATTENTION, "attention matrices"),
        (_EMBEDDINGS, "embedding"),
        (_HEADS, "output head"),
    ):
        if leaf in names:
            return kind
    if feed_forward or leaf in _FEED_FORWARD:
        return "feed-forward"
    if leaf in _PROJECTION or leaf == "c_proj":
        return "attention projection"
    return "other"


def is_lookup(module: str) -> bool:
    """Whether rows of its weight are looked up: the factors' axes are swapped there (`LowRank`).

    The embedding of tokens, and GPT-2's of positions, which no head is tied to.
    """
    return kind_of_module(module) == "embedding" or module.rpartition(".")[2] == "wpe"


def pattern_of(module: str) -> str:
    """The path with every index replaced by ``{}``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", module)


def block_of(module: str) -> tuple[str, int, str] | None:
    """(path of the list of blocks, index of the block, path within it), or None outside blocks."""
    match = re.match(r"(.+?)\.(\d{1,6})\.(.+)$", module)
    return (match[1], int(match[2]), match[3]) if match else None


def places(modules: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Module -> (index of its block, path within it), for those within blocks.

    Where there are several lists of blocks, each path begins with its list's: no two share a place.
    """
    found = {m: block for m in modules if (block := block_of(m))}
    several = len({where for where, _, _ in found.values()}) > 1
    return {
        m: (layer, f"{where}.{within}" if several else within)
        for m, (where, layer, within) in found.items()
    }
