"""Numbers as torch's CPU generator draws them by a seed, without torch (torch 2.13).

The generator is the Mersenne twister, seeded as in its reference implementation.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

_CHUNK = 16  # values that ATen/native/cpu/DistributionTemplates.h:normal_fill makes together


@functools.lru_cache(maxsize=4096)  # asked for every place, of every module
def first_normals(n: int, seed: int) -> Any:
    """The first values (at most 16) of ``torch.normal(0.0, 1.0, (n,))``, to about 1e-6.

    Fewer than 16 are drawn one by one, from doubles (core/DistributionsHelper.h): the first two are
    given. Else 16 uniform numbers make 16 normal ones, and the last 16 of all are drawn again where
    16 does not divide n.
    """
    source = np.random.RandomState(seed)
    if n < _CHUNK:
        high, low, high2, low2 = (int(x) for x in source.randint(0, 1 << 32, 4, dtype=np.uint32))
        one, two = ((h << 32 | x) % (1 << 53) / 2**53 for h, x in ((high, low), (high2, low2)))
        radius, angle = math.sqrt(-2 * math.log1p(-two)), 2 * math.pi * one
        return np.array([radius * math.cos(angle), radius * math.sin(angle)])[:n]

    def uniform(count: int) -> Any:
        return source.randint(0, 1 << 32, count, dtype=np.uint32) % (1 << 24) / 2**24

    if n >= 2 * _CHUNK:  # what is drawn again lies behind
        return _normals(uniform(_CHUNK))
    values = np.zeros(n)
    values[:_CHUNK] = _normals(uniform(n)[:_CHUNK])
    if n % _CHUNK:
        values[n - _CHUNK :] = _normals(uniform(_CHUNK))
    return values[:_CHUNK]


def _normals(uniform: Any) -> Any:
    """Box and Muller, of eight numbers with the next eight."""
    half = _CHUNK // 2
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
