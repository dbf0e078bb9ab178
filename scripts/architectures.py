"""Derive core/architectures.json again from the installed transformers and mlx-lm.

    python scripts/architectures.py [MODEL_TYPE ...] [--write]

Per model type: build a tiny transformers model in which every number of every parameter is unique,
save it (transformers 5 saves under the hub's names, which often aren't those in memory), run
mlx-lm's own ``sanitize`` on what was saved, and look where each number went. Nothing is concluded
from names or from reading code: a rule stands in the table because whole tensors match under it,
in every layer. Differences from the table are printed; ``--write`` puts them into it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from tagged import (
    LIMIT,
    Array,
    Source,
    Target,
    Tensors,
    indices,
    mlx_side,
    model_classes,
    pattern_of,
    transformers_side,
)
from tiny_configs import LEFT_OUT, TINY

TABLE = Path(__file__).resolve().parent.parent / "core" / "architectures.json"
Entry = dict[str, Any]
Rule = list[Any]  # [transformers, mlx-lm, how]

ABOUT = (
    "Module paths in transformers and in mlx-lm, per model type; {} is an index. equal: the set of"
    " those that are the same on both sides, in name and layout. rules: [transformers, mlx-lm, how],"
    " how being same, halves, interleaved, stack or rows; where several lead to one mlx-lm name, the"
    " first is what transformers 5 has in memory. blocked: what can't be carried, and why. router: a"
    " linear layer in mlx-lm, in transformers 5 a module that PEFT can't target as one."
    " turned: PEFT's factors of it are the other way round, as transformers does not tell it that the"
    " parameter is (in, out). zero experts: its last experts are without effect, and not in mlx-lm."
    " See scripts/architectures.py"
)
HEADS = "it is split by attention heads in mlx-lm, which no low-rank factor survives"
CONVOLUTION = "it is a convolution, for which mlx-lm has no low-rank layer"
TERNARY = "its weights are ternary in mlx-lm, which has no low-rank layer for them"
BARE = "it is a bare parameter in mlx-lm, not a linear layer"
TIED = "mlx-lm uses the embedding as the output head"
VISION = "mlx-lm has only the language part of the model"
ABSENT = "mlx-lm has no such module"
SCALED = "mlx-lm multiplies its weight by numbers of the base's config, and not the update"
VARIES = (
    "its counterpart in mlx-lm depends on the base's config (not the same with and without experts)"
)
OTHER = "mlx-lm arranges it in another way, which no rule describes"
REASONS = {"MultiLinear": HEADS, "BitLinear": TERNARY, "Conv1d": CONVOLUTION}


# -- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """That the tensors of an mlx-lm pattern come from those of a transformers pattern."""

    mlx: str
    how: str
    part: int = 0  # of halves or interleaved rows: which
    transposed: bool = False  # the transformers weight is (in, out)
    zeros: bool = False  # it has more experts than mlx-lm: the last ones are without effect


def fact_of_one(path: str, new: Array, name: str, old: Array) -> Fact | None:
    """How one mlx-lm weight comes from one transformers tensor."""
    for transposed in (False, True):
        rows = old.swapaxes(-1, -2) if transposed else old
        if indices(name) == indices(path):
            if np.array_equal(rows, new):
                return Fact(pattern_of(path), "same", 0, transposed)
            half = rows.shape[-2] // 2
            for part in (0, 1):
                if np.array_equal(rows[..., part * half : (part + 1) * half, :], new):
                    return Fact(pattern_of(path), "halves", part, transposed)
                if np.array_equal(rows[..., part::2, :], new):
                    return Fact(pattern_of(path), "interleaved", part, transposed)
        elif indices(name) == indices(path)[:-1]:
            own = new.swapaxes(-1, -2) if transposed else new
            if np.array_equal(old[indices(path)[-1] * len(own) :][: len(own)], own):
                return Fact(pattern_of(path), "rows", 0, transposed)
    if old.ndim == new.ndim == 3 and len(old) > len(new):
        fact = fact_of_one(path, new, name, old[: len(new)])
        return replace(fact, zeros=True) if fact else None
    return None


def fact_of_many(path: str, new: Array, names: list[str], old: Tensors) -> Fact | None:
    """How one mlx-lm weight comes from several transformers tensors: one per expert, in order."""
    in_order = sorted(names, key=lambda n: indices(n)[-1:])
    one_module = all(indices(n)[:-1] == indices(path) for n in names)
    if not one_module or len({pattern_of(n) for n in names}) != 1 or len(new) != len(names):
        return None
    if all(np.array_equal(new[e], old[n]) for e, n in enumerate(in_order)):
        return Fact(pattern_of(path), "stack")
    return None


def facts(old: Tensors, target: Target) -> dict[str, set[Fact | str]]:
    """Per transformers pattern: what is found, or the reason why it is of no use."""
    names = list(old)
    owner = np.full(LIMIT, -1, np.int32)
    for i, tags in enumerate(old.values()):
        owner[tags.ravel()] = i
    found: dict[str, set[Fact | str]] = defaultdict(set)
    for path, new in target.weights.items():
        sources = [names[i] for i in np.unique(owner[np.clip(new, 0, LIMIT - 1)]) if i >= 0]
        fact: Fact | str | None
        if path not in target.adaptable:
            fact = REASONS.get(target.kinds.get(path, ""), BARE)
        elif len(sources) == 1:
            fact = fact_of_one(path, new, sources[0], old[sources[0]])
        else:
            fact = fact_of_many(path, new, sources, old)
        if not fact and (scaled := [name for name in names if is_multiple(new, old[name])]):
            sources, fact = scaled, SCALED  # what its numbers belong to by chance doesn't count
        for name in sources:
            found[pattern_of(name)].add(fact or OTHER)
    return found


def is_multiple(new: Array, old: Array) -> bool:
    """Whether each row is the other's, times a number: mlx-lm folds a multiplier into a weight."""
    if new.shape != old.shape:
        return False
    return np.array_equal(new * old[..., :1], old * new[..., :1])


def rule_of(pattern: str, found: set[Fact | str]) -> Rule | str:
    """The one rule that all that was found amounts to, or the reason why there is none."""
    reasons = [f for f in found if isinstance(f, str)]
    if reasons:
        return reasons[0]
    parts = sorted((f for f in found if isinstance(f, Fact)), key=lambda f: f.part)
    how = parts[0].how
    names = [f.mlx for f in parts]
    if len({f.how for f in parts}) > 1 or [f.part for f in parts] != list(range(len(parts))):
        return OTHER
    zeros = ["zero experts"] if any(f.zeros for f in parts) else []
    if how in ("halves", "interleaved"):
        return [pattern, names, how, *zeros] if len(parts) == 2 else OTHER
    transposed = ["transposed"] if how == "rows" and parts[0].transposed else []
    return [pattern, names[0], how, *transposed, *zeros]


def transposed(found: set[Fact | str]) -> bool:
    """Whether the transformers weight is (in, out)."""
    return any(isinstance(f, Fact) and f.transposed for f in found)


def untold(pattern: str, source: Source) -> bool:
    """Whether PEFT does not know of a parameter of experts that it is (in, out)."""
    return ".experts." in pattern and pattern not in source.told


def absent(path: str) -> str:
    """Why a module of transformers has nothing to correspond to."""
    if re.search(r"visi|visual|projector|image", path):
        return VISION
    return TIED if path == "lm_head" else ABSENT


def derive(model_type: str) -> Entry:
    """The table's entry of one model type (its first word), ``equal`` being the list itself."""
    import transformers

    tiny = TINY[model_type]
    marks: Entry = {}
    found: dict[str, Rule | str] = {}
    for variant in ({}, *tiny.also):
        config = transformers.AutoConfig.for_model(model_type.split()[0], **tiny.config(variant))
        for model_class in model_classes(config):
            source = transformers_side(model_class, config, tiny)
            for pattern, rule in _rules(source, mlx_side(source, tiny), marks):
                found[pattern] = merged(found.get(pattern, rule), rule)
    back: dict[str, str] = {}  # where mlx-lm's name leads to: the first that led there
    for pattern, rule in found.items():
        if isinstance(rule, list):
            back.setdefault(str(rule[1]), pattern)
    plain = marks.pop("plain")
    equal = {p for p in plain if found[p] == [p, p, "same"] and back[p] == p}
    entry = {
        "equal": sorted(equal),
        "rules": [r for p, r in found.items() if isinstance(r, list) and p not in equal],
        "blocked": {p: why for p, why in sorted(found.items()) if isinstance(why, str)},
    }
    return {key: value for key, value in (entry | marks).items() if value}


def merged(known: Rule | str, rule: Rule | str) -> Rule | str:
    """What two variants of a model type say of one pattern, together."""
    if isinstance(rule, str) or known in (rule, VARIES):
        return known
    return rule if isinstance(known, str) else VARIES


def _rules(source: Source, target: Target, marks: Entry) -> Iterator[tuple[str, Rule | str]]:
    """Each pattern with its rule, or with why it has none: names in memory first, then in files.

    ``marks`` takes what the rules don't say: ``router``, ``conv1d``, ``experts_transposed``, and
    the ``plain`` patterns, of which there is a module (not only a parameter or a name in files).
    """
    live = facts(source.live, target)
    kinds = {pattern_of(path): kind for path, kind in source.kinds.items()}
    for pattern, kind in kinds.items():
        live.setdefault(pattern, {absent(pattern)})
        if kind == "convolution" and live[pattern] != {VISION}:
            live[pattern] = {CONVOLUTION}
    plain = marks.setdefault("plain", set())
    for pattern, found in sorted(live.items()):
        rule, kind = rule_of(pattern, found), kinds[pattern]
        if isinstance(rule, str):
            if kind != "parameter" or ".experts." in pattern:
                yield pattern, rule
            continue
        if transposed(found) and rule[2] != "rows":
            if untold(pattern, source):
                yield pattern, [*rule, "turned"]
                continue
            marks["conv1d" if kind == "conv1d" else "experts_transposed"] = True
        if kind == "bare":
            marks.setdefault("router", pattern)
        if kind != "parameter":
            plain.add(pattern)
        yield pattern, rule
    saved = {
        name.removesuffix(".weight"): value.astype(np.int64)
        for name, value in source.saved.items()
        if value.ndim in (2, 3) and not name.endswith("bias")
    }
    for pattern, found in sorted(facts(saved, target).items()):
        rule = rule_of(pattern, found)
        if pattern not in live and isinstance(rule, list):
            turned = transposed(found) and rule[2] != "rows" and untold(pattern, source)
            yield pattern, [*rule, "turned"] if turned else rule


# -- the table ------------------------------------------------------------------------------------


def read_table() -> dict[str, Entry]:
    """The entries of core/architectures.json, ``equal`` being the list itself."""
    raw = json.loads(TABLE.read_bytes())
    return {
        model_type: entry | {"equal": raw["sets"][entry["equal"]]} if "equal" in entry else entry
        for model_type, entry in raw["models"].items()
    }


def write_table(entries: dict[str, Entry]) -> None:
    """Write core/architectures.json: a line per set and per model, equal sets shared."""
    kept = json.loads(TABLE.read_bytes())["sets"]  # a set keeps its name while a model still has it
    names = {
        tuple(entries[name]["equal"]): name for name in kept if entries.get(name, {}).get("equal")
    }
    models: dict[str, Entry] = {}
    for model_type, entry in sorted(entries.items()):
        equal = tuple(entry.get("equal", ()))
        named = {"equal": names.setdefault(equal, model_type)} if equal else {}
        models[model_type] = named | {k: v for k, v in entry.items() if k != "equal"}
    sets = {name: list(equal) for equal, name in sorted(names.items(), key=lambda item: item[1])}
    parts = [f'"about": {json.dumps(ABOUT)}']
    for title, lines in (("sets", sets), ("models", models)):
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in lines.items())
        parts.append(f'"{title}": {{\n{body}\n }}')
    TABLE.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


def differences(old: Entry, new: Entry) -> list[str]:
    """One line for each thing that only one of two entries has, with - (old) or + (new)."""

    def lines(entry: Entry) -> list[str]:
        found = []
        for key, value in entry.items():
            if isinstance(value, dict):
                found += [f"{key}: {json.dumps(item)}" for item in value.items()]
            elif isinstance(value, list):
                found += [f"{key}: {json.dumps(item)}" for item in value]
            else:
                found.append(f"{key}: {json.dumps(value)}")
        return found

    before, after = lines(old), lines(new)
    gone = [f"- {line}" for line in before if line not in after]
    added = [f"+ {line}" for line in after if line not in before]
    order = [] if gone or added or before == after else ["~ the order differs"]
    return gone + added + order


def main() -> int:
    """Derive the given model types (all, if none) and compare; 1 if anything differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_type", nargs="*", help="default: all")
    parser.add_argument("--write", action="store_true", help="put what differs into the table")
    options = parser.parse_args()
    table = read_table()
    failed = differing = 0
    for model_type in options.model_type or sorted(TINY):
        try:
            entry = derive(model_type)
        except Exception as error:  # the libraries raise anything; the other types still count
            print(f"{model_type}: failed: {type(error).__name__}: {error}")
            failed += 1
            continue
        if lines := differences(table.get(model_type, {}), entry):
            print(f"{model_type}:", *lines, sep="\n  ")
            differing += 1
            table[model_type] = entry
    if not options.model_type:
        for model_type in sorted(table.keys() - TINY.keys()):
            print(f"{model_type}: in the table, but not in tiny_configs.py")
            del table[model_type]
            differing += 1
    print(f"{differing} differ from the table, {failed} failed; left out: {', '.join(LEFT_OUT)}")
    if options.write:
        write_table(table)
    return int(bool(failed or (differing and not options.write)))


if __name__ == "__main__":
    sys.exit(main())
