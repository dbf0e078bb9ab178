"""LoRA where the base ties its output head to the embedding: two updates in PEFT, one in mlx-lm.

PEFT wraps two modules that share a weight: LoRA on the embedding acts on the input side alone, LoRA
on ``lm_head`` on the output side alone. mlx-lm has one module, whose LoRA acts on both sides
(``mlx_lm/tuner/lora.py``: ``LoRAEmbedding.__call__`` and ``as_linear``). So an adapter that moves
both by one matrix is carried exactly, and every other one is refused, approximated with what that
does to either side measured, or made for a base whose head has a weight of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraduct.account import OtherSide
from loraduct.adapter import Adapter, LowRank, Update
from loraduct.architectures import table
from loraduct.computed import joined
from loraduct.errors import Refused
from loraduct.formats.base import HEADS, Base
from loraduct.formats.untied import has_form
from loraduct.modules import block_of, kind_of_module
from loraduct.tensor import FLOATS, Tensor, as_float32, same

_BLOCK = 1 << 20  # elements read at once
_SIDES = {"embedding": "input embedding", "head": "output head"}


@dataclass(frozen=True)
class Settled:
    """The adapter as mlx-lm can hold it; ``copies`` of its tensors need no place of their own."""

    adapter: Adapter
    copies: tuple[Tensor, ...] = ()
    sides: tuple[OtherSide, ...] = ()


def settle(adapter: Adapter, base: Base | None, *, allowed: bool, untied: bool) -> Settled:
    """``adapter``, in transformers' names, with one update where mlx-lm has one module.

    ``allowed``: approximate and measure. ``untied``: it is written for a base that isn't tied any
    more. Raises Refused where neither holds and the two sides differ.
    """
    embedding = _only(adapter, "embedding")
    head = _only(adapter, "head")
    if embedding is None and head is None:
        if untied:
            what = "adapts neither the embedding nor the head: leave --untie-base out"
            raise Refused(adapter.weights, what)
        return Settled(adapter)
    first = adapter.low_rank[embedding or head or ""].a.name
    if base is None:
        what = f"adapts the {_named(embedding, head)}: whether the base ties it decides; give --base BASE"
        raise Refused(adapter.weights, what, tensor=first)
    if base.tied is False or untied:
        return Settled(adapter)  # that the base can be untied is checked where it is written
    if base.tied is None and base.stored_head is not None and has_form(base):
        what = "does not say whether the head is tied; set tie_word_embeddings in it"
        raise Refused(base.path / "config.json", what)
    pair = adapter.low_rank.get(embedding or ""), adapter.low_rank.get(head or "")
    if pair[0] and pair[1] and _one_matrix(pair[0], pair[1]):
        kept = {m: u for m, u in adapter.updates.items() if m != head}
        return Settled(replace(adapter, updates=kept), pair[1].tensors)
    if not allowed:
        raise Refused(adapter.weights, _reason(base, embedding, head), tensor=first)
    _check_plain(adapter, base, pair[1])
    return _approximated(adapter, base, embedding, head)


def _only(adapter: Adapter, side: str) -> str | None:
    """The one module of this side that the adapter updates, or None."""
    found = [
        m
        for m in adapter.low_rank
        if not block_of(m)
        and (m.endswith(HEADS) if side == "head" else kind_of_module(m) == "embedding")
    ]
    if len(found) > 1:
        what = f"and {found[1]} are both the {_SIDES[side]}: names of two versions in one adapter?"
        raise Refused(adapter.weights, what, tensor=found[0])
    return found[0] if found else None


def _named(embedding: str | None, head: str | None) -> str:
    words = ["embedding"] if embedding else []
    return " and the ".join([*words, *(["output head"] if head else [])])


def _reason(base: Base, embedding: str | None, head: str | None) -> str:
    """Why it is refused, and the ways out that this base has."""
    if embedding and head:
        does = "by two different updates, for which mlx-lm has one module"
    else:
        does = (
            "and mlx-lm would move the head with it"
            if embedding
            else "and mlx-lm has no module for it and would ignore it"
        )
    leave = " --exclude ".join(m.rpartition(".")[2] for m in (embedding, head) if m)
    ways = ["let one update move both sides, with the difference measured: --allow-approximate"]
    ways += (
        ["stay exact with an untied copy of the base: --untie-base DIR"] if has_form(base) else []
    )
    if not (embedding and head):
        ways.append(f"leave it out: --exclude {leave}")
    return (
        f"adapts the {_named(embedding, head)}, which this base ties (tie_word_embeddings), {does};"
        f" {'; or '.join(ways)}"
    )


def _check_plain(adapter: Adapter, base: Base, head: LowRank | None) -> None:
    """DoRA's magnitude and a bias of the head have no counterpart on the embedding."""
    odd = (head.magnitude or head.bias) if head is not None else None
    if head is None or odd is None:
        return
    what = "a DoRA magnitude" if head.magnitude else "a low-rank bias"
    out = "; --untie-base DIR keeps a head of its own" if head.magnitude and has_form(base) else ""
    raise Refused(
        adapter.weights,
        f"is {what} of the output head, which this base ties (tie_word_embeddings): mlx-lm's one"
        f" module for both sides can't hold it{out}",
        tensor=odd.name,
    )


def _turned(update: LowRank) -> LowRank:
    """The head's update as one of the embedding: dW is the same matrix, its factors are turned."""
    return replace(update, a=update.b.T, b=update.a.T, layout="embedding")


def _one_matrix(embedding: LowRank, head: LowRank) -> bool:
    """Whether both are the same update, byte for byte: no sum of squares can tell that."""
    turned = _turned(head)
    plain = not (head.magnitude or head.bias or embedding.magnitude)
    return (
        plain
        and embedding.scale == turned.scale
        and same(embedding.a, turned.a)
        and same(embedding.b, turned.b)
    )


def _approximated(adapter: Adapter, base: Base, embedding: str | None, head: str | None) -> Settled:
    """One update for both sides: the only one there is, or the mean of two (nearest to both)."""
    low_rank = adapter.low_rank
    name = embedding or _embedding_of(adapter, base)
    done: dict[str, Update] = {m: u for m, u in adapter.updates.items() if m not in (name, head)}
    size = _size_of(base)
    if embedding and head:
        pair = low_rank[embedding], _turned(low_rank[head])
        off = _norm([pair[0], replace(pair[1], scale=-pair[1].scale)]) / 2
        done[name] = _mean(*pair)
        what = "moves by the mean of its own update and the other side's"
        moved = [(embedding, "embedding", what, off), (head, "head", what, off)]
    elif embedding:
        update = done[name] = low_rank[embedding]
        what = "moves with the embedding, and not in the source"
        moved = [(embedding, "head", what, _norm([update]))]
    else:
        assert head is not None
        update = done[name] = _turned(low_rank[head])
        what = "moves with the head, and not in the source"
        moved = [(head, "embedding", what, _norm([update]))]
    sides = tuple(
        OtherSide(module, _SIDES[side], what, norm, norm / size if size else None)
        for module, side, what, norm in moved
    )
    order = [
        name if m == head and not embedding else m
        for m in adapter.updates
        if m in done or m == head
    ]
    updates = {m: done[m] for m in order if m in done}
    return Settled(replace(adapter, updates=updates), sides=sides)


def _embedding_of(adapter: Adapter, base: Base) -> str:
    """What transformers calls the embedding that the head is tied to."""
    known = table().get(base.architecture)
    patterns = [*known.by_hf, *known.blocked] if known else []
    found = [p for p in patterns if "{}" not in p and kind_of_module(p) == "embedding"]
    if not found:
        what = f"adapts the head, and which module of a {base.model_type} model is the embedding is not known"
        raise Refused(adapter.weights, what)
    return found[0]


def _mean(embedding: LowRank, head: LowRank) -> LowRank:
    """Half of the sum of two updates: their factors side by side."""
    scale = embedding.scale or head.scale
    pair = [embedding, head]
    bs = [u.b for u in pair]
    if any(u.scale != scale for u in pair) and scale:
        bs = [u.b.to("F32").times(u.scale / scale) for u in pair]
    a = joined([u.a for u in pair], 0)
    return replace(embedding, a=a, b=joined(bs, 1), scale=scale / 2)


# -- sizes ----------------------------------------------------------------------------------------


def _norm(updates: Sequence[LowRank]) -> float:
    """Frobenius norm of the sum of updates of an embedding.

    With A the rows of all a and B the columns of all scale * b, dW = (B A).T and
    ||dW||^2 = sum((A A.T) * (B.T B)): never the dense matrix. Good to 1e-8 of the largest of them.
    """
    import numpy as np

    left: Any = 0.0
    for rows in _blocks([u.a.T for u in updates]):
        left = left + rows.T @ rows
    b = np.hstack([u.scale * _float64(u.b.read(finite=False)) for u in updates])
    return float(max(0.0, np.sum(left * (b.T @ b))) ** 0.5)


def _size_of(base: Base) -> float | None:
    """Frobenius norm of the base's embedding; None where it isn't there in plain numbers."""
    import numpy as np

    name = base.embedding if base.has_weights else None
    weight = base.tensors[name] if name else None
    if weight is None or weight.stored_dtype not in FLOATS or len(weight.shape) != 2:
        return None
    return float(sum(float(np.vdot(rows, rows)) for rows in _blocks([weight])) ** 0.5)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The rows of matrices, side by side, some at a time in float64."""
    import numpy as np

    held = [replace(t, data=t.make(), make=None) if t.make else t for t in tensors]
    step = max(1, _BLOCK // sum(t.shape[1] for t in held))
    for i in range(0, held[0].shape[0], step):
        j = min(i + step, held[0].shape[0])
        yield np.hstack([_float64(as_float32(t.rows(i, j, finite=False), t.dtype)) for t in held])


def _float64(values: Any) -> Any:
    import numpy as np

    return values.astype(np.float64)
