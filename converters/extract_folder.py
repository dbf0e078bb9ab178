"""An adapter from two model folders: what a tuned one differs by from its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loraduct.adapter import Adapter, BaseRef, LowRank, Replacement, Update
from loraduct.architectures import renamed, table
from loraduct.converters import names
from loraduct.converters.approximate import Wanted
from loraduct.converters.convert import untie
from loraduct.converters.extract import Found, differences, is_matrix, module_of
from loraduct.converters.fuse_folder import EXACT, check_base, fingerprint
from loraduct.converters.merge_rest import check_apart
from loraduct.errors import Refused
from loraduct.formats import peft_writer
from loraduct.formats.base import CONV1D, HEADS, Base
from loraduct.modules import block_of, is_lookup, kind_of_module, pattern_of
from loraduct.tensor import Tensor

_SAFE = Path("model.safetensors")


@dataclass(frozen=True)
class Extracted:
    """The adapter in PEFT's form, and what was found of each module or parameter."""

    adapter: Adapter
    found: Mapping[str, Found]


def extract(tuned: Base, base: Base, wanted: Wanted) -> Extracted:
    """The adapter that turns ``base`` into ``tuned``; values are read module by module.

    ``wanted.allowed``: what is left over may be more than rounding explains. Raises Refused where it is not
    and is, for other architectures and shapes, packed models, and two that do not differ.
    """
    for one in (tuned, base):
        check_base(one)
        if one.quantization is not None:
            what = "is packed: unpack it first (loraduct decompress)"
            raise Refused(one.path / "config.json", what)
    if tuned.model_type != base.model_type:
        what = f"is a {tuned.model_type} model, the base a {base.model_type}: not tuned from it"
        raise Refused(tuned.path / "config.json", what)
    new, old = dict(tuned.tensors), dict(base.tensors)
    for one, held in ((tuned, new), (base, old)):  # copies of a tied embedding, which nobody reads
        if one.tied and one.stored_head:
            held.pop(one.stored_head)
    parted = _give_head(new, old)
    if not new.keys() & old.keys():
        raise Refused(
            tuned.path, f"has no weight of the same name as {base.path}: not tuned from it"
        )
    found = differences(new, old, wanted, tuned.path, _turned(base))
    if not found:
        raise Refused(tuned.path, f"does not differ from {base.path}: there is nothing to extract")
    if not any(isinstance(f.update, LowRank) for f in found.values()):
        what = "differs in whole parameters only, of which no LoRA can be made"
        name = next((n for n in found if is_matrix(n, new[n])), None)
        if name is not None:
            what = (
                "every matrix that differs does so in too many directions for a smaller LoRA; the"
                " nearest one of a rank: --rank N --allow-approximate"
            )
        raise Refused(tuned.path, what, tensor=name or next(iter(found)))
    _check_whole(tuned.path, found, wanted.allowed)
    return Extracted(_adapter(tuned, base, found, new, parted=parted), found)


def _give_head(new: dict[str, Tensor], old: dict[str, Tensor]) -> bool:
    """Where one of the two ties its head and the other doesn't: the tied one gets its embedding's.

    LoRA on the one and on the other are two updates for PEFT, on a tied base too.
    """
    for held, other in ((new, old), (old, new)):
        ends = tuple(f"{h}.weight" for h in HEADS)
        head = next((n for n in other if n.endswith(ends) and not block_of(n)), None)
        if head is None or head in held:
            continue
        names = [n for n in held if kind_of_module(module_of(n)) == "embedding"]
        if len(names) == 1:
            held[head] = held[names[0]]
            return True
    return False


def _turned(base: Base) -> Callable[[str], bool]:
    """Whether a weight is stored (in, out): those of Conv1D."""
    kind = base.text_config.get("model_type", base.model_type)

    def turned(name: str) -> bool:
        module = name.removesuffix(".weight")
        inner = not is_lookup(module) and not module.endswith(HEADS)
        return kind in CONV1D and inner

    return turned


def _check_whole(path: Path, found: Mapping[str, Found], allowed: bool) -> None:
    """Refuse factors that leave more than rounding explains, unless that is wanted."""
    left = {n: f for n, f in found.items() if not f.whole}
    if not left or allowed:
        return
    name, worst = max(left.items(), key=lambda kv: kv[1].residual)
    raise Refused(
        path,
        f"rank {worst.rank} leaves {worst.residual:.2%} of what changed, and rounding explains"
        f" {worst.rounding:.2%}; so in {len(left)} of {len(found)} modules: give a larger --rank or"
        " --energy, or accept it with --allow-approximate",
        tensor=name,
    )


def _adapter(
    tuned: Base, base: Base, found: Mapping[str, Found], new: Mapping[str, Tensor], *, parted: bool
) -> Adapter:
    """The adapter with transformers' live names and a config of its own.

    ``new``: the tuned model's parameters, of which whole modules are saved. ``parted``: embedding and
    head were compared apart, whatever the base ties.
    """
    updates: dict[str, Update] = {n: f.update for n, f in found.items()}
    adapter = Adapter(
        path=tuned.path,
        weights=tuned.path / _SAFE,
        format="mlx",  # has no PEFT config yet
        method="lora",
        updates=updates,
        config={},
        base=BaseRef(str(base.path), kin=base.kin),
        metadata={EXACT: fingerprint(base)},
        layers=base.layers,
        model_type=base.model_type,
        base_modules=base.linear_modules,
    )
    adapter = _live(adapter, base)
    adapter = _saved(adapter, new)
    if not parted:
        adapter = untie(adapter, base)
    if adapter.naming != "hf":
        adapter = names.for_base(adapter, "hf", base, base.path)[0]
    config = peft_writer.config_for(adapter)[0]
    saved = {n.rpartition(".")[0] for n, u in adapter.replacements.items() if u.origin != "bias"}
    whole = sorted(m for m in saved if not any(m.startswith(f"{s}.") for s in saved))
    return replace(adapter, format="peft", config={**config, "modules_to_save": whole or None})


def _live(adapter: Adapter, base: Base) -> Adapter:
    """By the names that modules have in memory: files may have old ones, and experts one by one."""
    known = table().get(base.architecture)
    done: dict[str, Update] = dict(adapter.replacements)
    for module, u in adapter.low_rank.items():
        pattern = pattern_of(module)
        rule = known.by_hf.get(pattern) if known else None
        if known is None or rule is None:
            done[module] = u
        elif rule.how == "stack":
            return names.for_base(adapter, "mlx", base, base.path)[0]
        else:
            there = known.by_mlx[rule.mlx[0]]
            same = there.how == rule.how
            u = replace(u, layout="weight") if rule.router and u.layout == "linear" else u
            done[renamed(module, pattern, there.hf) if same else module] = u
    return replace(adapter, updates=done)


def _saved(adapter: Adapter, new: Mapping[str, Tensor]) -> Adapter:
    """Replaced parameters as PEFT saves them: biases with their module, all others by whole modules."""
    done: dict[str, Update] = dict(adapter.low_rank)
    for name, u in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in adapter.low_rank:
            done[name] = replace(u, origin="bias")
            continue
        if not module:
            what = "changed, and belongs to the model itself: PEFT saves modules only"
            raise Refused(adapter.path, what, tensor=name)
        for other, tensor in new.items():
            if other.startswith(f"{module}."):
                done[other] = Replacement(tensor, "modules_to_save")
    check_apart(done, (), adapter.path, "no adapter holds both: keep the tuned model itself")
    return replace(adapter, updates=done)
