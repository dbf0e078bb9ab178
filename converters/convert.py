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
from pathlib import Path
from typing import Any

from loraduct import origin
from loraduct.account import Account
from loraduct.adapter import Adapter, LowRank, Replacement, Update
from loraduct.converters import names, tied
from loraduct.converters.approximate import EXACT, Wanted, approximate
from loraduct.converters.start import can_stay, undo
from loraduct.errors import Refused
from loraduct.formats import mlx_writer, packed, peft_writer
from loraduct.formats.base import Base, differences, uncompared
from loraduct.formats.experts import wrong_experts
from loraduct.formats.folder import METADATA, Folder, model_card
from loraduct.formats.peft_keys import PREFIX
from loraduct.formats.safetensors_file import ordered
from loraduct.modules import kind_of_module
from loraduct.tensor import UNIT_ROUNDOFF, Tensor, is_exact
from loraduct.text import printable, several

NAMING = {"peft": "hf", "mlx": "mlx"}
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Options:
    """What a conversion may be told. ``include``/``exclude``: regexes on module names.

    ``wanted``: how near updates of full rank are to be approximated, where that is allowed.
    ``untied_base``: write for a copy of the base, there, whose head has a weight of its own.
    """

    to: str
    base: Base | None = None
    dtype: str = "keep"
    uniform: bool = False
    name_map: Mapping[str, str] | None = None
    name_map_file: Path | None = None
    include: str | None = None
    exclude: str | None = None
    wanted: Wanted = EXACT
    initial: Adapter | None = None
    always_on: bool = False
    untied_base: Path | None = None


def convert(adapter: Adapter, options: Options) -> Folder:
    """The folder that carries ``adapter`` in the target's format.

    Reads no values yet, but of updates that it approximates.

    Raises Refused naming what the target can't hold.
    """
    base = options.base
    if base is not None:
        for problem in differences(adapter, base):
            raise problem
        adapter = replace(
            adapter,
            layers=base.layers or adapter.layers,
            base_modules=base.linear_modules,
            model_type=base.model_type,
        )
    if options.to == "mlx" or options.uniform or options.initial or not can_stay(adapter):
        adapter = undo(adapter, options.initial, base)
    if options.always_on:
        config = {**adapter.config, "alora_invocation_tokens": None}
        adapter = replace(adapter, config=config, origin=None)
    kept, residuals = approximate(adapter, _select(adapter, options), options.wanted)
    dropped = [t for name, u in adapter.updates.items() if name not in kept for t in u.tensors]
    selected = replace(adapter, updates=kept)
    if dropped:  # a config that still selects what was left out would describe another adapter
        narrow = {"peft": peft_writer.narrowed, "mlx": mlx_writer.narrowed}.get(adapter.format)
        gone = {n: u for n, u in adapter.updates.items() if n not in selected.updates}
        selected = narrow(selected, gone) if narrow else replace(selected, origin=None)
    settled = tied.Settled(selected)
    if options.to == "mlx" and selected.naming == "hf":
        settled = tied.settle(
            selected, base, allowed=options.wanted.allowed, untied=options.untied_base is not None
        )
    named, joined, note = _rename(settled.adapter, options)
    if base is not None:
        problems = wrong_experts(named if options.to == "mlx" else settled.adapter, base)
        problems += packed.unfit(named, base) if options.to == "mlx" else []
        for problem in problems:
            raise problem
    if options.to != "mlx" and adapter.naming == "mlx":
        named = peft_writer.reachable(untie(named, base))
    plain = named.updates
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
    account.residuals = residuals
    account.drop(dropped)
    copies = _copies(adapter, named, base, options.to, account)
    tensors = ordered({**tensors, **{t.name: t for t in copies}}) if copies else tensors
    account.set_aside(settled.copies)
    account.sides = settled.sides
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
    if options.to == "mlx" and base is None:
        account.notes += [n.text for n in packed.hints(adapter)]
    _account_fields(adapter, account)
    texts = {k: v for k, v in adapter.metadata.items() if k not in ("format", origin.KEY)}
    kin = base.kin if base is not None and base.has_weights else None
    if options.untied_base is not None:  # as mlx-lm writes it: what was given
        config = {**config, "model": str(options.untied_base)}
    record = origin.record(selected, plain, named.updates, joined, kin, _ties(named, options))
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


def _rename(adapter: Adapter, options: Options) -> tuple[Adapter, dict[str, int], str | None]:
    """The adapter with the target's module names, what was joined, and a note (`names.rename`)."""
    return names.for_base(
        adapter, NAMING[options.to], options.base, options.name_map_file, options.name_map
    )


def _ties(written: Adapter, options: Options) -> bool | None:
    """Whether an MLX adapter is meant for a tied base; None where its meaning doesn't hang on it."""
    kinds = {kind_of_module(m) for m in written.low_rank}
    if options.to != "mlx" or not kinds & {"embedding", "output head"}:
        return None
    if options.untied_base is not None:
        return False
    return written.base.tied if options.base is None else options.base.tied


def untie(adapter: Adapter, base: Base | None) -> Adapter:
    """mlx-lm's LoRA on a tied embedding, for PEFT: on the embedding and, transposed, on the head.

    dW of the embedding is (tokens, dim) = scale * (b @ a).T, and the head's weight is the same
    matrix: its factors are a' = b.T and b' = a.T.
    """
    done = dict(adapter.updates)
    for module, u in adapter.low_rank.items():
        if u.layout != "embedding" or kind_of_module(module) != "embedding":
            continue
        if base is None or base.tied is None:
            what = "adapts the embedding: whether the base ties it decides; give --base BASE"
            raise Refused(adapter.weights, what, tensor=u.a.name)
        if base.tied:
            done["lm_head"] = replace(u, a=u.b.T, b=u.a.T, layout="linear")
    return replace(adapter, updates=done)


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
        done[name] = replace(u, b=b, bias=bias, scale=scale).with_rank(rank)
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
        assert isinstance(u, LowRank)  # dense ones are approximated by now
        magnitude = u.magnitude
        if magnitude is not None and UNIT_ROUNDOFF[dtype] < UNIT_ROUNDOFF[magnitude.dtype]:
            magnitude = magnitude.to(dtype)
        bias = u.bias.to(dtype) if u.bias is not None else None
        done[name] = replace(u, a=u.a.to(dtype), b=u.b.to(dtype), magnitude=magnitude, bias=bias)
    return done


def _copies(
    adapter: Adapter, made: Adapter, base: Base | None, to: str, account: Account
) -> list[Tensor]:
    """Copies of the base's own weights: left out, but kept for PEFT where none was compared.

    PEFT loads them over the base's, so that one that differs is part of what the adapter does.
    """
    unsure = uncompared(adapter, base)
    kept = [t for t in unsure if to == "peft" and _of_module(t) in made.low_rank]
    for tensor in kept:
        account.carry(tensor.name, tensor)
    account.set_aside(t for t in adapter.set_aside if t not in kept)
    if unsure and to == "mlx":
        account.notes.append(
            f"{several([t.name for t in unsure])}: taken for a copy of the base's own weight and left"
            " out; a --base with weights would be compared with it"
        )
    return kept


def _of_module(copy: Tensor) -> str:
    return copy.name.removeprefix(PREFIX).removesuffix(".base_layer.weight")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What of a config is new, in words."""
    odd = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    shown = "; ".join(f"{k} = {json.dumps(after.get(k))}" for k in odd)
    return f"as it was, but {shown}" if odd else "kept as it was"


def _account_fields(adapter: Adapter, account: Account) -> None:
    """What the numbers-changing fields of the source's config became."""
    scales = sorted({u.scale for u in adapter.low_rank.values()})
    if adapter.technique:
        account.fields = {"source method": adapter.technique} | account.fields
    elif adapter.format == "peft" and scales:
        how = "alpha / sqrt(r)" if adapter.config.get("use_rslora") else "alpha / r"
        shown = ", ".join(f"{s:.6g}" for s in scales[:6])
        account.fields = {"source scale": f"{shown} ({how})"} | account.fields
    if adapter.base.quantization:
        account.fields["trained on"] = (
            f"a base quantised as {adapter.base.quantization}: on other weights the adapted model"
            " differs by what that changed"
        )
