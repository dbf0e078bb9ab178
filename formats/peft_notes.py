"""What surprises people in a PEFT folder without making it wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraduct.adapter import LowRank, Note, Update
from loraduct.formats import CONFIG, peft_config
from loraduct.modules import block_of
from loraduct.text import ranges, several


def notes_on(
    config: Mapping[str, Any], updates: Mapping[str, Update], unknown: list[str], file: Path
) -> list[Note]:
    """Traps that don't make the adapter wrong but surprise people."""
    notes = []
    modules = [m for m, u in updates.items() if isinstance(u, LowRank)]
    if peft_config.moves_base(config):
        notes.append(
            Note(
                "moved-base",
                f"{peft_config.began(config)}: training moved the base weight, and the factors are"
                " relative to that",
            )
        )
    for field in peft_config.PEFT_ONLY:
        if config.get(field) is not None:
            notes.append(Note("peft-only", f"{field} is set: {peft_config.PEFT_ONLY[field]}"))
    # what PEFT does with a module that it targets and finds no tensors for
    missing = (
        "PEFT only warns, and gives it RANDOM factors, because init_lora_weights is false"
        if config.get("init_lora_weights") is False
        else "PEFT only warns, and it has no effect"
    )
    saved = [n.rpartition(".")[0] for n, u in updates.items() if not isinstance(u, LowRank)]
    unsaved = [
        s
        for s in config.get("modules_to_save") or []
        if not any(peft_config.saves([s], m) for m in saved)
    ]
    if unsaved:
        notes.append(
            Note(
                "unsaved-module",
                f"modules_to_save names {several(unsaved)} but the file has no tensors for it: PEFT"
                " can't load the folder where the base has such a module",
            )
        )
    if unknown:
        notes.append(
            Note(
                "unknown-field",
                f"{CONFIG}: unknown field {several(unknown)}: PEFT ignores it, and so does loraduct",
            )
        )
    if unused := peft_config.unused_patterns(config, modules, file):
        notes.append(
            Note(
                "unused-pattern",
                f"{several(unused)} matches no module and has no effect (a key is a full name or"
                " the end of one, without base_model.model.)",
            )
        )
    targets = config.get("target_modules")
    if isinstance(targets, list) and config.get("layers_to_transform") in (None, []):
        absent = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in modules)]
        if absent and modules:
            notes.append(
                Note(
                    "target-without-tensors",
                    f"target_modules names {several(absent)} but the file has no tensors for it:"
                    f" {missing}",
                )
            )
        gaps = _gaps(modules)
        if gaps:
            notes.append(
                Note(
                    "missing-modules",
                    f"layers without {several(gaps)}: where the base has it, {missing}",
                )
            )
    if (
        config.get("rank_pattern")
        and not config.get("alpha_pattern")
        and any(isinstance(u, LowRank) and u.rank != config["r"] for u in updates.values())
    ):
        notes.append(
            Note(
                "scale-moved-by-rank",
                "rank_pattern without alpha_pattern also changes the scale: alpha stays, the rank it is"
                " divided by does not",
            )
        )
    return notes


def _gaps(modules: list[str]) -> list[str]:
    """Kinds of module that some layers have and others lack."""
    layers: dict[str, set[int]] = {}
    for module in modules:
        if block := block_of(module):
            layers.setdefault(f"{block[0]}.*.{block[2]}", set()).add(block[1])
    everywhere = set().union(*layers.values()) if layers else set()
    return [
        f"{name} ({ranges(everywhere - found)})"
        for name, found in layers.items()
        if found != everywhere
    ]
