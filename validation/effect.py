"""What is left of an adapter's effect on the logits in another form of it.

Of each position the mean over the vocabulary is taken off first: softmax does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.formats import read
from loraduct.formats.base import Base
from loraduct.formats.options import ReadOptions
from loraduct.validation import runtimes


class Effect:
    """Logits with an adapter less those of the base alone, in the adapter's own runtime."""

    def __init__(self, base: Base, path: Path, prompts: Sequence[str] = runtimes.PROMPTS) -> None:
        """Raises Refused for a base without weights, RuntimeFailed where a library refuses."""
        if not base.has_weights:
            raise Refused(base.path, "holds no weights to measure the effect on logits with")
        self.base = base
        self.ids, _ = runtimes.tokenize(base, prompts)
        self.options = ReadOptions(restore=False, base=base)
        self.runtime = runtimes.RUNTIME[read(path, self.options).format]
        self.alone = runtimes.run(self.runtime, base, None, self.ids, 0).logits
        self.whole = self._of(path)

    def _of(self, path: Path) -> list[Any]:
        adapter = read(path, self.options)
        with_it = runtimes.run(self.runtime, self.base, adapter, self.ids, 0).logits
        moved = [x.astype("float64") - y for x, y in zip(with_it, self.alone, strict=True)]
        return [m - m.mean(-1, keepdims=True) for m in moved]

    def cosine(self, path: Path) -> float:
        """Of the effect of the adapter in ``path`` with the first one's, over all positions."""
        import numpy as np

        other = self._of(path)
        inner, one, two = (
            sum(float(np.vdot(x, y)) for x, y in zip(a, b, strict=True))
            for a, b in ((self.whole, other), (self.whole, self.whole), (other, other))
        )
        return inner / (one * two) ** 0.5 if one and two else float(one == two)
