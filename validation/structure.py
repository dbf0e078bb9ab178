"""An adapter against its base, without running either: names, shapes, values, identity."""

from __future__ import annotations

import math
from dataclasses import replace

from loraduct.adapter import Adapter
from loraduct.errors import Refused
from loraduct.formats import mlx_keys, packed, peft_config
from loraduct.formats.base import Base, differences
from loraduct.formats.experts import wrong_experts
from loraduct.modules import kind_of_module
from loraduct.text import several
from loraduct.validation import declared
from loraduct.validation.align import NameMap, base_names, hf_names, in_live_model
from loraduct.validation.checks import Check
from loraduct.validation.suites import Context, Suite, suite


def run(context: Context) -> Suite:
    """The suite: each adapter by itself."""
    labels = ["A", "B"] if len(context.adapters) == 2 else [None]
    checks, numbers = [], []
    for label, adapter in zip(labels, context.adapters, strict=True):
        checks += check(adapter, context.base, context.names, label)
        tensors = list(adapter.tensors())
        numbers.append(
            {
                "path": str(adapter.path),
                "tensors": len(tensors),
                "values": sum(math.prod(t.shape) for t in tensors),
                "dtypes": sorted({t.dtype for t in tensors}),
            }
        )
    return suite("structure", checks, {"adapters": numbers})


def check(
    adapter: Adapter, base: Base, names: NameMap | None = None, label: str | None = None
) -> list[Check]:
    """All structural checks of one adapter; ``label`` says which of two it is."""
    found = [
        _finite(adapter),
        *_names_and_shapes(adapter, base, names),
        *_complete(adapter, base),
        *_on_packed(adapter, base),
        *declared.check(adapter, base),
        *(
            Check("trap", "warning", n.text)
            for n in adapter.notes
            if n.kind != "base-precision-unknown"
        ),
    ]
    return [replace(c, adapter=label) for c in found]


def _finite(adapter: Adapter) -> Check:
    """No NaN, no Inf: some attention kernels hide a NaN, so logits are no substitute."""
    count = 0
    for tensor in adapter.tensors():
        count += 1
        try:
            for _ in tensor.chunks():
                pass
        except Refused:
            return Check("values", "failed", "holds NaN or Inf", tensor.name)
    dtypes = sorted({t.dtype for t in adapter.tensors()})
    return Check("values", "passed", f"{count} tensors, {', '.join(dtypes)}, no NaN, no Inf")


def _names_and_shapes(adapter: Adapter, base: Base, names: NameMap | None) -> list[Check]:
    if not base.has_weights:
        what = "names and shapes were not compared: the base has no weights (model*.safetensors)"
        blocks = (Check("shapes", "failed", str(p)) for p in differences(adapter, base)[:1])
        return [Check("names", "skipped", what), *blocks]
    to_base = hf_names(adapter, base, names)
    if isinstance(to_base, Check):
        return [to_base]
    plain = base_names(adapter, base, to_base) | {m: m for m in adapter.dense}
    shapes = {m: _shape(adapter, base, f"{n}.weight") for m, n in plain.items()}
    shapes |= {n: _shape(adapter, base, n) for n in adapter.replacements}
    absent = [n for n, shape in shapes.items() if shape is None]
    if absent:
        what = f"the base has no such weight ({len(absent)} in all)"
        weight = absent[0] if absent[0] in adapter.replacements else f"{plain[absent[0]]}.weight"
        if base.weight_of(weight) is not None:
            what += "; where embeddings are tied, mlx-lm has no head of its own to adapt"
        return [Check("names", "failed", what, absent[0])]
    fused = len(adapter.updates) - len(shapes)
    what = f"all {len(shapes)} are in the base"
    what += f"; {fused} of experts, by the architecture's table" if fused else ""
    found = [Check("names", "passed", what)]
    for problem in [*differences(adapter, base), *wrong_experts(adapter, base)]:
        return [*found, Check("shapes", "failed", str(problem))]
    for name, replacement in adapter.replacements.items():
        if replacement.weight.shape != shapes[name]:
            what = (
                f"shape {list(replacement.weight.shape)}, the base has {list(shapes[name] or ())}"
            )
            return [*found, Check("shapes", "failed", what, name)]
    return [*found, Check("shapes", "passed", "all fit the base's weights")]


def _shape(adapter: Adapter, base: Base, parameter: str) -> tuple[int, ...] | None:
    """Shape of the base's parameter, unpacked if it is a packed matrix; None when there is none.

    A tied head is a module in torch; mlx-lm has none, and refuses an adapter on it.
    """
    if adapter.naming == "mlx" and parameter not in base.tensors:
        return None
    weight = base.weight_of(parameter)
    if weight is None or not parameter.endswith(".weight") or len(weight.shape) != 2:
        return weight.shape if weight else None
    return base.shape_of(parameter.removesuffix(".weight"))


def _complete(adapter: Adapter, base: Base) -> list[Check]:
    """Modules that the config selects in this base but the file has no tensors for, and the reverse."""
    if adapter.method == "full" or not base.has_weights or adapter.format == "coreml":
        return []  # in a package the program says what is adapted
    if adapter.format == "peft":
        linear = _linear_in_torch(adapter, base)
        chosen = peft_config.targeted(adapter.config, linear, adapter.path)
        wanted = {m for m, hit in zip(linear, chosen, strict=True) if hit}
    elif adapter.config["lora_parameters"].get("keys") is None:
        return []
    else:
        # experts have other names in the base's file: the adapter's own modules are asked too
        known = {*in_live_model(base.linear_modules, adapter, base), *adapter.low_rank}
        selected = mlx_keys.selects(adapter.config, known, base.layers)
        wanted = {m for m, hit in selected.items() if hit}
    missed = sorted(adapter.adapted - wanted)
    if missed and adapter.format == "mlx":
        what = "keys and num_layers don't select it in this base: mlx-lm refuses the folder"
        return [Check("targets", "failed", what, missed[0])]
    absent = sorted(wanted - adapter.adapted)
    if absent:
        what = f"the config selects {several(absent)} but the file has no tensors for it: "
        if adapter.format == "peft" and adapter.config.get("init_lora_weights") is False:
            what += (
                "init_lora_weights is false, so PEFT fills in random numbers; set it to true, or"
                " narrow target_modules"
            )
            return [Check("targets", "failed", what, absent[0])]
        return [Check("targets", "warning", f"{what}it has no effect")]
    return [
        Check("targets", "passed", f"the config selects exactly the {len(wanted)} adapted modules")
    ]


def _on_packed(adapter: Adapter, base: Base) -> list[Check]:
    """What mlx-lm can't put on a base that it has packed."""
    problems = packed.unfit(adapter, base) if adapter.naming == "mlx" else []
    if not problems:
        return []
    return [Check("packed", "failed", f"{problems[0]} ({len(problems)} in all)")]


def _linear_in_torch(adapter: Adapter, base: Base) -> list[str]:
    """The modules that PEFT looks through; all-linear leaves out the embedding and the head."""
    tied = {"lm_head"} if base.weight_of("lm_head.weight") is not None else set()
    modules = sorted(in_live_model(base.linear_modules, adapter, base) | tied)
    if adapter.config.get("target_modules") != "all-linear":
        return modules
    return [m for m in modules if kind_of_module(m) not in ("embedding", "output head")]
