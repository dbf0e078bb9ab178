"""What is asked of a model in its runtime, and MLX's part of it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

AT_ONCE = 2  # rows, on MLX's CPU backend, where one takes a core
WIDTH = 200  # arrays that MLX queues breadth first; of its 20 one row fills nearly all


@dataclass(frozen=True)
class Loaded:
    """A model in its runtime: ``logits(ids)`` (tokens, vocabulary) float32, and ``greedy(ids, n)``,
    the n likeliest tokens after them. ``several``: logits of a few rows at once, where that is faster."""

    logits: Callable[[Sequence[int]], Any]
    greedy: Callable[[Sequence[int], int], list[int]]
    several: Callable[[Sequence[Sequence[int]]], list[Any]] | None = None

    def each(self, rows: Sequence[Sequence[int]]) -> Iterator[Any]:
        """``logits`` of row after row."""
        if self.several is None:
            yield from map(self.logits, rows)
            return
        for start in range(0, len(rows), AT_ONCE):
            yield from self.several(rows[start : start + AT_ONCE])


def of_mlx(model: Any) -> Loaded:
    """What is asked of a model of mlx-lm's."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache

    streams = cpu_streams()

    def several(rows: Sequence[Sequence[int]]) -> list[Any]:
        found = []
        for stream, ids in zip(streams or [None] * len(rows), rows, strict=False):
            with mx.stream(stream) if stream else contextlib.nullcontext():
                found.append(model(mx.array([list(ids)]))[0].astype(mx.float32))
        mx.eval(*found)
        return [np.array(z) for z in found]

    def logits(ids: Sequence[int]) -> Any:
        return several([ids])[0]

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        step, cache = mx.array([list(ids)]), make_prompt_cache(model)
        for _ in range(count):
            out = model(step, cache=cache)
            found.append(int(out[0, -1].argmax()))
            step = mx.array([[found[-1]]])
        return found

    return Loaded(logits, greedy, several if streams else None)


def alternate() -> None:
    """Let MLX's queue alternate between the rows of `cpu_streams`, or their cores wait for each other.

    MLX reads the variable once, before it first computes.
    """
    if platform.system() != "Darwin":
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", str(WIDTH))


def cpu_streams() -> list[Any]:
    """Where MLX has but a CPU: streams, each of which computes on a core of its own; else none."""
    import mlx.core as mx

    if mx.default_device().type != mx.cpu:
        return []
    return [mx.new_stream(mx.cpu) for _ in range(AT_ONCE)]
