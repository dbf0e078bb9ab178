"""How fast a model will be on a device, from what it reads and computes: a roofline, fitted.

One token of decoding takes (seconds)

    t = a (W + A) / B  +  c K / B  +  d (L + o / 15)

W: bytes of weights; A: bytes of an adapter that is not fused; B: bytes a second; K: bytes of the
cache that are read, which is what the context has filled, or the whole buffer where its size is
fixed; L: blocks; o: operations that the adapter adds. A block is about 15 operations, so an
operation more costs a fifteenth of a block (assumed until measured).

A prompt of n tokens takes

    T = max(n (2 M + 2 n L w) / (e F),  a (W + A) / B)  +  d (L + o / 15)

M: products with weights of one token; w: heads times their dimension, for the attention among
the prompt's tokens; F: operations a second.

The constants a, c, d, e of an engine are fitted to published measurements
(``benchmarks/forecast.py`` fits them, tests them on points that were not fitted, and fails where
they are not those below); `refit` fits them to your own. An interval holds eight of ten of the
points that were not fitted, or is assumed where there are too few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.formats.json_file import parse_object
from loraduct.text import printable
from loraduct.validation.devices import Device, find, is_positive
from loraduct.validation.workload import Workload, from_json

OPERATIONS = 15  # in a block, about: products, norms, rotations, attention, sums
ANE_SHARE = 0.7398  # of its memory's bandwidth that a Neural Engine reads, where nobody measured it
MEASURED = 1  # schema of a file of measurements
_LIMIT = 4 << 20  # bytes of such a file


@dataclass(frozen=True)
class Engine:
    """What runs a model, with its constants; ``decode`` and ``prompt`` are the factors by which a
    measurement may lie above or below, ``source`` where they are from.
    """

    name: str
    what: str
    read: float  # a
    cache: float  # c
    block: float  # d, seconds
    compute: float  # e
    decode: float
    prompt: float
    source: str


GPU, COREML_GPU, ANE = "gpu", "coreml-gpu", "coreml-ane"
ENGINES = {
    GPU: Engine(
        GPU, "MLX or llama.cpp on the GPU", 1.1206, 1.1206, 0.1493e-3, 0.6846, 1.187, 1.240,
        "fitted to 10 published runs of LLaMA 2 7B, tested on 24 others",
    ),
    COREML_GPU: Engine(
        COREML_GPU, "Core ML on the GPU", 1.0965, 8.387, 0.3919e-3, 0.69, 1.3, 1.6,
        "fitted to Apple's table of Llama 3.1 8B on an M1 Max"
        " (machinelearning.apple.com/research/core-ml-on-device-llama); prompts, interval: assumed",
    ),
    ANE: Engine(
        ANE, "Core ML on the Neural Engine", 1.0, 1.0, 0.0, 0.26, 1.6, 1.6,
        "calibrated by Apple's 0.6 ms per prompt token and 30 tokens/s of a 3 B model at 3.7 bits on"
        " an iPhone 15 Pro (machinelearning.apple.com/research/introducing-apple-foundation-models);"
        " cache, interval: assumed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Of one model on one device. ``low`` and ``high``: of tokens per second; ``prompt_low`` and
    ``prompt_high``: of milliseconds per prompt token. ``fits``: None where the memory isn't known.
    """

    target: str
    device: str
    engine: str
    context: int
    ms_per_prompt_token: float
    prompt_low: float
    prompt_high: float
    tokens_per_second: float
    low: float
    high: float
    memory_bytes: int
    fits: bool | None
    source: str
    assumed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "assumed": list(self.assumed)}


def rates(device: Device, engine: Engine) -> tuple[float, float]:
    """(bytes a second, operations a second) that an engine of a device may reach."""
    if engine.name != ANE:
        return device.bandwidth, device.flops
    return device.ane_bandwidth or ANE_SHARE * device.bandwidth, device.ane_ops


def terms(
    load: Workload, device: Device, engine: Engine, context: int
) -> tuple[float, float, float]:
    """What a, c and d are multiplied by in a token of decoding: seconds, seconds, blocks."""
    bandwidth, _ = rates(device, engine)
    cache = load.buffer_bytes or load.cache_bytes * context
    blocks = load.layers + load.adapter_ops / OPERATIONS
    return (load.weight_bytes + load.adapter_bytes) / bandwidth, cache / bandwidth, blocks


def decode_seconds(load: Workload, device: Device, engine: Engine, context: int) -> float:
    """Of one token that is generated behind ``context`` others."""
    read, cache, blocks = terms(load, device, engine, context)
    return engine.read * read + engine.cache * cache + engine.block * blocks


def prompt_seconds(load: Workload, device: Device, engine: Engine, tokens: int) -> float:
    """Of a whole prompt."""
    _, flops = rates(device, engine)
    read, _, blocks = terms(load, device, engine, 0)
    work = _prompt_operations(load, tokens)
    return max(work / (engine.compute * flops), engine.read * read) + engine.block * blocks


def _prompt_operations(load: Workload, tokens: int) -> float:
    """n (2 M + 2 n L w), with what an adapter adds to M."""
    return tokens * (2 * (load.macs + load.adapter_macs) + 2 * tokens * load.layers * load.width)


def forecast(load: Workload, device: Device, engine: Engine, context: int) -> Forecast:
    """One row. ``context``: tokens of the prompt, behind which tokens are generated.

    Raises Refused for what reads no weights.
    """
    _check_reads(load)
    decode = 1 / decode_seconds(load, device, engine, context)
    prompt = prompt_seconds(load, device, engine, context) / context * 1e3
    cache = load.buffer_bytes or load.cache_bytes * context
    memory = load.stored_bytes + load.adapter_bytes + cache
    return Forecast(
        load.name, device.name, engine.name, context,
        prompt, prompt / engine.prompt, prompt * engine.prompt,
        decode, decode / engine.decode, decode * engine.decode,
        memory, None if device.memory is None else memory <= USABLE * device.memory,
        engine.source, tuple(device.assumed),
    )  # fmt: skip


def _check_reads(load: Workload) -> None:
    if not load.weight_bytes:
        what = "holds its weights in no file, or none at all: there is nothing to forecast"
        raise Refused(None, f"{printable(load.name, 200)} {what}")


USABLE = 0.5  # of a phone's memory that an app may use, about (assumed)


def engines_for(load_is_package: bool) -> list[Engine]:
    """The engines that would run a target: a package Core ML's, a folder MLX's."""
    return [ENGINES[n] for n in ((ANE, COREML_GPU) if load_is_package else (GPU,))]


# -- fitting ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One measurement; a value that was not measured is None. ``prompt``: its tokens."""

    load: Workload
    device: Device
    context: int
    prompt: int
    tokens_per_second: float | None
    ms_per_prompt_token: float | None


def least_squares(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Constants >= 0 that minimise the squared relative errors of ``rows @ constants``.

    Every set of columns is tried (there are three), so the best is found. Columns that the rows
    cannot tell apart make a set unusable.
    """
    import numpy as np

    scaled = np.array(rows, np.float64) / np.array(times, np.float64)[:, None]
    columns = range(scaled.shape[1])
    best, found = math.inf, [0.0] * scaled.shape[1]
    for count in range(1, scaled.shape[1] + 1):
        for chosen in itertools.combinations(columns, count):
            part = scaled[:, chosen]
            norms = np.linalg.norm(part, axis=0)
            if not norms.all() or np.linalg.cond(part / norms) > 1e6:
                continue
            x = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
            error = float(np.square(part @ x - 1).sum())
            if (x >= 0).all() and error < best * (1 - 1e-9):
                best = error
                found = [0.0] * scaled.shape[1]
                for i, value in zip(chosen, x, strict=True):
                    found[i] = float(value)
    return found


def fit(engine: Engine, points: Sequence[Point], columns: Sequence[int] = (0, 1, 2)) -> Engine:
    """The engine with constants of decoding fitted to points; ``columns``: of a, c, d.

    A constant that is not fitted keeps its value and takes its part of the time.
    """
    held = (engine.read, engine.cache, engine.block)
    decode = [p for p in points if p.tokens_per_second]
    every = [terms(p.load, p.device, engine, p.context) for p in decode]
    fixed = [sum(r[i] * held[i] for i in range(3) if i not in columns) for r in every]
    times = [1 / (p.tokens_per_second or 1) - f for p, f in zip(decode, fixed, strict=True)]
    found = list(held)
    if decode and min(times) > 0:
        rows = [[r[i] for i in columns] for r in every]
        for i, value in zip(columns, least_squares(rows, times), strict=True):
            found[i] = value
    made = replace(engine, read=found[0], cache=found[1], block=found[2])
    return replace(made, compute=_compute(made, points))


def _compute(engine: Engine, points: Sequence[Point]) -> float:
    """The share of the peak that prompts reach: the geometric mean over the points."""
    logs = []
    for p in points:
        if p.ms_per_prompt_token is None:
            continue
        _, flops = rates(p.device, engine)
        _, _, blocks = terms(p.load, p.device, engine, 0)
        left = p.ms_per_prompt_token / 1e3 * p.prompt - engine.block * blocks
        if left > 0:
            logs.append(math.log(_prompt_operations(p.load, p.prompt) / left / flops))
    return math.exp(sum(logs) / len(logs)) if logs else engine.compute


def errors(engine: Engine, points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Relative errors (forecast / measured - 1) of tokens per second, and of prompt tokens per second."""
    decode = [
        1 / decode_seconds(p.load, p.device, engine, p.context) / p.tokens_per_second - 1
        for p in points
        if p.tokens_per_second
    ]
    prompt = [
        p.ms_per_prompt_token / 1e3 * p.prompt / prompt_seconds(p.load, p.device, engine, p.prompt)
        - 1
        for p in points
        if p.ms_per_prompt_token
    ]
    return decode, prompt


def factor(found: Sequence[float], share: float = 0.8) -> float:
    """The factor up or down that holds ``share`` of the errors, by their rank."""
    logs = sorted(abs(math.log1p(e)) for e in found)
    return math.exp(logs[min(len(logs) - 1, math.ceil(share * len(logs)) - 1)]) if logs else 1.0


# -- your own measurements -------------------------------------------------------------------------


def measured(
    file: Path, load: Workload | None, known: Mapping[str, Device]
) -> tuple[str, list[Point]]:
    """(engine, points) of a file as ``docs/latency.md`` describes it.

    ``load``: what points without a ``load`` of their own were measured with. Raises Refused.
    """
    value = parse_object(read_bytes(file, _LIMIT), file)
    found = value.get("schema")
    if found != MEASURED or isinstance(found, bool):
        what = f"has the schema {printable(repr(found), 40)}, expected {MEASURED}: measure anew"
        raise Refused(file, f"{what} with the program in docs/latency.md")
    engine, rows = value.get("engine"), value.get("points")
    if not isinstance(engine, str) or engine not in ENGINES:
        what = f"has the engine {printable(repr(engine), 40)}, expected {', '.join(ENGINES)}"
        raise Refused(file, what)
    named = value.get("device")
    if not isinstance(named, str):
        raise Refused(file, "names no device")
    try:
        devices = find(named, known)
    except Refused as e:
        raise Refused(file, str(e)) from None
    if len(devices) > 1:
        what = f"has the device {printable(named, 40)!r}: say the one it was measured on"
        raise Refused(file, what)
    if not isinstance(rows, list) or not rows:
        raise Refused(file, "holds no points")
    given = (load, devices[0], ENGINES[engine])
    return engine, [_point(file, i, row, *given) for i, row in enumerate(rows)]


def _point(
    file: Path, i: int, row: Any, load: Workload | None, device: Device, engine: Engine
) -> Point:
    def refuse(what: str) -> Refused:
        return Refused(file, f"point {i}: {what}")

    if not isinstance(row, dict):
        raise refuse("is not an object")

    def number(key: str, *, whole: bool = False) -> Any:
        value: Any = row.get(key)
        if not is_positive(value) or (whole and not isinstance(value, int)):
            raise refuse(f"{key} is {printable(repr(value), 40)}, expected a number above 0")
        return value

    own = row.get("load")
    if own is not None:
        try:
            load = from_json(own)
        except ValueError as e:
            raise refuse(f"load {e}; take one of loads in `bench --device NAME --json`") from None
    if load is None:
        raise refuse("has no load; name the target that was measured")
    given = [k for k in _RATES if row.get(k) is not None]
    if not given:
        raise refuse("has neither tokens_per_second nor ms_per_prompt_token")
    decode, prompt = (float(number(k)) if k in given else None for k in _RATES)
    context = number("context", whole=True)
    tokens = number("prompt_tokens", whole=True) if "prompt_tokens" in row else context
    found = Point(load, device, context, tokens, decode, prompt)
    for key, share in zip(_RATES, _shares(found, engine), strict=True):
        if share is not None and not SLOWEST < share < FASTEST:
            what = f"{share:.3g} times what {printable(device.name, 80)}'s figures allow"
            raise refuse(f"{key} is {row[key]:g}, {what}: check the number and its unit")
    return found


SLOWEST, FASTEST = 1e-9, 10.0  # beyond, a number is no measurement
_RATES = ("tokens_per_second", "ms_per_prompt_token")


def _shares(p: Point, engine: Engine) -> tuple[float | None, float | None]:
    """The speed of decoding, and of the prompt, over what the device's figures allow."""
    _check_reads(p.load)
    read, _, _ = terms(p.load, p.device, engine, 0)
    least = 1e3 * _prompt_operations(p.load, p.prompt) / rates(p.device, engine)[1] / p.prompt
    decode, prompt = p.tokens_per_second, p.ms_per_prompt_token
    return decode and decode * read, prompt and least / prompt


def refit(engine: Engine, points: Sequence[Point], source: str) -> Engine:
    """The engine fitted to your own points, for the device they were measured on.

    Where they can tell the constants apart (three points or more that differ), all are fitted; else
    those of decoding are scaled together, so that the forecast goes through what was measured.
    Raises Refused for prompts that took less than reading the weights for one does.
    """
    decode = [p for p in points if p.tokens_per_second]
    distinct = {terms(p.load, p.device, engine, p.context) for p in decode}
    if len(distinct) >= 3:
        made = fit(engine, points)
    else:
        found, _ = errors(engine, decode)
        scale = math.exp(sum(math.log1p(e) for e in found) / len(found)) if found else 1.0
        read, cache, block = (k * scale for k in (engine.read, engine.cache, engine.block))
        made = replace(engine, read=read, cache=cache, block=block)
        made = replace(made, compute=_compute(made, points))
    _check_prompts(made, points)
    off, prompts = errors(made, points)
    return replace(
        made,
        decode=max(LEAST, factor(off)) if off else engine.decode,
        prompt=max(LEAST, factor(prompts)) if prompts else engine.prompt,
        source=source,
    )


def _check_prompts(made: Engine, points: Sequence[Point]) -> None:
    """Raises Refused where no prompt can tell how fast products are, as all else takes longer."""
    rows = [(p.prompt * p.ms_per_prompt_token, p) for p in points if p.ms_per_prompt_token]
    free = replace(made, compute=math.inf)
    least = [1e3 * prompt_seconds(p.load, p.device, free, p.prompt) for _, p in rows]
    if rows and all(t < at * (1 - 1e-9) for (t, _), at in zip(rows, least, strict=True)):
        by = "tokens_per_second" if any(p.tokens_per_second for p in points) else "our constants"
        what = f"a prompt of {rows[0][1].prompt} tokens took {rows[0][0]:.3g} ms, less than reading"
        what += f" the weights takes by {by}, {least[0]:.3g} ms: measure again, or leave one out"
        raise Refused(None, what)


LEAST = 1.1  # an interval is never narrower: a device is not always equally warm
