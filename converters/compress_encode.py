"""Many tensors in few bits, some side by side: in processes where they can be forked, else in threads.

Steps of k-means are short, so threads wait for Python's lock more than they compute: two of them need
longer than one (on SmolLM2 13 seconds against 11; two processes need 7).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from loraduct.converters import palettize, quantize
from loraduct.converters.compress_code import Found, Way, digest, linear, tables
from loraduct.converters.compress_sites import Weight

TOGETHER = 1 << 23  # numbers of tensors that are clustered together, at most
AHEAD = 1 << 26  # numbers of tensors that are being encoded, or wait to be written
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Item:
    """A tensor to be encoded. ``read`` gives its values; ``importance`` (input channels,), what
    squared errors count."""

    weight: Weight
    way: Way
    read: Callable[[], Any]
    importance: Any = None


@dataclass(frozen=True)
class _Task:
    """Items of one way, as another process can have them: names, dtype, values, what errors count."""

    way: Way
    kind: str
    names: list[str]
    values: list[Any]
    importance: Any


def coded(items: Iterable[Item], workers: int) -> Iterator[tuple[Found, int]]:
    """The tensors in few bits and the digests of what they stand for, in order.

    As many are encoded side by side as there are workers, while others wait to be written; small
    neighbours with one table each are clustered together.
    """
    waiting: deque[tuple[Future[list[tuple[Found, int]]], int]] = deque()
    held, pool = 0, _pool(workers)
    try:
        for batch in _batches(items):
            size = sum(item.weight.count for item in batch)
            while waiting and held + size > AHEAD:
                first, count = waiting.popleft()
                yield from _taken(first)
                held -= count
            waiting.append((pool.submit(_encoded, _task(batch)), size))
            held += size
        while waiting:
            yield from _taken(waiting.popleft()[0])
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    """Processes if nothing else runs in this one, for then a fork is safe; else threads."""
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    if workers > 1 and alone and sys.platform == "linux":
        parent = os.getpid()
        return ProcessPoolExecutor(
            workers, get_context("fork"), initializer=_begin, initargs=(parent,)
        )
    return ThreadPoolExecutor(workers)


def _begin(parent: int) -> None:
    """A worker leaves interrupts to its parent, and ends with it however that ends."""
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _taken(future: Future[list[tuple[Found, int]]]) -> Iterator[tuple[Found, int]]:
    """What a batch gave, each tensor forgotten here once it is handed out."""
    found = future.result()
    del future
    found.reverse()
    while found:
        yield found.pop()


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        if batch and not _beside(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _beside(batch: Sequence[Item], item: Item) -> bool:
    """Whether a tensor is clustered with those of a batch."""
    first, way = batch[0], item.way
    alike = way == first.way and item.weight.dtype == first.weight.dtype
    plain = replace(way, bits=0) == Way("lut", 0) and item.importance is None
    size = sum(i.weight.count for i in [*batch, item])
    return alike and plain and first.importance is None and size <= TOGETHER and (
        len(batch) < palettize.TOGETHER
    )  # fmt: skip


def _task(batch: Sequence[Item]) -> _Task:
    first = batch[0]
    return _Task(
        first.way,
        first.weight.dtype.lower(),
        [item.weight.name for item in batch],
        [item.read() for item in batch],
        first.importance,
    )


def _encoded(task: _Task) -> list[tuple[Found, int]]:
    way, name, (first, *others) = task.way, task.names[0], task.values
    if way.kind == "int":
        options = linear(way, task.kind)
        made: list[Found] = [
            quantize.quantize(first, options, importance=task.importance, name=name)
        ]
    elif not others:
        options_ = tables(way, task.kind)
        made = [palettize.palettize(first, options_, importance=task.importance, name=name)]
    else:
        tensors = zip(task.names, task.values, strict=True)
        made = [found for _, found in palettize.palettize_all(tensors, tables(way, task.kind))]
    return [(found, digest(found)) for found in made]
