"""Adapters brought under one set of module names, relative to one base."""

from __future__ import annotations

from collections.abc import Sequence

from loraduct.adapter import Adapter
from loraduct.architectures import table
from loraduct.converters import names
from loraduct.converters.convert import untie
from loraduct.converters.neutral import neutral
from loraduct.converters.start import undo
from loraduct.errors import Refused
from loraduct.formats import CONFIG, peft_writer
from loraduct.formats.base import Base, correlation
from loraduct.modules import pattern_of
from loraduct.text import printable

# Fields that make of factors something that can't be added to other factors, and why.
_APART = {
    "alora_invocation_tokens": "aLoRA: it acts from its invocation tokens on; convert it with"
    " --always-on first",
    "layer_replication": "layer_replication: its layers are counted in another base",
    "trainable_token_indices": "trained tokens: their rows are replaced, not updated, and their"
    " indices are the adapter's own",
}
# Ends of names of copies of a base, by which nothing but the storage differs.
_COPIES = ("-bnb-4bit", "-unsloth-bnb-4bit", "-4bit", "-8bit", "-bf16", "-fp16", "-mlx", "-gptq")


def aligned(
    adapters: Sequence[Adapter], base: Base | None, naming: str | None = None
) -> list[Adapter]:
    """The adapters with transformers' names, or all with mlx-lm's where no base was given.

    ``naming``: whose names to have; mlx-lm's only where all have them already.

    Raises Refused for what is no low-rank update, and where they were made for different bases.
    """
    for adapter in adapters:
        _check(adapter)
    _check_same_base(adapters, base)
    if base is not None:
        named = [neutral(a, base, naming=naming or "hf") for a in adapters]
        for adapter in named:
            _check_there(adapter, base)
        return named
    adapters = [undo(a, None, None) for a in adapters]
    if naming == "mlx" or (naming is None and len({a.naming for a in adapters}) == 1):
        return adapters
    return [_in_hf(a) for a in adapters]


def own_naming(adapters: Sequence[Adapter], to: str) -> str | None:
    """mlx-lm's names for adapters that have them and are to be written for it; else None, no wish.

    What is one module there may be two elsewhere (experts, tied embeddings): not taken apart and
    joined, ranks are those of its own modules. DoRA is: its base may have transformers' names.
    """
    dora = any(u.magnitude is not None for a in adapters for u in a.low_rank.values())
    own = to == "mlx" and all(a.naming == "mlx" for a in adapters)
    return "mlx" if own and not dora else None


def _in_hf(adapter: Adapter) -> Adapter:
    if adapter.naming == "hf":
        return adapter
    renamed = names.rename(adapter, "hf", None, adapter.weights, None)[0]
    return peft_writer.reachable(untie(renamed, None))


def labels_of(adapters: Sequence[Adapter]) -> list[str]:
    """A short name of each: its folder's, with a number where that is not enough."""
    plain = [a.path.name or str(a.path) for a in adapters]
    return [
        n if plain.count(n) == 1 else f"{n} ({plain[: i + 1].count(n)})"
        for i, n in enumerate(plain)
    ]


def _check(adapter: Adapter) -> None:
    if adapter.method == "full":
        what = "is a full fine-tune: it replaces parameters, and has no update to combine"
        raise Refused(adapter.path, what)
    if adapter.dense:
        name = next(iter(adapter.dense))
        what = (
            f"{adapter.technique or 'it'} has updates of full rank: make a LoRA of it first"
            " (loraduct convert --to peft --rank N --allow-approximate)"
        )
        raise Refused(adapter.weights, what, tensor=name)
    for field, what in _APART.items():
        if adapter.config.get(field):
            raise Refused(adapter.path / CONFIG, f"is {what}")
    if not adapter.low_rank:
        raise Refused(adapter.path, "holds no low-rank update to combine")


def _check_same_base(adapters: Sequence[Adapter], base: Base | None) -> None:
    """By the recorded sample of the base's weights, else by its name, unless a base was given."""
    first = adapters[0]
    for other in adapters[1:]:
        if first.base.kin and other.base.kin:
            alike = correlation(first.base.kin, other.base.kin)
            if alike is not None and alike < 0.99:
                what = (
                    f"was made for another base than {first.path} (sampled weights correlate"
                    f" {alike:.3f}, expected over 0.99)"
                )
                raise Refused(other.path, what)
            continue
        if base is not None or not (first.base.name and other.base.name):
            continue
        if leaf(first.base.name) != leaf(other.base.name):
            what = (
                f"is for the base {printable(other.base.name)}, {first.path} for"
                f" {printable(first.base.name)}; if they are one, give it with --base BASE"
            )
            raise Refused(other.path, what)


def _check_there(adapter: Adapter, base: Base) -> None:
    """Refuse a base of a known architecture of which not one of the adapter's modules is a part."""
    known = table().get(base.architecture)
    if known is None or not base.has_weights:
        return
    for name in adapter.low_rank:
        pattern = pattern_of(name)
        if pattern in known.by_hf or pattern in known.by_mlx or base.shape_of(name) is not None:
            return
    name = next(iter(adapter.low_rank))
    what = f"the base {base.path}, a {base.architecture}, has no such module: made for another base"
    raise Refused(adapter.weights, what, tensor=name)


def leaf(name: str) -> str:
    """The last part of a base's name, without what says how a copy is stored."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    for end in sorted(_COPIES, key=len, reverse=True):
        last = last.removesuffix(end)
    return last
