"""What is merged beside low-rank updates: replaced parameters, config, metadata, companions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraduct import origin
from loraduct.adapter import Adapter, BaseRef, Note, Replacement, Update
from loraduct.computed import given
from loraduct.errors import Refused
from loraduct.files import file_chunks
from loraduct.formats import peft_config
from loraduct.formats.base import Base
from loraduct.tensor import same
from loraduct.text import number, printable, several

if TYPE_CHECKING:
    from loraduct.converters.merge import Settings

KEY = "loraduct_merge"  # in a file's metadata: how it was made
# Fields of PEFT's config that say something of the base or of the task, not of the factors.
_KEPT = ("task_type", "auto_mapping", "fan_in_fan_out", "layers_pattern")
_EITHER = "leave one of the two out (loraduct convert --exclude)"
_LEAST = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None}


def replacements(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]], how: str
) -> dict[str, Update]:
    """The replaced parameters of all: kept where they are equal, else as ``how`` says.

    ``refuse``; ``first``: of the first adapter that has it; ``average``: sum w_i R_i / sum w_i over
    those that have it. One that only some adapters have, with a weight other than 1, differs too.
    """
    names = dict.fromkeys(n for a in adapters for n in a.replacements)
    done: dict[str, Update] = {}
    for name in names:
        held = [
            (a, a.replacements[name], w[name])
            for a, w in zip(adapters, weights, strict=True)
            if name in a.replacements and w[name] != 0.0
        ]
        if not held:
            continue
        first = held[0][1]
        equal = all(same(first.weight, r.weight) for _, r, _ in held[1:])
        alone = len(held) == 1 and held[0][2] == 1.0
        if (equal and (len(held) == len(adapters) or alone or how != "refuse")) or how == "first":
            done[name] = first
        elif how == "average":
            done[name] = _average(name, held)
        else:
            which = (
                "replaces this parameter otherwise than another adapter"
                if len(held) > 1 and not equal
                else f"replaces this parameter, others do not, and its weight is {number(held[0][2])}"
            )
            what = f"{which}: say what is to become of it, by --replacements average or first"
            raise Refused(held[-1][0].weights, what, tensor=name)
    return done


def check_apart(
    updates: Mapping[str, Update], saved: Sequence[str], file: Path, advice: str = _EITHER
) -> None:
    """Raise Refused for a module that is adapted and also replaced, itself or one around it.

    PEFT saves whole modules, gives nothing within them an adapter, and drops its factors without a
    word. Replaced biases of adapted modules are no such thing. ``saved``: the config's modules_to_save.
    """
    held = {n.rpartition(".")[0]: n for n, u in updates.items() if _is_whole(u)}
    for module in (m for m, u in updates.items() if not isinstance(u, Replacement)):
        parts = module.split(".")
        around = (".".join(parts[: i + 1]) for i in range(len(parts)))
        by = next((held[p] for p in around if p in held), None)
        by = by or next((s for s in saved if f".{s}." in f".{module}."), None)
        if by is not None:
            what = (
                f"is adapted, and replaced with its whole module ({printable(by)}): PEFT would drop the"
                f" factors without a word; {advice}"
            )
            raise Refused(file, what, tensor=module)


def _is_whole(update: Update) -> bool:
    return isinstance(update, Replacement) and update.origin != "bias"


def _average(name: str, held: Sequence[tuple[Adapter, Replacement, float]]) -> Replacement:
    import numpy as np

    total = sum(w for _, _, w in held)
    first = held[0][1]
    for adapter, r, _ in held:
        if r.weight.shape != first.weight.shape:
            what = f"has shape {list(r.weight.shape)}, another adapter {list(first.weight.shape)}"
            raise Refused(adapter.weights, what, tensor=name)
    if abs(total) < 1e-9:
        raise Refused(
            held[0][0].weights, "the weights add up to 0: there is no average", tensor=name
        )

    def make() -> Any:
        mixed = sum(w / total * r.weight.read().astype(np.float64) for _, r, w in held)
        return np.asarray(mixed, np.float32)

    tensors = [r.weight for _, r, _ in held]
    return Replacement(given(name, tensors, first.weight.shape, make), first.origin)


def result(
    adapters: Sequence[Adapter],
    weights: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    updates: Mapping[str, Update],
    settings: Settings,
    base: Base | None,
) -> Adapter:
    """The merged adapter: a config from which the writer makes its own, and how it was made.

    Raises Refused as `check_apart` does.
    """
    first = adapters[0]
    peft = [a for a in adapters if a.format == "peft"]
    config = {**_LEAST, **{k: peft[0].config[k] for k in _KEPT if peft and k in peft[0].config}}
    whole = [n.rpartition(".")[0] for n, u in updates.items() if _is_whole(u)]
    named = dict.fromkeys(m for a in peft for m in a.config.get("modules_to_save") or [])
    saved = [s for s in named if any(peft_config.saves([s], m) for m in whole)]
    check_apart(updates, saved, first.weights)
    biases = [str(a.config.get("bias") or "none") for a in peft]
    config |= {
        "target_modules": [],  # selects nothing: the writer finds out what does
        "base_model_name_or_path": first.base.name,
        "revision": first.base.revision,
        "modules_to_save": saved or None,
        "bias": "all" if "all" in biases else max(biases, default="none", key=len),
    }
    dora = any(u.magnitude is not None for u in updates.values() if hasattr(u, "magnitude"))
    texts = [
        {k: v for k, v in a.metadata.items() if k not in (origin.KEY, "format")} for a in adapters
    ]
    agreed = {k: v for k, v in texts[0].items() if all(t.get(k) == v for t in texts[1:])}
    companions, notes = _companions(adapters)
    odd = sorted({k for t in texts for k in t if k not in agreed})
    if odd:
        what = f"metadata that are not the same in all are left out: {several(odd, 8)}"
        notes.append(Note("merged", what))
    known = [a.base for a in adapters]
    return Adapter(
        path=first.path,
        weights=first.weights,
        format="peft",
        method="dora" if dora else "lora",
        updates=updates,
        config=config,
        base=BaseRef(
            first.base.name,
            first.base.revision,
            quantization_known=all(b.quantization_known and not b.quantization for b in known),
            kin=next((b.kin for b in known if b.kin), None),
            tied=next((b.tied for b in known if b.tied is not None), None),
        ),
        naming=first.naming,
        metadata=agreed | {KEY: record(labels, weights, settings)},
        companions=companions,
        notes=tuple(notes),
        layers=base.layers if base else layers_of(adapters),
        model_type=base.model_type if base else first.model_type,
        base_modules=base.linear_modules if base else frozenset(),
    )


def layers_of(adapters: Sequence[Adapter]) -> int | None:
    """The largest number that one of them tells."""
    return max((a.layers or 0 for a in adapters), default=0) or None


def _companions(adapters: Sequence[Adapter]) -> tuple[tuple[Path, ...], list[Note]]:
    """The files of all, each name once, and which of them differ. Cards tell of one adapter only."""
    found: dict[str, Path] = {}
    odd = []
    for path in (c for a in adapters for c in a.companions if c.name != "README.md"):
        first = found.setdefault(path.name, path)
        if first is not path and not _same_file(first, path):
            odd.append(f"{path} is not the {path.name} that is carried along ({first})")
    return tuple(found.values()), [Note("merged", text) for text in odd]


def _same_file(one: Path, two: Path) -> bool:
    if one.stat().st_size != two.stat().st_size:
        return False
    pieces = (file_chunks(p) for p in (one, two))
    return all(a == b for a, b in zip(*pieces, strict=True))


def record(
    labels: Sequence[str], weights: Sequence[Mapping[str, float]], settings: Settings
) -> str:
    """How it was merged, as JSON; a weight that isn't one for all modules is given as a range."""
    sources = []
    for label, weight in zip(labels, weights, strict=True):
        values = sorted(set(weight.values()))
        sources.append(
            {
                "name": printable(label),
                "weight": values[0] if len(values) == 1 else [values[0], values[-1]],
            }
        )
    fields = ("method", "rank", "energy", "density", "seed")
    told = {f: getattr(settings, f) for f in fields if getattr(settings, f) is not None}
    if "ties" in settings.method:
        told["sign"] = settings.sign
    return json.dumps({"sources": sources, **told}, separators=(",", ":"))
