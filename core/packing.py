"""Values of 1 to 8 bits as a little-endian stream of bits, low bits first, and back.

So Core ML stores indices (coremltools 9.0, ``constexpr_lut_to_dense`` of iOS16, and weight files), and
so MLX packs weights into uint32 (mlx 0.32.4), 3, 5 and 6 bits included.

Neighbours are joined two by two in words of twice the width, until a word's bits are whole bytes:
a few passes over the data instead of one byte per bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_LOOKED_UP = {1: 8, 2: 8, 3: 12, 4: 8, 6: 12}  # bits -> of a word that holds some whole
_STEPS = {1: 3, 2: 2, 3: 3, 4: 1, 5: 3, 6: 2, 7: 3, 8: 0}  # bits -> doublings to whole bytes
_WORDS = ("<u1", "<u2", "<u4", "<u8")
BLOCK = 1 << 16  # values at once: what is computed on the way stays in the cache


def packed(values: Any, bits: int) -> Any:
    """``values`` (any shape, uint8, < 2**bits) as bytes (ceil(n * bits / 8),); the last is filled
    with zero bits."""
    import numpy as np

    flat = np.ascontiguousarray(values, np.uint8).reshape(-1)
    size = -(-flat.size * bits // 8)
    if bits == 8:
        return flat
    out = np.empty(size, np.uint8)
    for at in range(0, flat.size, BLOCK):
        block = _joined(flat[at : at + BLOCK], bits)
        into = out[at * bits // 8 : (at + BLOCK) * bits // 8]
        into[:] = block[: into.size]
    return out


def _joined(flat: Any, bits: int) -> Any:
    import numpy as np

    steps = _STEPS[bits]
    if rest := -flat.size % (1 << steps):
        flat = np.concatenate((flat, np.zeros(rest, np.uint8)))
    words, width, used = flat, 8, bits
    for word in _WORDS[1 : steps + 1]:
        words = words.view(word)
        low = (1 << used) - 1
        words = (words & low) | ((words >> (width - used)) & (low << used))
        width, used = 2 * width, 2 * used
    return words.view(np.uint8).reshape(-1, width // 8)[:, : used // 8].reshape(-1)


def unpacked(stream: Any, bits: int, count: int, *, signed: bool = False) -> Any:
    """``count`` values (uint8, or int8 if ``signed``) from the bytes that ``packed`` makes.

    A byte, or 12 bits of a stream of 3 or 6, are looked up: all values in them at once.
    """
    import numpy as np

    stream = np.frombuffer(stream, np.uint8)
    if bits == 8:
        return stream[:count].view(np.int8 if signed else np.uint8)
    if bits not in _LOOKED_UP:
        return _apart(stream, bits, count)
    wide = _LOOKED_UP[bits]
    table = _values_in(wide, bits, signed)
    out = np.empty((-(-stream.size * 8 // wide) + 1, wide // bits), table.dtype)
    into = out.reshape(-1).view(f"<u{wide // bits}")
    step = 3 << 14
    for at in range(0, stream.size, step):
        words = stream[at : at + step]
        if wide == 12:
            three = np.zeros((-(-words.size // 3), 3), np.uint16)
            three.reshape(-1)[: words.size] = words
            low, mid, high = three.T
            words = np.stack((low | (mid & 15) << 8, mid >> 4 | high << 4), 1).reshape(-1)
        begin = at * 8 // wide
        part = into[begin : begin + words.size]
        part[:] = table.view(into.dtype).reshape(-1)[words[: part.size]]
    return out.reshape(-1)[:count]


@cache
def _values_in(wide: int, bits: int, signed: bool) -> Any:
    """(2**wide, wide / bits): the values in a word, the low bits first."""
    import numpy as np

    shifts = np.arange(0, wide, bits, dtype=np.uint16)
    found = (np.arange(1 << wide, dtype=np.uint16)[:, None] >> shifts) & ((1 << bits) - 1)
    if not signed:
        return np.ascontiguousarray(found, np.uint8)
    sign = 1 << (bits - 1)
    return ((found ^ sign).astype(np.int16) - sign).astype(np.int8)


def _apart(stream: Any, bits: int, count: int) -> Any:
    """The way back from `_joined`, for the widths that no word of 8 or 12 bits holds whole (5, 7)."""
    import numpy as np

    steps = _STEPS[bits]
    width, used = 8 << steps, bits << steps
    each = used // 8
    words = -(-stream.size // each)
    whole = np.zeros(words * each, np.uint8)
    whole[: stream.size] = stream
    wide = np.zeros((words, width // 8), np.uint8)
    wide[:, :each] = whole.reshape(words, each)
    values = wide.view(_WORDS[steps]).reshape(-1)
    for word in reversed(_WORDS[:steps]):
        width, used = width // 2, used // 2
        low = (1 << used) - 1
        values = ((values & low) | ((values >> used) & low) << width).view(word)
    return values[:count]
