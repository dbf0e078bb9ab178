"""How much rounding of a given size moves the logits: the source run again, shaken by that much."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.files import write_file
from loraduct.formats import CONFIG, json_file
from loraduct.formats.safetensors_file import read_header, serialized
from loraduct.tensor import FLOATS, Tensor
from loraduct.validation import runtimes
from loraduct.validation.runs import Runs

SEED = 0


def logits(adapter: Adapter, kind: str, runs: Runs, size: float) -> Sequence[Any] | None:
    """Logits of the adapter with noise in its factors that moves dW by about ``size`` (relative).

    Noise of size/sqrt(2) in a and in b adds up to that in b @ a. None where it isn't a safetensors
    file that a stock library loads as it is.
    """
    import numpy as np

    if adapter.weights.suffix != ".safetensors" or not runtimes.usual_weights(adapter):
        return None
    if adapter.format not in ("peft", "mlx"):
        return None
    rng = np.random.default_rng(SEED)
    stored, texts = read_header(adapter.weights)
    shaken = {}
    for name, t in stored.items():
        if t.dtype in FLOATS:
            noise = rng.standard_normal(t.shape, np.float32) * np.float32(size / math.sqrt(2))
            values = t.read() * (1 + noise)
            t = Tensor(name, "F32", t.shape, data=values.astype(np.float32))
        shaken[name] = t
    with tempfile.TemporaryDirectory(prefix="loraduct-") as room:
        folder = Path(room)
        file = folder / adapter.weights.name
        write_file(file, serialized(shaken, texts, {}))
        write_file(folder / CONFIG, [json_file.dump(adapter.config)])
        copy = replace(adapter, path=folder, weights=file)
        found: list[Any] = runtimes.use(
            kind, runs.base, copy, lambda model: [model.logits(i) for i in runs.ids]
        )
    return found
