"""Weights of merging: one for an adapter, one a layer, or by module; and recipes that hold them.

A recipe is YAML (or JSON, which is YAML) in mergekit's habit:

    merge_method: ties
    models:
      - model: adapters/summary
        parameters:
          weight: 0.5
      - model: adapters/reply
        parameters:
          weight:
            - filter: self_attn        # a regex, found anywhere in the module's name
              value: [0.2, 0.8]        # a gradient: from the first layer to the last
            - value: 0.3               # all other modules
    parameters: {rank: 16, density: 0.4, seed: 7}

Paths are relative to the recipe. A gradient's values are spread evenly over the layers and joined
by straight lines.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import MissingExtra, Refused
from loraduct.files import CONFIG_LIMIT, read_bytes
from loraduct.modules import block_of
from loraduct.patterns import first_matches
from loraduct.text import number, printable, several

Values = float | tuple[float, ...]
Weight = float | tuple[float, ...] | tuple[tuple[str, Values], ...]  # the last: (regex, values)
_FIELDS = {"merge_method", "models", "parameters", "base_model", "dtype"}
_SETTINGS: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "energy": (float, int),
    "density": (float, int),
    "seed": (int,),
    "sign_method": (str,),
    "replacements": (str,),
}


@dataclass(frozen=True)
class Recipe:
    """``settings``: the given ones of rank, energy, density, seed, sign_method, replacements."""

    method: str | None
    models: tuple[Path, ...]
    weights: tuple[Weight, ...]
    settings: Mapping[str, Any]
    base: Path | None
    dtype: str | None


def weights_of(
    weight: Weight, modules: Sequence[str], layers: int | None, file: Path, whose: str
) -> tuple[dict[str, float], list[str]]:
    """The weight of every module, and a note on each filter that has no effect.

    ``file``: where ``weight`` was given, and ``whose`` it is, for messages. Raises Refused for
    modules that none is given for.
    """
    if isinstance(weight, tuple) and weight and isinstance(weight[0], tuple):
        rules: tuple[tuple[str, Values], ...] = weight
    else:
        rules = (("", weight),)  # type: ignore[assignment]
    patterns = [f"(?s:.*?)(?:{regex})(?s:.*)" for regex, _ in rules]
    plain = len(rules) == 1 and not rules[0][0]
    hits = (
        [0] * len(modules)
        if plain
        else first_matches(patterns, modules, full=True, file=file, what="weight")
    )
    done = {}
    for module, hit in zip(modules, hits, strict=True):
        if hit < 0:
            what = f"no weight of {whose} is given for it: end its list with one that has no filter"
            raise Refused(file, what, tensor=module)
        done[module] = _at(rules[hit][1], module, layers, file)
    idle = [regex for i, (regex, _) in enumerate(rules) if regex and i not in set(hits)]
    notes = [
        f"{file.name}: the filter {printable(repr(regex), 80)} of {whose} matches no module that no"
        " filter before it takes: it has no effect"
        for regex in idle
    ]
    return done, notes


def _at(values: Values, module: str, layers: int | None, file: Path) -> float:
    """A gradient's value at the module's layer."""
    if not isinstance(values, tuple):
        return values
    block = block_of(module)
    if block is None:
        what = (
            "is in no layer, and its weight is one a layer: give it a number of its own by a filter"
        )
        raise Refused(file, what, tensor=module)
    if layers is None or layers < 2 or len(values) < 2:
        return values[0]
    place = min(block[1], layers - 1) / (layers - 1) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def read(file: Path) -> Recipe:
    """The recipe in ``file``. Raises Refused naming the field that is wrong."""
    document = _load(file)
    _known(document, _FIELDS, file, "the recipe")
    models = document.get("models")
    if not isinstance(models, list) or not models:
        raise Refused(file, "models must be a list of at least one")
    paths, weights = [], []
    for i, model in enumerate(models):
        where = f"models[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("model"), str):
            raise Refused(file, f"{where} must have a model: the path of an adapter")
        _known(model, {"model", "parameters"}, file, where)
        given = model.get("parameters") or {}
        if not isinstance(given, dict):
            raise Refused(file, f"{where}.parameters must be names and values")
        _known(given, {"weight"}, file, f"{where}.parameters")
        paths.append(file.parent / model["model"])
        weights.append(_weight(given.get("weight", 1.0), file, f"{where}.parameters.weight"))
    settings = document.get("parameters") or {}
    if not isinstance(settings, dict):
        raise Refused(file, "parameters must be names and values")
    _known(settings, set(_SETTINGS), file, "parameters")
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, _SETTINGS[name]):
            raise Refused(file, f"parameters.{name} is {_shown(value)}, which it can't be")
    for name in ("merge_method", "base_model", "dtype"):
        if not isinstance(document.get(name), str | None):
            raise Refused(file, f"{name} is {_shown(document[name])}, expected text")
    base = document.get("base_model")
    return Recipe(
        document.get("merge_method"),
        tuple(paths),
        tuple(weights),
        settings,
        file.parent / base if base else None,
        document.get("dtype"),
    )


def _weight(value: Any, file: Path, where: str) -> Weight:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rules = []
        for i, rule in enumerate(value):
            at = f"{where}[{i}]"
            if not isinstance(rule, dict) or "value" not in rule:
                raise Refused(file, f"{at} must have a value, and may have a filter")
            _known(rule, {"filter", "value"}, file, at)
            regex = rule.get("filter") or ""
            if not isinstance(regex, str):
                raise Refused(file, f"{at}.filter is {_shown(regex)}, expected a regex")
            first_matches([regex], [""], full=True, file=file, what=f"{at}.filter")  # is it one?
            rules.append((regex, _values(rule["value"], file, f"{at}.value")))
        return tuple(rules)
    return _values(value, file, where)


def _values(value: Any, file: Path, where: str) -> Values:
    if isinstance(value, list):
        if not value:
            raise Refused(file, f"{where} is an empty list")
        return tuple(_number(v, file, where) for v in value)
    return _number(value, file, where)


def _number(value: Any, file: Path, where: str) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not abs(value) <= sys.float_info.max:
        raise Refused(file, f"{where} is {_shown(value)}, expected a finite number")
    return float(value)


def _known(found: Mapping[Any, Any], known: set[str], file: Path, what: str) -> None:
    odd = [str(k) for k in found if k not in known]
    if odd:
        raise Refused(file, f"{what} has {several(odd)}; known are {', '.join(sorted(known))}")


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else printable(repr(value), 80)


def _load(file: Path) -> dict[str, Any]:
    """The YAML mapping in a small file: no tags, no aliases (they can grow without end), no key twice."""
    raw = read_bytes(file, CONFIG_LIMIT)
    try:
        import yaml
    except ImportError:
        raise MissingExtra("all", "reading a recipe (PyYAML)") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined, unused-ignore]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise Refused(file, "uses a YAML alias (*name), which recipes may not")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(k, deep=True) for k, _ in node.value]
            for key in keys:
                if not isinstance(key, str):
                    raise Refused(file, f"has the key {_shown(key)}, expected text")
            if len(set(keys)) < len(keys):
                twice = next(k for k in keys if keys.count(k) > 1)
                raise Refused(file, f"names {printable(repr(twice))} twice")
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(raw, Loader)
    except yaml.YAMLError as e:
        raise Refused(file, f"is not YAML: {' '.join(str(e).split())[:300]}") from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise Refused(
            file, "is not UTF-8 text, is nested too deeply or holds absurd values"
        ) from None
    if not isinstance(value, dict):
        raise Refused(file, "holds no mapping; see loraduct merge --help for what a recipe is")
    return value
