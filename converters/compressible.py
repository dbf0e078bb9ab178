"""What is left as it is unless asked for: small, or so that a little error there costs much."""

from __future__ import annotations

import math
import re

SMALL = 2048  # numbers; below, tables and scales cost what they save
_WORDS = re.compile(r"[a-z]+|[0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# words of a name -> why
_NAMED = {
    "rotation table": {"rope", "rotary", "inv", "freq", "freqs", "cos", "sin"},
    "mask": {"mask", "masks", "causalmask"},
    "positions": {"position", "positions"},
    "norm": {"norm", "layernorm", "rmsnorm", "ln", "groupnorm"},
    "bias": {"bias"},
    "integers": {"ids"},
}
_ENDS = ("norm",)  # input_layernorm, q_norm, ...


def left_alone(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a parameter of this name and shape is not compressed, or None if it is.

    Names are read word by word, whatever parts them: dots, underscores, capitals.
    """
    words = _WORDS.findall(_CAMEL.sub(" ", name).lower())
    for reason, known in _NAMED.items():
        if known.intersection(words) or (
            reason == "norm" and any(word.endswith(_ENDS) for word in words)
        ):
            return reason
    if sum(n > 1 for n in shape) < 2:
        return "vector"
    count = math.prod(shape)
    return f"small ({count} numbers, fewer than {SMALL})" if count < SMALL else None
