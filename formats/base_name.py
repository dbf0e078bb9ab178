"""What the name of a base model says of its quantisation; adapter files have no field for it."""

from __future__ import annotations

import re

# How quantised bases are named on model hubs.
_QUANTIZED_NAMES = (
    (r"bnb-4bit|nf4", "4-bit bitsandbytes"),
    (r"bnb-8bit", "8-bit bitsandbytes"),
    (r"gptq", "GPTQ"),
    (r"awq", "AWQ"),
    (r"(?<!\d)fp8(?!\d)", "FP8"),
    (r"[-_]4[-_]?bit|int4|[-_]q4", "4-bit"),
    (r"[-_]8[-_]?bit|int8|[-_]q8", "8-bit"),
    (r"[-_]([2356])[-_]?bit", "low-bit"),
)


def quantization_in_name(name: str) -> str | None:
    """What a base's name says of its quantisation."""
    for pattern, what in _QUANTIZED_NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return what
    return None
