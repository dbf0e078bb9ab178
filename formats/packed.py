"""What stock mlx-lm can't adapt on a base that it has packed (quantised).

Read in mlx-lm 0.32.2 and run: LoRA is right at 2, 3, 4, 5, 6 and 8 bits. DoRALinear.from_base
(tuner/dora.py) takes a packed layer's inputs for columns * (32 // bits), which at 3, 5 and 6 bits is
too few: training fails in the forward pass, and load_adapters refuses the shapes. DoRA on a packed
embedding fails always; no adapter with DoRA on an embedding is carried at all. With
quantize_activations (config.json) linear layers become QQLinear, which to_lora has no case for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraduct.adapter import Adapter, LowRank, Note
from loraduct.errors import Refused
from loraduct.formats import mlx_lists

if TYPE_CHECKING:
    from loraduct.formats.base import Base

_ODD_BITS = re.compile(r"(?<!\d)([356])[-_ ]?bit", re.IGNORECASE)
_WAY_OUT = "use a base of 2, 4 or 8 bits, or one that is not packed"


def unfit(adapter: Adapter, base: Base) -> list[Refused]:
    """The updates, by mlx-lm's names, that it can't put on this base."""
    if base.quantization is None:
        return []
    found = []
    for module, u in adapter.low_rank.items():
        if what := _why(module, u, base):
            found.append(Refused(adapter.weights, what, tensor=u.a.name))
    return found


def _why(module: str, u: LowRank, base: Base) -> str | None:
    bits = base.packed_bits(mlx_lists.whole(module))
    if bits is None:
        return None
    if u.magnitude is not None and 32 % bits:
        return (
            f"is DoRA on a weight that the base {base.path} has packed in {bits} bits: mlx-lm"
            f" counts {32 // bits} values in 32 bits there, so its DoRA layer has other shapes and"
            f" refuses the adapter; {_WAY_OUT}"
        )
    if u.layout == "linear" and base.config.get("quantize_activations"):
        return (
            f"adapts a linear layer of the base {base.path}, whose quantize_activations is set:"
            " mlx-lm can't adapt such layers (QQLinear); take it out of the base's config.json"
        )
    return None


def hints(adapter: Adapter) -> list[Note]:
    """The same of DoRA by what the base is called or was said to be, where it is not at hand."""
    texts = [adapter.base.name or "", adapter.base.quantization or ""]
    match = next((m for t in texts if (m := _ODD_BITS.search(t))), None)
    if adapter.method != "dora" or match is None:
        return []
    return [
        Note(
            "dora-packed-base",
            f"DoRA, and a base said to be of {match[1]} bits: if mlx-lm packed it, mlx-lm can't"
            f" load DoRA on it (32 // {match[1]} in tuner/dora.py); {_WAY_OUT}",
        )
    ]
