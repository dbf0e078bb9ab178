"""Module names: transformers <-> mlx-lm.

``architectures.json`` lists, for every architecture verified by running both libraries, the
module paths whose name and layout are equal on both sides, and rules for those that differ
(scripts/architectures.py derives it). A module in neither list is refused, never guessed.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.modules import block_of, pattern_of
from loraduct.text import printable, several


@dataclass(frozen=True)
class Rule:
    """How a module of transformers (``hf``) and modules of mlx-lm (``mlx``) hold one another.

    ``how``: ``same`` (only the name differs), ``halves`` (the first half of the output rows is
    mlx[0], the second mlx[1]), ``interleaved`` (even rows, odd rows), ``stack`` (hf has one module
    an expert, its last index), ``rows`` (mlx has one module an expert). ``router``: a bare
    parameter in transformers 5, where mlx-lm has a linear layer. ``turned``: PEFT's factors belong to
    the transposed weight, as transformers does not tell it that the parameter is (in, out).
    ``zeros``: transformers has more experts than mlx-lm, the last of which have no effect.
    """

    hf: str
    mlx: tuple[str, ...]
    how: str = "same"
    router: bool = False
    turned: bool = False
    zeros: bool = False


@dataclass(frozen=True)
class Architecture:
    """What is known of one model_type: rules by pattern from either side, and what is blocked.

    Of a type whose names in mlx-lm depend on whether there are experts, the model without them is an
    entry of its own (`without_experts`).
    """

    equal: frozenset[str]
    by_hf: Mapping[str, Rule]
    by_mlx: Mapping[str, Rule]
    blocked: Mapping[str, str]

    def by_mlx_within(self, blocks: str) -> Mapping[str, Rule]:
        """by_mlx, but of several transformers' names the one within these blocks, if there is one.

        Models that are loaded with or without their vision part have two names for one layer.
        """
        there = [r for r in self.by_hf.values() if r.hf.startswith(f"{blocks}.")]
        # backwards: the first one listed is transformers' live name
        return {**self.by_mlx, **{m: r for r in there[::-1] if r.how != "stack" for m in r.mlx}}

    @functools.cached_property
    def renamed_in_files(self) -> frozenset[str]:
        """Patterns equal on both sides that transformers has by another name in its files."""
        others = (r for r in self.by_hf.values() if r.hf not in self.equal)
        return frozenset(name for r in others for name in r.mlx) & self.equal

    def rules(self, reverse: bool) -> Mapping[str, Rule]:
        """By transformers' patterns; ``reverse``: by mlx-lm's."""
        return self.by_mlx if reverse else self.by_hf


@functools.cache
def table() -> dict[str, Architecture]:
    """model_type -> Architecture."""
    raw = json.loads(Path(__file__).with_name("architectures.json").read_bytes())
    return {name: _architecture(entry, raw["sets"]) for name, entry in raw["models"].items()}


def _architecture(entry: Mapping[str, Any], sets: Mapping[str, list[str]]) -> Architecture:
    equal = frozenset(sets.get(entry.get("equal", ""), ()))
    router = entry.get("router")
    rules = [Rule(p, (p,), "same", p == router) for p in sorted(equal)]
    for hf, mlx, how, *marks in entry.get("rules", []):
        names = (mlx,) if isinstance(mlx, str) else tuple(mlx)
        marked = ("turned" in marks, "zero experts" in marks)
        rules.append(Rule(hf, names, how, hf == router, *marked))
    by_mlx: dict[str, Rule] = {}
    for rule in rules:
        for name in rule.mlx if rule.how != "stack" else ():
            by_mlx.setdefault(name, rule)  # the first one listed is transformers' live name
    return Architecture(equal, {r.hf: r for r in rules}, by_mlx, entry.get("blocked", {}))


def without_experts(model_type: str) -> str | None:
    """The entry of this type's models without experts; None where it is the type's own."""
    name = f"{model_type} without experts"
    return name if name in table() else None


def siblings(modules: Iterable[str]) -> set[str]:
    """What else lies in the same blocks, in any architecture that has all of ``modules``."""
    modules = list(modules)
    patterns = {pattern_of(m) for m in modules}
    blocks = {b[:2] for m in modules if (b := block_of(m))}
    found: set[str] = set()
    for entry in table().values():
        everything = entry.by_hf.keys() | entry.by_mlx.keys() | entry.blocked.keys()
        if patterns <= everything:
            found |= everything
    return {
        f"{path}.{i}.{p.split('.{}.', 1)[1]}"
        for path, i in blocks
        for p in found
        if p.startswith(f"{path}.{{}}.")
    }


def rules_for(
    modules: Iterable[str],
    model_type: str | None,
    file: Path,
    *,
    reverse: bool = False,
    blocks: str | None = None,
) -> tuple[dict[str, Rule], str | None]:
    """The rule of each module's pattern, transformers -> mlx-lm (``reverse``: back), and a note.

    ``blocks``: on the way back, where the layers were before (see `by_mlx_within`).

    Raises Refused naming the first module that has no verified counterpart. Without a model_type,
    all architectures that have all the modules must agree.
    """
    patterns = {pattern_of(m): m for m in modules}
    known = table()
    if model_type is not None:
        if model_type not in known:
            raise Refused(
                file,
                f"architecture {printable(model_type, 60)!r} has no verified names between"
                " transformers and mlx-lm; give the names with --name-map FILE",
            )
        rules = known[model_type].rules(reverse)
        if reverse and blocks:
            rules = known[model_type].by_mlx_within(blocks)
        for pattern, module in patterns.items():
            if pattern not in rules:
                raise Refused(file, _missing(pattern, [model_type]), tensor=module)
        return {p: rules[p] for p in patterns}, None
    fitting = [
        m
        for m, e in known.items()
        if patterns.keys() <= e.rules(reverse).keys()
        and not any(e.rules(reverse)[p].zeros for p in patterns)  # how many tells the base alone
    ]
    for pattern, module in patterns.items():
        if not any(pattern in e.rules(reverse) for e in known.values()):
            differing = [m for m, e in known.items() if pattern in e.blocked]
            raise Refused(file, _missing(pattern, differing), tensor=module)
    if not fitting:
        raise Refused(
            file,
            "no verified architecture has all of its modules; give --base BASE or --name-map FILE",
        )
    equal = [m for m in fitting if patterns.keys() <= known[m].equal]
    if equal:  # by far the most common: taken as such, and said where others differ
        chosen = known[equal[0]].rules(reverse)
        differ = [m for m in fitting if m not in equal]
        for variant in [m for m in differ if m in map(without_experts, equal)]:
            odd = next(p for p in patterns if known[variant].rules(reverse)[p] != chosen[p])
            what = f"is another module of mlx-lm in a {variant}; give --base BASE"
            raise Refused(file, what, tensor=patterns[odd])
        note = (
            "the base's architecture is not known, so module names are taken as equal (they differ"
            f" in {several(differ)}); --base BASE makes sure"
        )
        routers = [p for m in equal for p in patterns if known[m].rules(reverse)[p].router]
        for pattern in routers[:1] if reverse else ():
            what = (
                "is a router in some architectures, and a linear layer in others; give --base BASE"
            )
            raise Refused(file, what, tensor=patterns[pattern])
        return {p: chosen[p] for p in patterns}, note if differ else None
    chosen = known[fitting[0]].rules(reverse)
    for pattern, module in patterns.items():
        others = {known[m].rules(reverse)[pattern] for m in fitting} - {chosen[pattern]}
        if others:
            raise Refused(
                file,
                f"architectures that have this module ({several(fitting)}) differ in what it is on"
                " the other side; give --base BASE",
                tensor=module,
            )
    return {p: chosen[p] for p in patterns}, None


def _missing(pattern: str, model_types: list[str]) -> str:
    if not model_types:
        return (
            "this module is in no verified architecture; check the name, or give its"
            " counterpart with --name-map FILE"
        )
    why = table()[model_types[0]].blocked.get(pattern)
    what = why or "it is not among the architecture's verified modules"
    return (
        f"can't be carried between transformers and mlx-lm for {several(model_types)}: {what};"
        " give its counterpart with --name-map FILE, or leave it out with --exclude"
    )


def renamed(module: str, source: str, target: str) -> str:
    """``module``, of pattern ``source``, by the name of pattern ``target``: indices in order."""
    if source == target:
        return module
    for index in re.findall(r"(?<=\.)\d+(?=\.|$)", module):
        target = target.replace("{}", index, 1)
    return target


Renamer = Callable[[str], str]


def renamer(
    modules: Iterable[str],
    model_type: str | None,
    file: Path,
    name_map: Mapping[str, str] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Renamer, str | None]:
    """How to rename ``modules`` that have one counterpart each, and a note for the user, or None.

    ``name_map`` (patterns with ``{}``, transformers -> mlx-lm) overrides the table. Raises Refused
    naming the first module without a counterpart, or laid out differently on the other side.
    """
    modules = list(modules)
    if name_map is not None:
        return _mapped(modules, name_map, file, reverse), None
    rules, note = rules_for(modules, model_type, file, reverse=reverse)
    for module in modules:
        if rules[pattern_of(module)].how != "same":
            raise Refused(file, "is laid out differently on the other side", tensor=module)

    def rename(module: str) -> str:
        pattern = pattern_of(module)
        rule = rules[pattern]
        return renamed(module, pattern, rule.hf if reverse else rule.mlx[0])

    return rename, note


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
