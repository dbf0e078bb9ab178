"""An adapter as every builder wants it: transformers' module names, relative to the base as it is."""

from __future__ import annotations

from dataclasses import replace

from loraduct.adapter import Adapter
from loraduct.converters import names
from loraduct.converters.approximate import EXACT, Wanted, approximate
from loraduct.converters.convert import untie
from loraduct.converters.start import undo
from loraduct.errors import Refused
from loraduct.formats import peft_writer
from loraduct.formats.base import Base, differences
from loraduct.formats.experts import wrong_experts


def neutral(adapter: Adapter, base: Base, wanted: Wanted = EXACT, naming: str = "hf") -> Adapter:
    """``adapter`` for ``base``, whatever format and names it came in; ``naming``: to have mlx-lm's.

    Raises Refused when it was made for another base, or can't be had exactly.
    """
    for problem in differences(adapter, base):
        raise problem
    if adapter.config.get("layer_replication"):
        raise Refused(adapter.path, "repeats layers (layer_replication): its base is another one")
    if adapter.config.get("alora_invocation_tokens"):
        what = "is an aLoRA, which acts from its invocation tokens on: convert it with --always-on"
        raise Refused(adapter.path, what)
    adapter = undo(
        replace(
            adapter,
            layers=base.layers or adapter.layers,
            base_modules=base.linear_modules,
            model_type=base.model_type,
        ),
        None,
        base,
    )
    if adapter.dense:
        kept, _ = approximate(adapter, dict(adapter.updates), wanted)
        adapter = replace(adapter, updates=kept)
    given = adapter.naming
    if naming == "mlx" and given == "hf" and adapter.replacements:
        names.check_equal(base.architecture, adapter.weights)
    adapter = names.for_base(adapter, naming, base)[0]
    for problem in wrong_experts(adapter, base):
        raise problem
    return peft_writer.reachable(untie(adapter, base)) if given != naming == "hf" else adapter
