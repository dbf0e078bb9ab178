"""Tables of a real model's weights against exact optima (coremltools' own solver)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraduct.converters.palette import Options, expand
from loraduct.converters.palettize import palettize
from loraduct.formats import safetensors_file

kmeans1d = pytest.importorskip("coremltools._deps.kmeans1d")
MODEL = Path(__file__).resolve().parents[2] / ".cache/smollm2-135m-instruct/model.safetensors"
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not MODEL.exists(), reason="make demo sets up the base model"),
]


def matrices(part: str) -> list[Any]:
    return [
        np.fromfile(MODEL, np.float16, t.shape[0] * t.shape[1], offset=t.offset).reshape(t.shape)
        for name, t in safetensors_file.read_header(MODEL)[0].items()
        if len(t.shape) == 2 and part in name
    ]


def exact(w: Any, bits: int) -> float:
    """Squared error of the optimum as coremltools stores it: a table in w's dtype, its own indices."""
    values, counts = np.unique(w, return_counts=True)
    wide = values.astype(np.float64)
    found = kmeans1d.cluster(wide, min(1 << bits, len(wide)), weights=counts)
    table = np.array(found.centroids).astype(w.dtype).astype(np.float64)
    return float((counts * (wide - table[found.clusters]) ** 2).sum())


@pytest.mark.parametrize("part", ["layers.0.", "layers.6.", "layers.12.", "layers.29.", "embed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_per_tensor(part: str, bits: int) -> None:
    for w in matrices(part):
        limit = 1.00001 if bits <= 4 else 1.001
        assert palettize(w, Options(bits)).error <= limit * exact(w, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_float32(bits: int) -> None:
    """Numbers that float16 does not have: they are binned while they are clustered."""
    rng = np.random.default_rng(bits)
    for w in matrices("layers.6.self_attn.k"):
        noise = rng.normal(0, 0.05 * float(w.std(dtype=np.float64)), w.shape)
        wide = (w + noise).astype(np.float32)
        limit = 1.00001 if bits <= 4 else 1.001
        assert palettize(wide, Options(bits, lut="float32")).error <= limit * exact(wide, bits)


@pytest.mark.parametrize("part", ["layers.0.mlp.down", "layers.10.self_attn.q", "layers.29.mlp.up"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_groups_of_16(part: str, bits: int) -> None:
    (whole,) = matrices(part)
    w = np.ascontiguousarray(whole[:: len(whole) // 16 // 4][:64])  # four groups
    found = palettize(w, Options(bits, group=16))
    gap = w.astype(np.float64) - expand(found).astype(np.float64)
    best = sum(exact(w[at : at + 16], bits) for at in range(0, 64, 16))
    assert (gap * gap).sum() <= (1.0005 if bits <= 4 else 1.01) * best
