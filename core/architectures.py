"""Module names: transformers <-> mlx-lm, and what kind of matrix a name stands for.

``architectures.json`` lists, for every architecture verified by running both libraries, the
module paths whose name and layout are equal on both sides (``equal``) and those that differ
(``other``, with what differs). A module in neither list is refused, never guessed.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.text import printable, several

_DIFFERENCE = {
    "experts": "its experts are laid out differently",
    "rename": "its name differs",
    "transpose": "its name differs",
    "head_split": "it is split by attention heads, which no low-rank factor survives",
    "split_other": "it is split into parts",
}

_ROUTER = (
    "is the router {}, which transformers 5 keeps as a parameter and PEFT can't target as a linear"
    " layer; leave it out with --exclude"
)
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
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")
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
    leaf = parts[-1]
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


def pattern_of(module: str) -> str:
    """The path with every index replaced by ``{}``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", module)


def block_of(module: str) -> tuple[str, int, str] | None:
    """(path of the list of blocks, index of the block, path within it), or None outside blocks."""
    match = re.match(r"(.+?)\.(\d{1,6})\.(.+)$", module)
    return (match[1], int(match[2]), match[3]) if match else None


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """model_type -> {"equal": frozenset of patterns, "other": {pattern: difference}}."""
    raw = json.loads(Path(__file__).with_name("architectures.json").read_bytes())
    sets = {name: frozenset(patterns) for name, patterns in raw["sets"].items()}
    return {
        model_type: {
            "equal": sets.get(entry.get("equal"), frozenset()),
            "other": entry.get("other", {}),
            "router": entry.get("router"),
        }
        for model_type, entry in raw["models"].items()
    }


def siblings(modules: Iterable[str]) -> set[str]:
    """What else lies in the same blocks, in any architecture that has all of ``modules``."""
    modules = list(modules)
    patterns = {pattern_of(m) for m in modules}
    blocks = {b[:2] for m in modules if (b := block_of(m))}
    found: set[str] = set()
    for entry in table().values():
        everything = entry["equal"] | entry["other"].keys()
        if patterns <= everything:
            found |= everything
    return {
        f"{path}.{i}.{p.split('.{}.', 1)[1]}"
        for path, i in blocks
        for p in found
        if p.startswith(f"{path}.{{}}.")
    }


Renamer = Callable[[str], str]


def renamer(
    modules: Iterable[str],
    model_type: str | None,
    file: Path,
    name_map: Mapping[str, str] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Renamer, str | None]:
    """How to rename ``modules`` from transformers' names to mlx-lm's (``reverse``: back).

    Returns the function and a note for the user, or None. ``name_map`` (patterns with ``{}``,
    transformers -> mlx-lm) overrides the table. Raises Refused naming the first module that has
    no verified counterpart.
    """
    modules = list(modules)
    if name_map is not None:
        return _mapped(modules, name_map, file, reverse), None
    patterns = {pattern_of(m): m for m in modules}
    known = table()
    if model_type is not None:
        if model_type not in known:
            raise Refused(
                file,
                f"architecture {model_type!r} has no verified names between transformers and"
                " mlx-lm; give the names with --name-map FILE",
            )
        for pattern, module in patterns.items():
            if pattern not in known[model_type]["equal"]:
                raise Refused(file, _difference(pattern, [model_type]), tensor=module)
            if reverse and pattern == known[model_type]["router"]:
                raise Refused(file, _ROUTER.format(f"of {model_type}"), tensor=module)
        return _same, None
    if any(all(p in entry["equal"] for p in patterns) for entry in known.values()):
        for module in modules if reverse else ():
            if any(pattern_of(module) == e["router"] for e in known.values()):
                what = "of this architecture (or of one that --base BASE rules out)"
                raise Refused(file, _ROUTER.format(what), tensor=module)
        others = [m for m, e in known.items() if all(p in e["other"] for p in patterns)]
        if not others or not patterns:
            return _same, None
        return _same, (
            "the base's architecture is not known, so module names are taken as equal (they differ in"
            f" {several(others)}); --base BASE makes sure"
        )
    for pattern, module in patterns.items():
        if not any(pattern in entry["equal"] for entry in known.values()):
            differing = [m for m, e in known.items() if pattern in e["other"]]
            raise Refused(file, _difference(pattern, differing), tensor=module)
    raise Refused(
        file, "no verified architecture has all of its modules; give --base BASE or --name-map FILE"
    )


def _same(module: str) -> str:
    return module


def _difference(pattern: str, model_types: list[str]) -> str:
    if not model_types:
        return (
            "this module is in no verified architecture; check the name, or give its"
            " counterpart with --name-map FILE"
        )
    kind = table()[model_types[0]]["other"].get(pattern)
    what = _DIFFERENCE.get(kind or "", "it is not among the architecture's verified modules")
    return (
        f"can't be carried between transformers and mlx-lm for {several(model_types)}: {what};"
        " give its counterpart with --name-map FILE, or leave it out with --exclude"
    )


def _twice(name_map: Mapping[str, str]) -> list[str]:
    return sorted(n for n, count in Counter(name_map.values()).items() if count > 1)


def _mapped(modules: list[str], name_map: Mapping[str, str], file: Path, reverse: bool) -> Renamer:
    """A renamer from a table of patterns; every module must be hit, and no two may meet."""
    pairs = {v: k for k, v in name_map.items()} if reverse else dict(name_map)
    if len(pairs) != len(name_map):
        raise Refused(
            file, f"the name map sends two modules to the same name: {several(_twice(name_map))}"
        )
    renamed: dict[str, str] = {}
    hit = set()
    for module in modules:
        pattern = module if module in pairs else pattern_of(module)
        if pattern not in pairs:
            raise Refused(file, "the name map has no entry for it", tensor=module)
        hit.add(pattern)
        indices = re.findall(r"(?<=\.)\d+(?=\.|$)", module)
        target = pairs[pattern]
        if "{}" in pattern and target.count("{}") != len(indices):
            raise Refused(
                file, f"the name map sends {pattern} to {target}: the number of {{}} differs"
            )
        for index in indices if "{}" in pattern else ():
            target = target.replace("{}", index, 1)
        renamed[module] = target
    unused = [p for p in pairs if p not in hit]
    if unused:
        raise Refused(file, f"the name map's entry {several(unused)} matches no module")
    back: dict[str, str] = {}
    for module, target in renamed.items():
        if target in back:
            raise Refused(
                file,
                f"the name map sends it and {printable(back[target])} to the same name, {target}",
                tensor=module,
            )
        back[target] = module
    return renamed.__getitem__
