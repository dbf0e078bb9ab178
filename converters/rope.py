"""Rotary position embeddings: the frequencies of each kind that a config can ask for.

Formulas: transformers 5 ``modeling_rope_utils.py`` and the papers it names (linear: kaiokendev;
llama3: the Llama 3.1 report; YaRN: arXiv 2309.00071, sections 3.1 to 3.4; LongRoPE: 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.text import printable


@dataclass(frozen=True)
class Rope:
    """``frequencies``: radians per position of each pair; ``factor`` multiplies cos and sin.

    The frequencies hold up to ``limit`` positions (None: any number); beyond it the model would
    switch to others.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    limit: int | None = None


def rope_of(config: Mapping[str, Any], head_dim: int, file: Path, *, local: bool = False) -> Rope:
    """The rotation of a model's layers; ``local``: of its sliding ones, where they differ.

    Reads transformers 5's ``rope_parameters`` and the older ``rope_theta`` and ``rope_scaling``.
    """
    settings = _settings(config, local)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "su":  # phi3's older name
        kind = "longrope"
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * float(partial))
    make = _KINDS.get(str(kind))
    if make is None or dim <= 0 or dim % 2 or theta <= 0:
        what = f"rope type {printable(repr(kind), 40)} with {dim} rotated values and base {theta}"
        raise Refused(file, f"{what} can't be built; known: {', '.join(_KINDS)}")
    try:
        return make(settings, config, theta, dim)
    except (KeyError, TypeError, ZeroDivisionError, ValueError) as e:
        raise Refused(file, f"rope settings of type {kind}: {type(e).__name__} {e}") from None


def _settings(config: Mapping[str, Any], local: bool) -> dict[str, Any]:
    held = config.get("rope_parameters")
    nested = isinstance(held, dict) and isinstance(held.get("full_attention"), dict)
    if isinstance(held, dict):
        return dict(held["sliding_attention" if local else "full_attention"] if nested else held)
    if local:  # gemma3's older fields: scaling is the global layers' alone
        return {"rope_theta": config.get("rope_local_base_freq") or 10000.0}
    old = config.get("rope_scaling")
    theta = config.get("rope_theta")
    if theta is None and config.get("model_type") == "gemma3_text":
        theta = 1e6
    return {"rope_theta": theta} | (old if isinstance(old, dict) else {})


def _plain(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def _default(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    return Rope(tuple(_plain(theta, dim)))


def _linear(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    return Rope(tuple(f / float(s["factor"]) for f in _plain(theta, dim)))


def _dynamic(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    """As without scaling up to the trained length; beyond, the base grows with the text."""
    limit = s.get("original_max_position_embeddings") or c["max_position_embeddings"]
    return Rope(tuple(_plain(theta, dim)), limit=int(limit))


def _llama3(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    """High frequencies stay, low ones are divided by the factor, those between blend."""
    factor, low, high = (float(s[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(s["original_max_position_embeddings"])
    found = []
    for f in _plain(theta, dim):
        turns = trained * f / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(f * (keep + (1 - keep) / factor))
    return Rope(tuple(found))


def _yarn(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    trained = float(s.get("original_max_position_embeddings") or c["max_position_embeddings"])
    factor = float(s.get("factor") or c["max_position_embeddings"] / trained)

    def temperature(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    given, m, m_all = (s.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and m and m_all:
        given = temperature(factor, m) / temperature(factor, m_all)
    elif given is None:
        given = temperature(factor)

    def pair_of(turns: float) -> float:  # which pair turns so often over the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(float(s.get("beta_fast") or 32)), pair_of(float(s.get("beta_slow") or 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    found = []
    for i, f in enumerate(_plain(theta, dim)):
        slow = min(1.0, max(0.0, (i - low) / (high - low)))
        found.append(f * (1 - slow) + f / factor * slow)
    return Rope(tuple(found), float(given))


def _longrope(s: Mapping[str, Any], c: Mapping[str, Any], theta: float, dim: int) -> Rope:
    """The short factors; beyond the trained length the long ones would apply."""
    trained = (
        s.get("original_max_position_embeddings")
        or c.get("original_max_position_embeddings")
        or c["max_position_embeddings"]
    )
    factor = float(s.get("factor") or c["max_position_embeddings"] / trained)
    given = s.get("attention_factor")
    if given is None:
        given = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    short = [float(f) for f in s["short_factor"]]
    plain = _plain(theta, dim)
    if len(short) != len(plain):
        raise ValueError(f"short_factor has {len(short)} entries, expected {len(plain)}")
    return Rope(tuple(f / g for f, g in zip(plain, short, strict=True)), float(given), int(trained))


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rotation(rope: Rope, positions: int) -> tuple[Any, Any]:
    """cos and sin, each (positions, rotated values) in float32.

    The first half of sin is negated: x * cos + swap(x) * sin is then the rotation, where swap
    exchanges the halves of x.
    """
    import numpy as np

    # transformers multiplies float32 positions with float32 frequencies
    frequencies = np.array(rope.frequencies, np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles) * np.float32(rope.factor), np.sin(angles) * np.float32(rope.factor)
    return np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1)
