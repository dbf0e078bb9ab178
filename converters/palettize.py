"""Lookup tables: a tensor as indices of 1 to 8 bits into small tables of values.

One table for the tensor, or one for each group of channels along an axis. Entries are stored rounded,
and every number gets the index of the entry that is nearest to it as stored. Errors are squared, and
may be weighted: by input channel, with the second moment of the activations that will be multiplied
with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from loraduct.converters import lut, scaled, vectors
from loraduct.converters.palette import BITS, MIL, Options, Palette
from loraduct.errors import Refused

TOGETHER = 8
_FLOOR = 1e-9  # an unused channel counts this share of the mean, not nothing


def palettize(
    weight: Any,
    options: Options,
    *,
    importance: Any = None,
    threads: int = 1,
    name: str | None = None,
) -> Palette:
    """The tensor (float16, float32, bfloat16 or uint16 codes; rank 1 or more) as tables and indices.

    ``importance`` (shape[1],): what squared errors count, per input channel. ``threads``: for groups.
    Raises Refused, naming ``name``, for NaN, Inf, empty tensors, scalars, groups that don't divide,
    entries beyond the tables' dtype, and `unique` with too many values.
    """
    shape = tuple(weight.shape)
    check(shape, options, name)
    weights = per_axis(shape, importance, name)
    if options.vector > 1:
        return vectors.palettize(weight, options, weights, name)
    if options.scaled:
        return scaled.palettize(weight, options, weights, threads, name)
    return lut.flat(weight, options, weights, threads, name)


def palettize_all(
    tensors: Iterable[tuple[str, Any]], options: Options, *, threads: int = 1
) -> Iterator[tuple[str, Palette]]:
    """``palettize`` of many tensors (name, weight), in order; faster where each has one table.

    TOGETHER tensors are held at once. Raises what ``palettize`` raises.
    """
    if options.mode != "kmeans" or options.group or options.scaled or options.vector > 1:
        for name, weight in tensors:
            yield name, palettize(weight, options, threads=threads, name=name)
        return
    rest = iter(tensors)
    while batch := list(islice(rest, TOGETHER)):
        for name, weight in batch:
            check(tuple(weight.shape), options, name)
        yield from lut.together(batch, options, threads)


def per_axis(shape: tuple[int, ...], importance: Any, name: str | None) -> list[Any] | None:
    """One vector of weights per axis: ``importance`` for axis 1, ones elsewhere.

    Raises Refused unless it has a number, not negative, for each channel of axis 1.
    """
    import numpy as np

    if importance is None:
        return None
    given = np.asarray(importance, np.float64)
    if len(shape) < 2 or given.shape != (shape[1],):
        raise Refused(
            None, f"has shape {list(shape)}, importance has {list(given.shape)}: one number per"
            " channel of axis 1 is expected", tensor=name
        )  # fmt: skip
    if not np.isfinite(given).all() or (given < 0).any():
        raise Refused(None, "has an importance that is negative, NaN or Inf", tensor=name)
    along = [np.ones(n) for n in shape]
    along[1] = given + _FLOOR * (given.mean() or 1.0)
    return along


def check(shape: tuple[int, ...], options: Options, name: str | None) -> None:
    """Raises Refused for what no table can be made of."""
    wrong = [
        (options.mode not in lut.TABLES, f"--mode {options.mode}: one of {', '.join(lut.TABLES)}"),
        (
            options.bits not in BITS and not (options.mode == "unique" and options.bits is None),
            f"{options.bits} bits: tables have {', '.join(map(str, BITS))}",
        ),
        (options.lut not in MIL, f"tables of {options.lut}: one of {', '.join(MIL)}"),
        (not shape, "is a scalar"),
        (0 in shape, f"of shape {list(shape)} holds no values"),
        (options.vector < 1 or options.group < 0, "groups and entries have positive lengths"),
    ]
    for bad, what in wrong:
        if bad:
            raise Refused(None, what, tensor=name)
    if not -len(shape) <= options.axis < len(shape):
        raise Refused(None, f"of shape {list(shape)} has no axis {options.axis}", tensor=name)
    channels = shape[options.axis]
    if options.group and channels % options.group and not options.ragged:
        raise Refused(
            None,
            f"has {channels} channels on axis {options.axis}, which groups of {options.group}"
            " don't divide",
            tensor=name,
        )
