"""An adapter against its base, without running either: names, shapes, values, identity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loraduct.adapter import Adapter
from loraduct.architectures import renamer
from loraduct.errors import Refused
from loraduct.formats import mlx_keys, peft_config
from loraduct.formats.base import Base, correlation, differences, misread_fields
from loraduct.text import several
from loraduct.validation.checks import Check


def check(adapter: Adapter, base: Base, name_map: Mapping[str, str] | None = None) -> list[Check]:
    """All structural checks."""
    return [
        _finite(adapter),
        *_names_and_shapes(adapter, base, name_map),
        *_complete(adapter, base),
        _identity(adapter, base),
        _config(base),
        *(
            Check("trap", "warning", n.text)
            for n in adapter.notes
            if n.kind != "base-precision-unknown"
        ),
    ]


def _finite(adapter: Adapter) -> Check:
    """No NaN, no Inf: some attention kernels hide a NaN, so logits are no substitute."""
    count = 0
    for update in adapter.updates.values():
        for tensor in update.tensors:
            count += 1
            try:
                for _ in tensor.chunks():
                    pass
            except Refused:
                return Check("values", "failed", "holds NaN or Inf", tensor.name)
    dtypes = sorted({t.dtype for t in adapter.tensors()})
    return Check("values", "passed", f"{count} tensors, {', '.join(dtypes)}, no NaN, no Inf")


def _names_and_shapes(
    adapter: Adapter, base: Base, name_map: Mapping[str, str] | None
) -> list[Check]:
    if not base.has_weights:
        return [Check("names", "skipped", f"{base.path} holds no weights to compare with")]
    to_base = hf_names(adapter, base, name_map)
    if isinstance(to_base, Check):
        return [to_base]
    absent = [m for m in adapter.low_rank if base.shape_of(to_base[m]) is None]
    absent += [n for n in adapter.replacements if n not in base.tensors]
    if absent:
        return [
            Check(
                "names", "failed", f"the base has no such weight ({len(absent)} in all)", absent[0]
            )
        ]
    found = [Check("names", "passed", f"all {len(adapter.updates)} are in the base")]
    for problem in differences(adapter, base):
        return [*found, Check("shapes", "failed", str(problem))]
    for name, replacement in adapter.replacements.items():
        if replacement.weight.shape != base.tensors[name].shape:
            what = f"shape {list(replacement.weight.shape)}, the base has {list(base.tensors[name].shape)}"
            return [*found, Check("shapes", "failed", what, name)]
    return [*found, Check("shapes", "passed", "all fit the base's weights")]


def hf_names(
    adapter: Adapter, base: Base, name_map: Mapping[str, str] | None
) -> dict[str, str] | Check:
    """Each module's transformers name; a failed check when one has none."""
    modules = list(adapter.low_rank)
    if adapter.naming == "hf":
        return {m: m for m in modules}
    try:
        rename, _ = renamer(
            modules, base.model_type, base.path / "config.json", name_map, reverse=True
        )
        return {m: rename(m) for m in modules}
    except Refused as e:
        return Check("names", "failed", str(e))


def _complete(adapter: Adapter, base: Base) -> list[Check]:
    """Modules that the config selects in this base but the file has no tensors for, and the reverse."""
    if adapter.method == "full" or not base.has_weights:
        return []
    linear = [
        n.removesuffix(".weight")
        for n, t in base.tensors.items()
        if n.endswith(".weight") and len(t.shape) == 2
    ]
    if adapter.format == "peft":
        chosen = peft_config.targeted(adapter.config, linear, adapter.path)
        wanted = {m for m, hit in zip(linear, chosen, strict=True) if hit}
    elif adapter.config["lora_parameters"].get("keys") is None:
        return []
    else:
        wanted = {
            m for m, hit in mlx_keys.selects(adapter.config, linear, base.layers).items() if hit
        }
    missed = sorted(set(adapter.low_rank) - wanted)
    if missed and adapter.format == "mlx":
        what = "keys and num_layers don't select it in this base: mlx-lm refuses the folder"
        return [Check("targets", "failed", what, missed[0])]
    absent = sorted(wanted - set(adapter.low_rank))
    if absent:
        what = f"the config selects {several(absent)} but the file has no tensors for it: it has no effect"
        return [Check("targets", "warning", what)]
    return [
        Check("targets", "passed", f"the config selects exactly the {len(wanted)} adapted modules")
    ]


def _identity(adapter: Adapter, base: Base) -> Check:
    """Whether this is the base the adapter was trained on, as far as files can tell."""
    recorded = adapter.base.kin
    if recorded and base.has_weights and base.kin:
        alike = correlation(recorded, base.kin)
        if alike is not None:
            status = "passed" if alike >= 0.99 else "failed"
            return Check(
                "identity",
                status,
                f"sampled weights correlate {alike:.4f} with the recorded base's",
            )
    name = adapter.base.name
    own = base.config.get("_name_or_path")
    known = {str(own or ""), base.path.name, str(base.path)}
    if name and (name in known or Path(name).name.lower() == base.path.name.lower()):
        return Check("identity", "passed", f"named {name}, as the base is")
    if name:
        return Check(
            "identity",
            "warning",
            f"the adapter names its base {name!r}; whether {base.path.name!r} is that can't be told"
            " from the files (a conversion with --base records it)",
        )
    return Check("identity", "warning", "the adapter does not name its base")


def _config(base: Base) -> Check:
    """The trap of rope settings that only one runtime reads."""
    missing = misread_fields(base.config)
    if missing:
        fields = ", ".join(f"{k}={v}" for k, v in missing.items())
        return Check(
            "config",
            "warning",
            f"{base.path / 'config.json'} has {fields} only inside rope_parameters, which most of"
            " mlx-lm's models don't read; --fix-base-config writes both forms",
        )
    return Check("config", "passed", "rope settings stand in the forms that both runtimes read")
