"""Streams of bits against coremltools' packing, and MLX's below."""

from __future__ import annotations

import numpy as np
import pytest

from loraduct.packing import packed, unpacked

ct = pytest.importorskip("coremltools.optimize._utils")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 1000, 70_001, 131_072])
def test_packs_as_coremltools(bits: int, count: int) -> None:
    values = np.random.default_rng(count).integers(0, 1 << bits, count, dtype=np.uint8)
    stream = packed(values, bits)
    np.testing.assert_array_equal(stream, ct.pack_elements_into_bits(values, bits))
    np.testing.assert_array_equal(unpacked(stream, bits, count), values)
