"""Adapters that a program takes as arguments: an app swaps them without loading anything again.

Per kind of module one pair of arguments, ``lora_a_KIND`` (layers, rank, in) and ``lora_b_KIND``
(layers, out, rank), FLOAT16; b holds the scale. Layers without an update are zero, and all zeros
are the base. The adapter itself is a safetensors file with these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.computed import given
from loraduct.converters.decoder import Decoder
from loraduct.converters.fuse import Weighted
from loraduct.errors import Refused
from loraduct.modules import block_of
from loraduct.tensor import Tensor

Kinds = Mapping[str, tuple[int, int, int]]  # module kind -> (rank, in, out)
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def kinds_of(decoder: Decoder, rank: int) -> dict[str, tuple[int, int, int]]:
    """Every linear layer of the blocks, with the sizes of its factors."""
    d = decoder
    query, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    sizes = {
        "q_proj": (d.hidden, query),
        "k_proj": (d.hidden, keys),
        "v_proj": (d.hidden, keys),
        "qkv_proj": (d.hidden, query + 2 * keys),
        "o_proj": (query, d.hidden),
        "gate_proj": (d.hidden, d.intermediate),
        "up_proj": (d.hidden, d.intermediate),
        "gate_up_proj": (d.hidden, 2 * d.intermediate),
        "down_proj": (d.intermediate, d.hidden),
    }
    return {k: (rank, *sizes[k]) for k in (FUSED if d.family.fused else PLAIN)}


def arguments(adapters: Weighted, decoder: Decoder, kinds: Kinds) -> dict[str, Tensor]:
    """The arguments that make a program with ``kinds`` compute the adapters together, lazily.

    Ranks are put side by side. Raises Refused naming what can't come as an argument (DoRA,
    embeddings, heads, biases, whole weights), and where the ranks exceed the program's.
    """
    placed: dict[tuple[str, int], list[tuple[LowRank, float]]] = {}
    for adapter, weight in adapters:
        for module, u in _plain(adapter).items():
            place = _place(module, kinds)
            if place is None:
                what = "can't come as an argument (only linear layers of the blocks); use functions"
                raise Refused(adapter.weights, what, tensor=module)
            placed.setdefault(place, []).append((u, weight))
    for (kind, layer), updates in placed.items():
        total, rank = sum(u.rank for u, _ in updates), kinds[kind][0]
        if total > rank:
            what = f"rank {total}, the package takes up to {rank}; build it with --max-rank {total}"
            raise Refused(updates[0][0].a.path, what, tensor=f"layer {layer} {kind}")
    found = {}
    for kind, (rank, width, height) in kinds.items():
        here = {layer: u for (k, layer), u in placed.items() if k == kind}
        for part, shape in (
            ("a", (decoder.layers, rank, width)),
            ("b", (decoder.layers, height, rank)),
        ):
            found[f"lora_{part}_{kind}"] = _stacked(f"lora_{part}_{kind}", part, shape, here)
    return found


def _plain(adapter: Adapter) -> dict[str, LowRank]:
    for name in adapter.replacements:
        what = "is a whole parameter: it can't come as an argument; use functions, or merged"
        raise Refused(adapter.weights, what, tensor=name)
    for module, u in adapter.low_rank.items():
        if u.magnitude is not None or u.bias is not None:
            what = "is DoRA, or has a bias: it can't come as an argument; use functions, or merged"
            raise Refused(adapter.weights, what, tensor=module)
    return adapter.low_rank


def _place(module: str, kinds: Kinds) -> tuple[str, int] | None:
    block, kind = block_of(module), module.rpartition(".")[2]
    return (kind, block[1]) if block and kind in kinds else None


def _stacked(
    name: str,
    part: str,
    shape: tuple[int, int, int],
    here: Mapping[int, list[tuple[LowRank, float]]],
) -> Tensor:
    import numpy as np

    def make() -> Any:
        out = np.zeros(shape, np.float32)
        for layer, updates in here.items():
            at = 0
            for u, weight in updates:
                if part == "a":
                    out[layer, at : at + u.rank] = u.a.read()
                else:
                    out[layer, :, at : at + u.rank] = u.b.read() * np.float32(u.scale * weight)
                at += u.rank
        return out

    inputs = [t for updates in here.values() for u, _ in updates for t in (u.a, u.b)]
    return given(name, inputs, shape, make).to("F16")
