"""Names and layouts between transformers and mlx-lm: renamed, split, joined and stacked.

What a module is called on the other side, and whether it is one module there, is the table of
`loraduct.architectures`; here its rules act on updates. A low-rank update survives every one of
them exactly: the output rows of dW are the rows of b, and joining two updates puts their factors
side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.architectures import Rule, renamed, renamer, rules_for, table
from loraduct.computed import joined, moved, part, reshaped, resized, stacked
from loraduct.errors import Refused
from loraduct.formats import mlx_lists
from loraduct.formats.base import Base
from loraduct.formats.experts import zero_experts
from loraduct.modules import pattern_of
from loraduct.tensor import Tensor, same
from loraduct.text import printable

# Mamba's, Jamba's and LongCat Flash's
_PASSED_BY = (".mixer.dt_proj", ".mamba.dt_proj", ".mlp.router.classifier")
# dbrx (run with transformers 5.23: the wrapped module lacks the parameters its forward reads)
_IN_ROWS = (
    "are experts in one matrix of rows, of which PEFT can't run an adapter: transformers reads the"
    " matrix past PEFT's layer; leave it out with --exclude"
)
Joined = dict[str, int]  # name of what was made of two updates -> rank of the first


def for_base(
    adapter: Adapter,
    naming: str,
    base: Base | None,
    file: Path | None = None,
    name_map: Mapping[str, str] | None = None,
) -> tuple[Adapter, Joined, str | None]:
    """`rename` by what ``base`` is, if one is given; ``file``: what messages name instead of it."""
    if base is None or adapter.naming == naming:
        return rename(adapter, naming, None, file or adapter.weights, name_map)
    file = file or base.path / "config.json"
    zeros = zero_experts(base.text_config)
    return rename(adapter, naming, base.architecture, file, name_map, zeros)


def rename(
    adapter: Adapter,
    naming: str,
    model_type: str | None,
    file: Path,
    name_map: Mapping[str, str] | None,
    zeros: int = 0,
) -> tuple[Adapter, Joined, str | None]:
    """The adapter in the other side's names, what was joined, and a note for the user.

    ``zeros``: how many experts of the base have no effect (`formats.experts.zero_experts`).

    Raises Refused naming the first module that has no counterpart.
    """
    if adapter.naming == naming or not adapter.updates:
        return adapter, {}, None
    reverse = adapter.naming == "mlx"
    updates = adapter.low_rank
    if adapter.method == "full" and not reverse:
        check_equal(model_type, file)
    if not reverse:
        _check_in_effect(updates, adapter.weights)
    # a full parameter is not renamed: the target refuses it, or both sides are MLX
    done: dict[str, Update] = dict(adapter.replacements)
    joined: Joined = {}
    if name_map is not None:
        to_new, note = renamer(updates, model_type, file, name_map, reverse=reverse)
        done |= {to_new(m): u for m, u in updates.items()}
    else:
        if reverse:
            _check_in_one(updates, adapter.weights)
        blocks = (adapter.origin or {}).get("blocks")
        rules, note = rules_for(updates, model_type, file, reverse=reverse, blocks=blocks)
        _check_turned(updates, rules, model_type, adapter.weights)
        if reverse:
            made, joined = _to_hf(updates, rules, adapter.weights, zeros)
        else:
            before = (adapter.origin or {}).get("joined", {})
            made = _to_mlx(updates, rules, before, adapter.weights, zeros)
        done |= made
    return replace(adapter, updates=done, naming=naming), joined, note


def _check_in_effect(updates: Mapping[str, LowRank], file: Path) -> None:
    """Of some layers transformers takes the weight alone: PEFT's layer on them does nothing.

    Training leaves b at zero then, which is fine.
    """
    for module, u in updates.items():
        if module.endswith(_PASSED_BY) and u.scale and u.b.raw().any():
            raise Refused(
                file,
                "has no effect in transformers, which passes PEFT's layer by here, and would have"
                " one in mlx-lm; leave it out with --exclude",
                tensor=module,
            )


def _check_turned(
    updates: Mapping[str, LowRank], rules: Mapping[str, Rule], model_type: str | None, file: Path
) -> None:
    """Which way round such factors are is checked against the base's width (`formats.experts`)."""
    for module, u in updates.items():
        rule = rules[pattern_of(module)]
        if not (rule.turned or rule.zeros):
            continue
        if model_type is None:
            what = "are experts whose factors PEFT has the other way round; give --base BASE"
            raise Refused(file, what, tensor=module)
        if u.layout != "experts":
            what = "is no update of several experts, each with factors of its own, as the base has them"
            raise Refused(file, what, tensor=u.a.name)


def _check_in_one(updates: Mapping[str, LowRank], file: Path) -> None:
    """Layers that have their factors in parts are Apple's model's, which transformers doesn't have."""
    for layer, there in mlx_lists.parts(updates).items():
        first = f"{layer}[{there[0]}]"
        raise Refused(
            file,
            f"is a part of {printable(layer)}, a fused layer of Apple's model in mlx-lm (afm7), which"
            f" transformers doesn't have; give the parts' names there ({printable(first)}) with"
            " --name-map FILE",
            tensor=updates[first].a.name,
        )


def check_equal(model_type: str | None, file: Path) -> None:
    """Whole parameters are carried where all names, and so all values, are the same on both sides."""
    if model_type is None:
        raise Refused(
            file,
            "replaces whole parameters: whether mlx-lm has the same depends on the architecture;"
            " give --base BASE",
        )
    known = table().get(model_type)
    if known is None or known.blocked or any(r.mlx != (r.hf,) for r in known.by_hf.values()):
        raise Refused(
            file,
            f"replaces whole parameters, and the names of {printable(model_type, 60)!r} are not"
            " known to be all equal in transformers and mlx-lm; merge it into the base instead",
        )


def _to_mlx(
    updates: Mapping[str, LowRank],
    rules: Mapping[str, Rule],
    joined: Joined,
    file: Path,
    zeros: int,
) -> dict[str, LowRank]:
    done: dict[str, LowRank] = {}
    stacks: dict[str, dict[int, str]] = {}
    for module, update in updates.items():
        pattern = pattern_of(module)
        rule = rules[pattern]
        names = [renamed(module, pattern, name) for name in rule.mlx]
        if rule.how == "stack":  # the name's last index is the expert's
            stacks.setdefault(names[0], {})[_last_index(module)] = module
            continue
        if rule.how == "rows":
            raise Refused(file, _IN_ROWS, tensor=module)
        update = _turned(update) if rule.turned else update
        update = _of_experts(update, update.shape[0] - zeros) if rule.zeros else update
        made = [update] if rule.how == "same" else _split(update, rule.how, joined.get(module, 0))
        for name, one in zip(names, made, strict=True):
            _put(
                done,
                name,
                replace(one, layout="linear") if one.layout == "weight" else one,
                file,
                module,
            )
    for name, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))):
            missing = min(set(range(max(experts) + 1)) - experts.keys())
            raise Refused(
                file, f"has no update for expert {missing}, whose siblings have", tensor=name
            )
        members = [updates[experts[i]] for i in range(len(experts))]
        _put(done, name, _stack(members), file, experts[0])
    return done


def _put(done: dict[str, LowRank], name: str, update: LowRank, file: Path, source: str) -> None:
    if name in done:
        raise Refused(
            file,
            f"and another module both are {name} on the other side: names of two versions of"
            " transformers in one adapter?",
            tensor=source,
        )
    done[name] = update


def _last_index(module: str) -> int:
    return int([w for w in module.split(".") if w.isdigit()][-1])


def _split(update: LowRank, how: str, first: int) -> list[LowRank]:
    """Two updates of the halves, or of the even and odd ones, of the output rows.

    ``first``: it was joined from two updates, the first of that rank, whose columns are zero in the
    other's rows; they get their own factors back.
    """
    rows, inner = (1, 2) if update.layout == "experts" else (0, 1)
    size = update.b.shape[rows]
    halved = [(0, size // 2, 1), (size // 2, size, 1)]
    cuts = halved if how == "halves" else [(0, size, 2), (1, size, 2)]
    halves = [replace(update, b=part(update.b, rows, *cut)) for cut in cuts]
    if not 0 < first < update.rank:
        return halves
    spans = ((0, first), (first, update.rank))
    return [
        replace(u, a=part(u.a, inner - 1, *span), b=part(u.b, inner, *span, only=True))
        for u, span in zip(halves, spans, strict=True)
    ]


def _turned(update: LowRank) -> LowRank:
    """Of the transposed weight of every expert: (b @ a).T is a.T @ b.T."""
    a, b = (reshaped(t, *t.shape, axes=(0, 2, 1)) for t in (update.b, update.a))
    return replace(update, a=a, b=b)


def _of_experts(update: LowRank, number: int) -> LowRank:
    """Of so many experts: those that are left out, or added, have no effect whatever they hold."""
    tensors = (update.a, update.b)
    if number > update.shape[0]:
        a, b = (resized(t, 0, number) for t in tensors)
    else:
        a, b = (part(t, 0, 0, number) for t in tensors)
    return replace(update, a=a, b=b)


def _stack(members: list[LowRank]) -> LowRank:
    """One update of all experts from one of each; ranks are padded, scales folded into b."""
    rank = max(u.rank for u in members)
    members, scale = _one_scale(members)
    same = [u.with_rank(rank) for u in members]
    return LowRank(
        stacked([u.a for u in same]), stacked([u.b for u in same]), scale, layout="experts"
    )


def _one_scale(updates: list[LowRank]) -> tuple[list[LowRank], float]:
    """The same updates with one scale; where that needs folding, b is float32, so nothing rounds."""
    scale = next((u.scale for u in updates if u.scale), 0.0)
    if all(u.scale == scale for u in updates):
        return updates, scale
    folded = [replace(u, b=u.b.to("F32").times(u.scale / scale), scale=scale) for u in updates]
    return folded, scale


def _to_hf(
    updates: Mapping[str, LowRank], rules: Mapping[str, Rule], file: Path, zeros: int
) -> tuple[dict[str, LowRank], Joined]:
    done: dict[str, LowRank] = {}
    ranks: Joined = {}
    joins: dict[str, tuple[Rule, dict[int, str]]] = {}
    for module, update in updates.items():
        pattern = pattern_of(module)
        rule = rules[pattern]
        name = renamed(module, pattern, rule.hf)
        if rule.how in ("halves", "interleaved"):
            joins.setdefault(name, (rule, {}))[1][rule.mlx.index(pattern)] = module
        elif rule.how == "same":
            one = replace(update, layout="weight") if rule.router else update
            one = _turned(one) if rule.turned else one
            _put(done, name, one, file, module)
        else:
            raise Refused(file, _IN_ROWS, tensor=module)
    for name, (rule, found) in joins.items():
        halves = [updates[found[i]] if i in found else None for i in range(2)]
        one = _join(halves, rule.how)
        one = _turned(one) if rule.turned else one
        one = _of_experts(one, one.shape[0] + zeros) if rule.zeros else one
        _put(done, name, one, file, next(iter(found.values())))
        if len(found) == 2 and done[name].rank > updates[found[0]].rank:
            ranks[name] = updates[found[0]].rank
    return done, ranks


def _join(halves: list[LowRank | None], how: str) -> LowRank:
    """One update whose output rows are those of two; an absent one moves nothing.

    With one a for both (as splitting leaves it) the rank stays; else it is the sum of both.
    """
    present, scale = _one_scale([u for u in halves if u is not None])
    first = present[0]
    remaining = iter(present)
    halves = [None if u is None else next(remaining) for u in halves]
    rows, inner = (1, 2) if first.layout == "experts" else (0, 1)
    shared = len(present) == 2 and same(present[0].a, present[1].a)
    total = first.rank if shared else sum(u.rank for u in present)
    both = [u.a for u in present]
    a = moved(first.a.shape, both, lambda one, _: one) if shared else joined(both, inner - 1)
    bs: list[Tensor] = []
    before = 0
    for half in halves:
        if half is None:
            empty = part(first.b, inner, 0, 0)
            bs.append(resized(empty, inner, total))
            continue
        b = half.b
        if not shared:  # its columns stand behind those of the halves before it
            b = resized(b, inner, before + b.shape[inner], front=True)
            b = resized(b, inner, total)
            before += half.rank
        bs.append(b)
    return replace(first, a=a, b=joined(bs, rows, interleaved=how == "interleaved"), scale=scale)
