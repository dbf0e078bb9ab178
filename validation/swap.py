"""Adapters loaded, swapped, stacked and evicted in a random order: what the model computes, what is
left of the base, what it costs.

The pool that is tried comes from outside (``options["pool"]``): validation judges it and shares no
code with it. After each of the steps the model is asked, and what it says compared with what a fresh
model said before (`swap_expected`).
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loraduct import formats
from loraduct.adapter import Adapter
from loraduct.errors import LoraductError, MissingExtra
from loraduct.files import write_file
from loraduct.formats import CONFIG, json_file, mlx, peft
from loraduct.formats.coreml import record
from loraduct.formats.options import ReadOptions
from loraduct.formats.safetensors_file import serialized
from loraduct.text import number, printable, size
from loraduct.validation import runtimes, swap_expected
from loraduct.validation.checks import Check
from loraduct.validation.parity import SAME_RUNTIME
from loraduct.validation.suites import CannotRun, Context, Suite, suite
from loraduct.validation.swap_expected import Given, Live, State

STEPS, SEED = 200, 8
LEAST = 3  # adapters: fewer can't force evictions from a budget of two
SHARE = 1e-5  # of the largest logit: two orders of summation differ by less
STACKS = 8
FACTORS = (0.5, -1.0)  # of b, in variants of the adapter
WEIGHTS = (1.0, 0.5, -0.5)
# what is done next, and how often
CHANCES = {"swap": 8, "stack": 4, "load": 3, "prefetch": 2, "evict": 2, "deactivate": 1}


@dataclass
class _Seen:
    """What the schedule measured."""

    largest: float = 0.0
    compared: int = 0
    peak: int = 0
    loads: list[float] = field(default_factory=list)
    swaps: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def run(context: Context) -> Suite:
    """The suite. Raises CannotRun without a pool, without weights and for what no pool takes,
    MissingExtra without the runtime."""
    make = context.options.get("pool")
    if make is None:
        raise CannotRun("there is no pool to try: call it with options={'pool': AdapterPool}")
    ships = context.adapters[-1]
    backend = "mlx" if ships.format == "mlx" or context.base.quantization else "torch"
    if not context.base.has_weights:
        raise CannotRun(f"{context.base.path} holds no weights to run")
    if context.base.quantization is not None and backend == "torch":
        raise CannotRun(f"{context.base.path} is packed by mlx-lm, torch can't load it")
    with runtimes.quiet(), tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        given = _given(context, Path(name))
        try:
            return _tried(make, backend, context, given)
        except ImportError as e:
            raise MissingExtra(backend, f"the swap suite ({e.name})") from None


def _given(context: Context, folder: Path) -> Given:
    """What ships, those beside it, the other adapters of its package, and variants until there are
    enough. A, of which B was made, gives what B gives: a mix-up of the two would not show.
    """
    options = ReadOptions(restore=False, base=context.base)
    found: dict[str, tuple[Path, ReadOptions, Adapter]] = {}
    first = context.adapters[-1]
    packaged = first.format == "coreml"
    if first.weights.suffix == ".bin" and not packaged:
        raise CannotRun(f"{first.weights} is a pickle: convert it before it is swapped")
    if not (packaged or first.container == "packed" or runtimes.usual_weights(first)):
        raise CannotRun(f"{first.weights} is no folder's usual file: convert it before")
    one = ReadOptions(restore=False, base=context.base, adapter=first.name)
    found["a0"] = first.path, one, first
    for path in context.beside:
        found[f"a{len(found)}"] = path, options, formats.read(path, options)
    for other in _siblings(first) if packaged else ():
        own = ReadOptions(restore=False, base=context.base, adapter=other)
        found[f"a{len(found)}"] = first.path, own, formats.read(first.path, own)
    for i in range(max(0, LEAST - len(found))):
        path = first.path
        if first.format in ("peft", "mlx") and first.container is None:
            path = _variant(first, folder / f"variant{i}", FACTORS[i % len(FACTORS)])
        found[f"variant{i}"] = path, one, formats.read(path, one)
    return found


def _siblings(adapter: Adapter) -> list[str]:
    """Two more adapters of a package, at most."""
    held = record.read(runtimes.package_at(adapter.path))["adapters"]
    return [str(name) for name in held if name != adapter.name][: LEAST - 1]


def _variant(adapter: Adapter, folder: Path, factor: float) -> Path:
    """The adapter with every b times ``factor``."""
    module = {"peft": peft, "mlx": mlx}[adapter.format]
    _, tensors, texts = module.read_weights(adapter.path, ReadOptions())
    ends = (".lora_b",) if adapter.format == "mlx" else (".lora_B.weight", ".lora_embedding_B")
    done = {n: t.times(factor) if n.endswith(ends) else t for n, t in tensors.items()}
    folder.mkdir()
    kept = {k: v for k, v in texts.items() if k == "format"}
    write_file(folder / module.WEIGHTS, serialized(done, kept, {}))
    write_file(folder / CONFIG, [json_file.dump(adapter.config)])
    return folder


def _tried(make: Any, backend: str, context: Context, given: Given) -> Suite:
    base, progress = context.base, context.runs.progress
    ids = list(context.runs.ids[0][: swap_expected.tokens(backend)]) or [0]
    states = _states(given)
    progress(f"{len(states)} states of {len(given)} adapters, each on a fresh model")
    sizes = _sizes(make, swap_expected.live(backend, base, ids).model, context, given)
    logits = swap_expected.expected(make, backend, base, given, states, ids)
    live = swap_expected.live(backend, base, ids)
    before = swap_expected.digest(backend, live.model)
    expected = {(): live.logits()} | logits
    budget = sum(sorted(sizes.values())[-2:])
    bound = max(SAME_RUNTIME, SHARE * max(float(abs(e).max()) for e in expected.values()))
    pool = make(live.model, base, budget=budget)
    try:
        seen = _schedule(pool, given, states, expected, live, bound, progress)
        evictions = pool.evictions
    finally:
        pool.close()
    after = swap_expected.digest(backend, live.model)
    back = float(abs(live.logits() - expected[()]).max())
    checks = _checks(seen, bound, budget, before == after, back, _effect(expected, bound))
    checks += swap_expected.packaged(context, given, expected, backend)
    numbers = {
        "steps": STEPS,
        "seed": SEED,
        "backend": backend,
        "adapters": len(given),
        "states": len(expected),
        "stock_states": sum(swap_expected.is_stock(backend, s, given) for s in states),
        "tokens": len(ids),
        "compared": seen.compared,
        "done": seen.counts,
        "errors": len(seen.wrong),
        "largest_difference": seen.largest,
        "bound": bound,
        "swap_ms": _middle(seen.swaps),
        "median_swap_ms": _middle(seen.swaps),
        "p95_swap_ms": _high(seen.swaps),
        "median_load_ms": _middle(seen.loads),
        "p95_load_ms": _high(seen.loads),
        "resident_bytes": seen.peak,
        "peak_bytes": seen.peak,
        "budget_bytes": budget,
        "evictions": evictions,
    }
    return suite("swap", checks, numbers)


def _checks(
    seen: _Seen, bound: float, budget: int, same: bool, back: float, effect: bool
) -> list[Check]:
    swaps = f"median {number(_middle(seen.swaps) or 0.0)} ms"
    loads = f"median {number(_middle(seen.loads) or 0.0)} ms"
    outputs = f"compared with a fresh load {seen.compared} times, largest difference"
    outputs += f" {number(seen.largest)} (bound {number(bound)})"
    kept = "every byte and logit of the base is as it was"
    lost = f"the base's bytes {'are the same' if same else 'changed'}, its logits moved by {number(back)}"
    memory = f"at most {size(seen.peak)} of {size(budget)}"
    found = [
        Check(
            "outputs", "failed" if seen.wrong else "passed", "; ".join([outputs, *seen.wrong[:3]])
        ),
        Check(
            "base", "passed" if same and not back else "failed", kept if same and not back else lost
        ),
        Check("budget", "passed" if seen.peak <= budget else "failed", memory),
        Check("speed", "passed", f"a swap takes {swaps} from memory; a load from disk {loads}"),
    ]
    if not effect:
        what = "two of the adapters give the same logits: of these, a mix-up would not show"
        found.append(Check("effect", "warning", what))
    return found


def _middle(values: Sequence[float]) -> float | None:
    return 1e3 * statistics.median(values) if values else None


def _high(values: Sequence[float]) -> float | None:
    return 1e3 * sorted(values)[int(0.95 * (len(values) - 1))] if values else None


def _effect(expected: dict[State, Any], bound: float) -> bool:
    """Whether the base and any two adapters can be told apart; stacks of two may be one sum."""
    found = [e for s, e in expected.items() if len(s) < 2]
    pairs = ((a, b) for i, a in enumerate(found) for b in found[:i])
    return all(float(abs(a - b).max()) > 10 * bound for a, b in pairs)


def _schedule(
    pool: Any, given: Given, states: Sequence[State], expected: Mapping[State, Any], live: Live,
    bound: float, progress: Callable[[str], None],
) -> _Seen:  # fmt: skip
    """The random steps, and after each what the model gives and the pool holds."""
    dice, seen = random.Random(SEED), _Seen()
    single = [s for s in states if len(s) == 1]
    stacks = [s for s in states if len(s) > 1] or single
    asked: list[tuple[str, State, Any]] = []
    for name, (path, options, _) in given.items():
        seen.loads.append(_timed(partial(pool.load, name, path, options)))
    for step in range(STEPS):
        if step % 50 == 0:
            progress(f"step {step} of {STEPS}")
        what = dice.choices(list(CHANCES), list(CHANCES.values()))[0]
        seen.counts[what] = seen.counts.get(what, 0) + 1
        active = {n for n, _ in pool.active}
        idle = [n for n in given if n not in active]
        name = dice.choice(idle or list(given))
        state = dice.choice(stacks if what == "stack" else single) if what != "deactivate" else ()
        try:
            if what in ("swap", "stack", "deactivate"):
                warm = {n for n, _ in state} <= set(pool.held)
                took = _timed(partial(pool.activate, *state))
                (seen.swaps if warm else seen.loads).append(took)
            elif what == "load" and idle and len(active) < 2:  # the budget holds two
                path, options, _ = given[name]
                seen.loads.append(_timed(partial(pool.load, name, path, options)))
            elif what == "prefetch" and idle and len(active) < 2:
                pool.prefetch(name).result()
            elif what == "evict" and idle:
                pool.evict(name)
            asked.append((f"step {step} ({what})", pool.active, live.ask()))
        except LoraductError as e:
            seen.wrong.append(f"step {step} ({what}): {printable(str(e), 200)}")
        finally:
            seen.peak = max(seen.peak, pool.resident_bytes)
        if len(asked) == live.width or step == STEPS - 1:
            _compare(asked, expected, live, bound, seen)
            asked.clear()
    return seen


def _compare(
    asked: Sequence[tuple[str, State, Any]], expected: Mapping[State, Any], live: Live, bound: float,
    seen: _Seen,
) -> None:  # fmt: skip
    """What the model said in the states that it was in, against what it should say."""
    answers = live.answers([given for _, _, given in asked])
    for (where, state, _), found in zip(asked, answers, strict=True):
        off = float(abs(found - expected[state]).max())
        seen.compared += 1
        seen.largest = max(seen.largest, off)
        if not off <= bound:
            seen.wrong.append(f"{where}: logits are off by {number(off)}")


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _states(given: Given) -> list[State]:
    """Each adapter alone, and some stacks of two; what can't be weighted has the weight 1."""
    dice = random.Random(SEED)
    whole = {n for n, (_, _, a) in given.items() if a.replacements}
    fixed = {n for n, (_, _, a) in given.items() if any(u.magnitude for u in a.low_rank.values())}
    found: dict[State, None] = {((n, 1.0),): None for n in given}
    for _ in range(50):
        pair = dice.sample(list(given), 2)
        if len(whole & set(pair)) < 2 and len(found) < len(given) + STACKS:
            weights = [1.0 if n in whole | fixed else dice.choice(WEIGHTS) for n in pair]
            found[tuple(zip(pair, weights, strict=True))] = None
    return list(found)


def _sizes(make: Any, model: Any, context: Context, given: Given) -> dict[str, int]:
    """Bytes of each in memory. Raises CannotRun for an adapter that the pool does not take."""
    found = {}
    with contextlib.closing(make(model, context.base)) as pool:
        for name, (path, options, _) in given.items():
            try:
                pool.load(name, path, options)
            except LoraductError as e:
                raise CannotRun(f"the pool takes no such adapter: {e}") from None
            found[name] = pool.resident_bytes
            pool.evict(name)
    return found
