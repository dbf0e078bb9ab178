"""Which of a base's weights an adapter's updates belong to, by whichever names the base has.

A base folder may have transformers' live names, those of its files (experts one by one, old
prefixes), or mlx-lm's: the table of architectures knows all of them, and the base's own names decide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank, Replacement
from loraduct.architectures import Architecture, renamed, table
from loraduct.computed import given, reshaped
from loraduct.converters import names
from loraduct.errors import Refused
from loraduct.formats.base import CONV1D, HEADS, Base
from loraduct.modules import kind_of_module, pattern_of
from loraduct.tensor import Tensor

# experts stored (in, out) in transformers, as PEFT is told (`is_transposed`, transformers 5.23)
_TURNED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
TOKENS = ".token_adapter.trainable_tokens_delta"
_NO_BIAS = (
    "trains a bias that the base does not have: a model with it fused in would not read it; keep the"
    " adapter unfused"
)
_PARTED = (
    "trains tokens, rows of embedding and head alike while they are tied; another update parts the"
    " two, and what the rows are then is not defined here: keep the adapter unfused"
)
# what can't be, here and in the pool
DORA = "is DoRA, which sets lengths of rows: a weight other than 1 is not defined (given {:g})"
REPLACES = "replaces this weight: weighted by {:g} that is not defined"
# norms of (1 + weight) in transformers, of which mlx-lm stores the sum (0.32.2, `sanitize`)
_CENTRED = ("qwen3_next", "qwen3_5")
_SHIFTED = (
    "replaces a norm to which this base, written by mlx-lm, has added 1; fuse into transformers' folder"
    " and convert the result"
)
TWICE = "is changed by another adapter too"
Shapes = Mapping[str, tuple[int, ...]]  # parameter -> shape, unpacked
Update = tuple[LowRank, float]  # and its weight


@dataclass
class Placed:
    """By the base's own parameters: low-rank updates (dW in the stored orientation), tensors that
    replace it, tensors times a factor that are added to it, or to what replaces it (biases), rows that
    replace its rows."""

    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, list[tuple[Tensor, float]]] = field(default_factory=dict)
    rows: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)

    def touched(self) -> set[str]:
        """Every parameter that changes."""
        return {*self.updates, *self.replaced, *self.added, *self.rows}


def placed(
    adapters: Sequence[tuple[Adapter, float]],
    base: Base,
    shapes: Shapes,
    *,
    new_biases: bool = False,
) -> Placed:
    """Where all updates go. Adapters have transformers' names (`converters.neutral`).

    A tied head stands in ``shapes`` under the name it will have. ``new_biases``: what is made of the
    result reads biases that the base doesn't have; a transformers' model would not. Raises Refused naming what has no
    place, shapes that differ, and what can't be weighted or combined.
    """
    found = Placed()
    for adapter, weight in adapters:
        before = found.touched()
        for name, u in adapter.replacements.items():
            wanted = shapes
            if new_biases and name.endswith(".bias") and name not in shapes:
                wanted = {**shapes, name: u.weight.shape}
            _replacement(found, adapter, name, u, weight, base, wanted)
        for name, low in _low_rank(adapter, base, shapes):
            if low.magnitude is not None:
                check_weight(adapter.weights, name, weight, DORA)
            if name in found.replaced or name in found.rows:
                what = TWICE if name in before else "is adapted and replaced as well"
                raise Refused(adapter.weights, what, tensor=name)
            found.updates.setdefault(name, []).append((low, weight))
            if low.bias is not None:
                bias = f"{name.removesuffix('weight')}bias"
                if bias not in shapes and not new_biases:
                    raise Refused(adapter.weights, _NO_BIAS, tensor=name)
                if bias in found.replaced and bias in before:
                    raise Refused(adapter.weights, TWICE, tensor=bias)
                found.added.setdefault(bias, []).append((low.bias, low.scale * weight))
    if not found.touched():
        raise Refused(adapters[0][0].weights, "has no update: there is nothing to fuse")
    return found


def _low_rank(adapter: Adapter, base: Base, shapes: Shapes) -> list[tuple[str, LowRank]]:
    """(parameter, update) of all modules, in the stored orientation."""
    known = table().get(base.architecture)
    done: list[tuple[str, LowRank]] = []
    for module, low in adapter.low_rank.items():
        ways = _ways(adapter, module, low, base, known)
        way = next((w for w in ways if all(n in shapes for n, _ in w)), None)
        if way is None:
            return _by_mlx(adapter, module, base, shapes)
        done += [(n, _oriented(adapter, n, u, base, shapes[n])) for n, u in way]
    return done


def _ways(
    adapter: Adapter, module: str, low: LowRank, base: Base, known: Architecture | None
) -> Iterator[list[tuple[str, LowRank]]]:
    """The forms that an update may have in transformers' files."""
    whole = module if low.layout in ("parameter", "experts") else f"{module}.weight"
    for start in (whole, whole.partition(".")[2], f"model.{whole}"):
        yield [(start, low)]
    if known is None or pattern_of(module) not in known.by_hf:
        return
    for name in _renamed(module, known):
        yield [(name if low.layout == "experts" else f"{name}.weight", low)]
    if low.layout == "experts":
        one = replace(adapter, updates={module: low}, origin=None)
        there = names.for_base(one, "mlx", base, base.path)[0].low_rank
        for forms in _stacks(known, there):
            yield [
                (f"{renamed(f'{name}.{e}', f'{pattern_of(name)}.{{}}', forms[name])}.weight", part)
                for name, u in there.items()
                for e, part in enumerate(_experts(u))
            ]


def _renamed(module: str, known: Architecture) -> Iterator[str]:
    """Other names of the same module in transformers' files."""
    pattern = pattern_of(module)
    rule = known.by_hf.get(pattern)
    if rule is None or rule.how != "same":
        return
    for other in known.by_hf.values():
        if other.mlx == rule.mlx and other.how == "same" and other is not rule:
            yield renamed(module, pattern, other.hf)


def _found(name: str, base: Base, shapes: Shapes) -> str | None:
    """The parameter of the base that transformers calls ``name``; None: there is none."""
    module, _, part = name.rpartition(".")
    known = table().get(base.architecture)
    forms = [name, name.partition(".")[2], f"model.{name}"]
    if known is not None:
        forms += [f"{other}.{part}" for other in _renamed(module, known)]
        rule = known.by_hf.get(pattern_of(module))
        if rule is not None and rule.how == "same":
            forms.append(f"{renamed(module, rule.hf, rule.mlx[0])}.{part}")
    return next((n for n in forms if n in shapes), None)


def _stacks(known: Architecture, there: Mapping[str, LowRank]) -> Iterator[dict[str, str]]:
    """mlx-lm's name -> the pattern of transformers' names one an expert, for each set of them."""
    rules = {
        name: [
            r.hf for r in known.by_hf.values() if r.how == "stack" and r.mlx == (pattern_of(name),)
        ]
        for name in there
    }
    for forms in zip(*rules.values(), strict=False):
        yield dict(zip(rules, forms, strict=True))


@functools.lru_cache(maxsize=8)  # the experts of a layer are asked for one after the other
def _values(tensor: Tensor) -> Any:
    return tensor.read()


def _experts(u: LowRank) -> list[LowRank]:
    """One linear update of each expert."""

    def of(tensor: Tensor, e: int) -> Tensor:
        return given(tensor.name, [tensor], tensor.shape[1:], lambda: _values(tensor)[e])

    return [LowRank(of(u.a, e), of(u.b, e), u.scale) for e in range(u.shape[0])]


def _by_mlx(
    adapter: Adapter, missing: str, base: Base, shapes: Shapes
) -> list[tuple[str, LowRank]]:
    """The same by mlx-lm's names; ``missing`` has no place by transformers'."""
    try:
        there = names.for_base(adapter, "mlx", base, base.path)[0].low_rank
    except Refused:
        there = {}
    done = [(f"{module}.weight", u) for module, u in there.items()]
    if not done or any(name not in shapes for name, _ in done):
        what = f"the base {base.path} has no weight for it: made for another base"
        raise Refused(adapter.weights, what, tensor=missing)
    return [(n, _oriented(adapter, n, u, base, shapes[n])) for n, u in done]


def _oriented(
    adapter: Adapter, name: str, u: LowRank, base: Base, shape: tuple[int, ...]
) -> LowRank:
    """The update of the weight as it is stored: (in, out) of Conv1D, and of some models' experts.

    Layout ``embedding`` is just that: dW = (b @ a).T, with lengths (DoRA) along its columns.
    """
    kind = base.text_config.get("model_type", base.model_type)
    turned = u.shape[:-2] + u.shape[:-3:-1]
    module = name.removesuffix(".weight")
    plain = kind_of_module(module) == "embedding" or module.endswith((*HEADS, "wpe"))
    conv1d = kind in CONV1D and u.layout == "linear" and not name.startswith("model.")
    if conv1d and not plain and shape == turned:
        return replace(u, layout="embedding")
    if u.layout == "experts" and kind in _TURNED and shape == turned and ".experts." in name:
        a, b = (reshaped(t, *t.shape, axes=(0, 2, 1)) for t in (u.b, u.a))
        return replace(u, a=a, b=b)
    if shape != u.shape:
        what = f"updates a weight of shape {list(u.shape)}, the base has {list(shape)}"
        raise Refused(adapter.weights, f"{what}: made for another base", tensor=name)
    return u


def _replacement(
    found: Placed, adapter: Adapter, name: str, u: Replacement, weight: float, base: Base, shapes: Shapes
) -> None:  # fmt: skip
    check_weight(adapter.weights, name, weight, REPLACES)
    if name.endswith(TOKENS):
        return _token_rows(found, adapter, name, u, base, shapes)
    there = _found(name, base, shapes)
    beside = f"{name.removesuffix('bias')}weight"
    if there is None and name.endswith(".bias") and _found(beside, base, shapes):
        raise Refused(adapter.weights, _NO_BIAS, tensor=name)
    if there is None:
        what = f"the base {base.path} has no weight of this name: made for another base"
        raise Refused(adapter.weights, what, tensor=name)
    if shapes[there] != u.weight.shape:
        what = f"replaces a weight of shape {list(shapes[there])} by {list(u.weight.shape)}"
        raise Refused(adapter.weights, what, tensor=name)
    norm = there.endswith("norm.weight") and ".linear_attn." not in there
    if norm and base.model_type.startswith(_CENTRED) and _sanitized(shapes):
        raise Refused(adapter.weights, _SHIFTED, tensor=name)
    if there in found.touched():
        raise Refused(adapter.weights, TWICE, tensor=name)
    found.replaced[there] = u.weight


def _sanitized(shapes: Shapes) -> bool:
    """Whether mlx-lm wrote a hybrid model: its convolutions end in the one input channel."""
    return any(n.endswith("conv1d.weight") and s[-1] == 1 for n, s in shapes.items())


def is_end(name: str) -> bool:
    """Whether a module, or its weight, is a side that may be tied: the embedding or the head."""
    return name.removesuffix(".weight").endswith(("embed_tokens", "lm_head", "wte"))


def check_parted(adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Raise Refused for trained tokens where a tied head gets a weight of its own."""
    for adapter, _ in adapters:
        for name in adapter.replacements:
            if name.endswith(TOKENS):
                raise Refused(adapter.weights, _PARTED, tensor=name)


def _token_rows(
    found: Placed, adapter: Adapter, name: str, u: Replacement, base: Base, shapes: Shapes
) -> None:
    module = name.removesuffix(TOKENS)
    target = _found(f"{module}.weight", base, shapes)
    if target is None or kind_of_module(module) not in ("embedding", "output head"):
        raise Refused(adapter.weights, "the base has no such embedding", tensor=name)
    indices = token_rows(adapter, name, u.weight, shapes[target])
    if target in found.touched():
        raise Refused(adapter.weights, TWICE, tensor=name)
    found.rows[target] = (tuple(indices), u.weight)


def token_rows(adapter: Adapter, name: str, rows: Tensor, shape: Sequence[int]) -> list[int]:
    """The row numbers of trained tokens; PEFT has them in its config, for each embedding or for one.

    ``shape``: of the embedding. Raises Refused for rows that it doesn't have.
    """
    module = name.removesuffix(TOKENS)
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((v for k, v in indices.items() if module.endswith(k)), None)
    sound = isinstance(indices, list) and all(type(i) is int and 0 <= i < shape[0] for i in indices)
    if not sound or rows.shape != (len(indices), *shape[1:]):  # type: ignore[arg-type]
        what = f"trains tokens that an embedding of {list(shape)} does not have"
        raise Refused(adapter.weights, what, tensor=name)
    return list(indices or ())


def check_weight(file: Path, name: str, weight: float, what: str) -> None:
    """Refuse a weight other than 1 of what can't be weighted; ``what``: DORA or REPLACES."""
    if weight != 1.0:
        raise Refused(file, what.format(weight), tensor=name)
