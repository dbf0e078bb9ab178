"""From one adapter format to another: names, one rank and scale where the target has only one.

Padding: rows of zeros on ``a`` and columns of zeros on ``b`` leave b @ a as it is. Folding:
scale_i * b @ a = s * (scale_i / s * b) @ a, exact when the ratio is a power of two; otherwise b
is rounded once, in float32 unless another dtype was asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraduct import origin
from loraduct.account import Account
from loraduct.adapter import Adapter, LowRank, Replacement, Update
from loraduct.architectures import kind_of_module, renamer
from loraduct.errors import Refused
from loraduct.formats import mlx_writer, peft_writer
from loraduct.formats.base import Base, differences
from loraduct.formats.folder import METADATA, Folder, model_card
from loraduct.tensor import UNIT_ROUNDOFF, is_exact
from loraduct.text import printable

NAMING = {"peft": "hf", "mlx": "mlx"}
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Options:
    """What a conversion may be told. ``include``/``exclude``: regexes on module names."""

    to: str
    base: Base | None = None
    dtype: str = "keep"
    uniform: bool = False
    name_map: Mapping[str, str] | None = None
    include: str | None = None
    exclude: str | None = None


def convert(adapter: Adapter, options: Options) -> Folder:
    """The folder that carries ``adapter`` in the target's format. Reads no values yet.

    Raises Refused naming what the target can't hold.
    """
    base = options.base
    if base is not None:
        for problem in differences(adapter, base):
            raise problem
        adapter = replace(
            adapter, layers=base.layers or adapter.layers, base_modules=base.linear_modules
        )
    kept = _select(adapter, options)
    dropped = [t for name, u in adapter.updates.items() if name not in kept for t in u.tensors]
    selected = replace(adapter, updates=kept)
    if dropped:  # a config that still selects what was left out would describe another adapter
        narrow = {"peft": peft_writer.narrowed, "mlx": mlx_writer.narrowed}[adapter.format]
        selected = narrow(
            selected, {n: u for n, u in adapter.updates.items() if n not in selected.updates}
        )
    named, names, note = _rename(selected, options)
    if options.to == "mlx":
        _check_head(named, base)
    if (options.to == "mlx" or options.uniform) and named.low_rank:
        if options.to == "mlx" and adapter.method != "full":
            mlx_writer.check_expressible(named)
        named = uniform(named, widen=options.dtype == "keep")
    if options.uniform and options.to == "peft" and named.low_rank:
        named = peft_writer.uniform_config(named)
    if options.dtype != "keep":
        named = replace(named, updates=_cast(named, DTYPES[options.dtype]))
    layout = {"peft": peft_writer.layout, "mlx": mlx_writer.layout}[options.to]
    tensors, config, account = layout(named)
    account.drop(dropped)
    account.set_aside(adapter.set_aside)
    account.check_complete(adapter.tensors())
    if adapter.format == options.to and "config" in account.fields:
        account.fields["config"] = _changes(adapter.config, config)
    account.notes += [note] if note else []
    kept_wide = options.dtype in ("f16", "bf16") and adapter.method == "dora"
    if kept_wide and any(
        u.magnitude and u.magnitude.dtype == "F32" for u in named.low_rank.values()
    ):
        account.notes.append(
            "DoRA magnitudes stay F32: rounding them would move the base's own weight"
        )
    account.notes += [n.text for n in adapter.notes]
    _account_fields(adapter, account)
    texts = {k: v for k, v in adapter.metadata.items() if k not in ("format", origin.KEY)}
    kin = base.kin if base is not None and base.has_weights else None
    record = origin.record(selected, named.updates, names, kin)
    return Folder(
        format=options.to,
        tensors=tensors,
        config=config,
        metadata=texts | METADATA[options.to] | {origin.KEY: record},
        card=model_card(options.to, config, adapter.base.name, adapter.format, texts),
        companions=adapter.companions,
        account=account,
    )


def _select(adapter: Adapter, options: Options) -> dict[str, Update]:
    """The updates that --include and --exclude keep."""
    kept = dict(adapter.updates)
    for regex, wanted in ((options.include, True), (options.exclude, False)):
        if regex is not None:
            try:
                compiled = re.compile(regex)
            except re.error as e:
                raise Refused(
                    None, f"--{'include' if wanted else 'exclude'} {printable(regex)!r}: {e}"
                ) from None
            kept = {n: u for n, u in kept.items() if (compiled.search(n) is not None) == wanted}
    # the trained bias of an adapted module goes where its module goes
    for name, u in adapter.updates.items():
        module = name.removesuffix(".bias")
        if isinstance(u, Replacement) and u.origin == "bias" and module in adapter.updates:
            kept.pop(name, None)
            kept |= {name: u} if module in kept else {}
    return {n: u for n, u in adapter.updates.items() if n in kept}


def _rename(adapter: Adapter, options: Options) -> tuple[Adapter, dict[str, str], str | None]:
    """The adapter with the target's module names, old name -> new name, and a note."""
    naming = NAMING[options.to]
    if adapter.naming == naming or not adapter.updates:
        return adapter, {n: n for n in adapter.updates}, None
    model_type = options.base.model_type if options.base else None
    modules = list(adapter.low_rank)
    file = options.base.path / "config.json" if options.base else adapter.weights
    to_new, note = renamer(
        modules, model_type, file, options.name_map, reverse=adapter.naming == "mlx"
    )
    # a full parameter is not renamed: the target refuses it, or both sides are MLX
    names = {m: to_new(m) for m in modules} | {n: n for n in adapter.replacements}
    updates = {names[n]: u for n, u in adapter.updates.items()}
    return replace(adapter, updates=updates, naming=naming), names, note


def _check_head(adapter: Adapter, base: Base | None) -> None:
    """mlx-lm has no lm_head module when the embedding is tied, and ignores its key in silence."""
    for module, u in adapter.low_rank.items():
        if kind_of_module(module) == "output head":
            if base is None:
                raise Refused(
                    adapter.weights,
                    "adapts the output head: whether the base ties it to the embedding"
                    " decides; give --base BASE",
                    tensor=u.a.name,
                )
            if base.tied is not False:
                raise Refused(
                    adapter.weights,
                    "adapts the output head, which this base ties to the embedding"
                    " (tie_word_embeddings): mlx-lm would ignore it; leave it out with --exclude lm_head",
                    tensor=u.a.name,
                )


def uniform(adapter: Adapter, *, widen: bool) -> Adapter:
    """The same update with one rank (the largest) and one scale for all modules.

    ``widen``: store b in float32 where folding its scale would round a 16-bit tensor.
    """
    updates = adapter.low_rank
    rank, scale = adapter.rank, common_scale(adapter)
    done: dict[str, Update] = dict(adapter.updates)
    for name, u in updates.items():
        factor = u.scale / scale if scale else 1.0
        b = u.b if factor == 1.0 else u.b.times(factor)
        bias = u.bias if factor == 1.0 or u.bias is None else u.bias.times(factor)
        if widen and not is_exact(factor, b.dtype):
            b = b.to("F32")
        if widen and bias is not None and not is_exact(factor, bias.dtype):
            bias = bias.to("F32")
        done[name] = replace(
            u,
            a=u.a.resized(rank, u.a.shape[1]),
            b=b.resized(b.shape[0], rank),
            bias=bias,
            scale=scale,
        )
    return replace(adapter, updates=done)


def common_scale(adapter: Adapter) -> float:
    """The scale to which the fewest modules' scales have a ratio that would round (`is_exact`)."""
    counts = Counter((u.scale, u.b.dtype) for u in adapter.low_rank.values())
    scales = Counter(u.scale for u in adapter.low_rank.values())
    candidates = [s for s in scales if s] or [0.0]

    def cost(scale: float) -> tuple[int, int, float]:
        inexact = sum(n for (s, d), n in counts.items() if scale and not is_exact(s / scale, d))
        return inexact, -scales[scale], -abs(scale)

    return min(candidates, key=cost)


def _cast(adapter: Adapter, dtype: str) -> dict[str, Update]:
    """The updates with every tensor in ``dtype``, but DoRA's magnitudes never narrowed.

    A magnitude carries the norm of the base's whole row; rounding it to 16 bits moves the weight
    by as much as a small update does. They are vectors, so keeping them costs nothing.
    """
    done: dict[str, Update] = {}
    for name, u in adapter.updates.items():
        if isinstance(u, Replacement):
            done[name] = replace(u, weight=u.weight.to(dtype))
            continue
        magnitude = u.magnitude
        if magnitude is not None and UNIT_ROUNDOFF[dtype] < UNIT_ROUNDOFF[magnitude.dtype]:
            magnitude = magnitude.to(dtype)
        bias = u.bias.to(dtype) if u.bias is not None else None
        done[name] = LowRank(u.a.to(dtype), u.b.to(dtype), u.scale, magnitude, bias)
    return done


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What of a config is new, in words."""
    odd = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    shown = "; ".join(f"{k} = {json.dumps(after.get(k))}" for k in odd)
    return f"as it was, but {shown}" if odd else "kept as it was"


def _account_fields(adapter: Adapter, account: Account) -> None:
    """What the numbers-changing fields of the source's config became."""
    scales = sorted({u.scale for u in adapter.low_rank.values()})
    if adapter.format == "peft" and scales:
        how = "alpha / sqrt(r)" if adapter.config.get("use_rslora") else "alpha / r"
        shown = ", ".join(f"{s:.6g}" for s in scales[:6])
        account.fields = {"source scale": f"{shown} ({how})"} | account.fields
