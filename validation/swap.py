"""Adapters loaded, swapped, stacked and evicted in a random order: what the model computes, what is
left of the base, what it costs.

The pool that is tried comes from outside (``options["pool"]``): validation judges it and shares no
code with it. What every state should give is computed before, by stock PEFT or stock mlx-lm where
they can hold it, else by a pool of its own on a fresh model.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loraduct import formats
from loraduct.adapter import Adapter
from loraduct.errors import LoraductError, MissingExtra, Refused
from loraduct.files import write_file
from loraduct.formats import CONFIG, json_file, mlx, peft
from loraduct.formats.base import Base
from loraduct.formats.options import ReadOptions
from loraduct.formats.safetensors_file import serialized
from loraduct.text import number, printable, size
from loraduct.validation import runtimes
from loraduct.validation.checks import Check
from loraduct.validation.parity import SAME_RUNTIME
from loraduct.validation.suites import CannotRun, Context, Suite, suite

STEPS, TOKENS, SEED = 200, 8, 8
LEAST = 3  # adapters: fewer can't force evictions from a budget of two
SHARE = 1e-5  # of the largest logit: two orders of summation differ by less
STACKS = 8
FACTORS = (0.5, -1.0)  # of b, in variants of the adapter
WEIGHTS = (1.0, 0.5, -0.5)
# what is done next, and how often
CHANCES = {"swap": 8, "stack": 4, "load": 3, "prefetch": 2, "evict": 2, "deactivate": 1}

State = tuple[tuple[str, float], ...]
Logits = Callable[[Any], Any]


@dataclass
class _Seen:
    """What the schedule measured."""

    largest: float = 0.0
    peak: int = 0
    loads: list[float] = field(default_factory=list)
    swaps: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def run(context: Context) -> Suite:
    """The suite. Raises CannotRun without a pool, MissingExtra without the runtime."""
    make = context.options.get("pool")
    if make is None:
        raise CannotRun("there is no pool to try: call it with options={'pool': AdapterPool}")
    ships = context.adapters[-1]
    backend = "mlx" if ships.format == "mlx" or context.base.quantization else "torch"
    ids = list(context.runs.ids[0][:TOKENS]) or [0]
    with runtimes.quiet(), tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        given = _given(context, Path(name))
        try:
            return _tried(make, backend, context.base, given, ids)
        except ImportError as e:
            raise MissingExtra(backend, f"the swap suite ({e.name})") from None


def _given(context: Context, folder: Path) -> dict[str, tuple[Path, ReadOptions, Adapter]]:
    """Name -> (path, how to read it, what it is): those given, and variants until there are enough."""
    options = ReadOptions(restore=False, base=context.base)
    found: dict[str, tuple[Path, ReadOptions, Adapter]] = {}
    for adapter in context.adapters:
        one = ReadOptions(restore=False, base=context.base, adapter=adapter.name)
        packaged = adapter.format == "coreml"
        if adapter.weights.suffix == ".bin" and not packaged:
            raise CannotRun(f"{adapter.weights} is a pickle: convert it before it is swapped")
        usual = packaged or adapter.container == "packed" or runtimes.usual_weights(adapter)
        if not usual:
            raise CannotRun(f"{adapter.weights} is no folder's usual file: convert it before")
        found[f"a{len(found)}"] = adapter.path, one, adapter
    for path in context.beside:
        found[f"a{len(found)}"] = path, options, formats.read(path, options)
    first = context.adapters[-1]
    for i in range(max(0, LEAST - len(found))):
        path = first.path
        if first.format in ("peft", "mlx") and first.container is None:
            path = _variant(first, folder / f"variant{i}", FACTORS[i % len(FACTORS)])
        one = ReadOptions(restore=False, base=context.base, adapter=first.name)
        found[f"variant{i}"] = path, one, formats.read(path, one)
    return found


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


def _tried(make: Any, backend: str, base: Base, given: dict[str, Any], ids: Sequence[int]) -> Suite:
    model, logits = _live(backend, base, ids)
    plain, before = logits(model), _digest(backend, model)
    sizes = _sizes(make, model, base, given)
    budget = sum(sorted(sizes.values())[-2:])
    states = _states(given)
    expected = {(): plain} | _expected(make, backend, base, given, states, ids)
    bound = max(SAME_RUNTIME, SHARE * max(float(abs(e).max()) for e in expected.values()))
    pool = make(model, base, budget=budget)
    try:
        seen = _schedule(pool, given, states, expected, lambda: logits(model), bound)
        evictions = pool.evictions
    finally:
        pool.close()
    after = _digest(backend, model)
    back = float(abs(logits(model) - plain).max())
    checks = _checks(seen, bound, budget, before == after, back, _effect(expected, bound))
    numbers = {
        "steps": STEPS,
        "seed": SEED,
        "backend": backend,
        "adapters": len(given),
        "states": len(expected),
        "stock_states": sum(_is_stock(backend, s, given) for s in states),
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
    outputs = f"largest difference from a fresh load {number(seen.largest)} (bound {number(bound)})"
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
    pool: Any, given: dict[str, Any], states: Sequence[State], expected: dict[State, Any],
    logits: Callable[[], Any], bound: float,
) -> _Seen:  # fmt: skip
    """The random steps, and after each what the model gives and the pool holds."""
    dice, seen = random.Random(SEED), _Seen()
    single = [s for s in states if len(s) == 1]
    stacks = [s for s in states if len(s) > 1] or single
    for name, (path, options, _) in given.items():
        seen.loads.append(_timed(partial(pool.load, name, path, options)))
    for step in range(STEPS):
        what = dice.choices(list(CHANCES), list(CHANCES.values()))[0]
        seen.counts[what] = seen.counts.get(what, 0) + 1
        active = {n for n, _ in pool.active}
        idle = [n for n in given if n not in active]
        name = dice.choice(idle or list(given))
        state = dice.choice(stacks if what == "stack" else single) if what != "deactivate" else ()
        before = pool.active
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
            if pool.active == before and step % 4:
                continue  # what is active has been looked at
            found = float(abs(logits() - expected[pool.active]).max())
        except LoraductError as e:
            seen.wrong.append(f"step {step} ({what}): {printable(str(e), 200)}")
            continue
        finally:
            seen.peak = max(seen.peak, pool.resident_bytes)
        seen.largest = max(seen.largest, found)
        if not found <= bound:
            seen.wrong.append(f"step {step} ({what}): logits are off by {number(found)}")
    return seen


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _states(given: dict[str, Any]) -> list[State]:
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


def _sizes(make: Any, model: Any, base: Base, given: dict[str, Any]) -> dict[str, int]:
    """Bytes of each in memory."""
    found = {}
    with contextlib.closing(make(model, base)) as pool:
        for name, (path, options, _) in given.items():
            pool.load(name, path, options)
            found[name] = pool.resident_bytes
            pool.evict(name)
    return found


# --- what each state should give -----------------------------------------------------------------


def _is_stock(backend: str, state: State, given: dict[str, Any]) -> bool:
    """Whether a stock library holds this state: PEFT stacks, mlx-lm one adapter."""
    wanted = {"torch": "peft", "mlx": "mlx"}[backend]
    held = [given[n][2] for n, _ in state]
    plain = all(a.format == wanted and runtimes.usual_weights(a) for a in held)
    return plain and (
        len(held) == 1 or (backend == "torch" and not any(a.replacements for a in held))
    )


def _expected(
    make: Any, backend: str, base: Base, given: dict[str, Any], states: Sequence[State],
    ids: Sequence[int],
) -> dict[State, Any]:  # fmt: skip
    """Logits of every state, from the stock library or from a pool used once."""
    stock = [s for s in states if _is_stock(backend, s, given)]
    done = dict((_by_peft if backend == "torch" else _by_mlx_lm)(base, given, stock, ids))
    left = [s for s in states if s not in done]
    if left:
        model, logits = _live(backend, base, ids)
        for state in left:
            with contextlib.closing(make(model, base)) as pool:
                for name, _ in state:
                    pool.load(name, *given[name][:2])
                pool.activate(*state)
                done[state] = logits(model)
    return done


def _by_peft(
    base: Base, given: dict[str, Any], states: Sequence[State], ids: Sequence[int]
) -> Iterator[tuple[State, Any]]:
    names = list(dict.fromkeys(n for s in states for n, _ in s))
    if not names:
        return
    from peft import PeftModel

    model, logits = _live("torch", base, ids)
    model = PeftModel.from_pretrained(model, str(given[names[0]][0]), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.load_adapter(str(given[name][0]), adapter_name=name)
    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    scales = [dict(m.scaling) for m in layers]
    for state in states:
        for layer, own in zip(layers, scales, strict=True):
            layer.scaling.update({n: own[n] * w for n, w in state if n in own})
        if len(state) == 1:
            model.set_adapter(state[0][0])
        else:
            model.base_model.set_adapter([n for n, _ in state])
        yield state, logits(model)


def _by_mlx_lm(
    base: Base, given: dict[str, Any], states: Sequence[State], ids: Sequence[int]
) -> Iterator[tuple[State, Any]]:
    for state in states:
        model = runtimes.mlx_model(base, given[state[0][0]][0])
        yield state, runtimes.of_mlx(model).logits(ids)


# --- models --------------------------------------------------------------------------------------


def _live(backend: str, base: Base, ids: Sequence[int]) -> tuple[Any, Logits]:
    """A fresh model in float32, and what gives a model's logits (tokens, vocabulary)."""
    if not base.has_weights:
        raise Refused(base.path, "holds no weights (model*.safetensors): nothing can be run on it")
    load, of = {
        "torch": (runtimes.torch_model, runtimes.of_torch),
        "mlx": (runtimes.mlx_model, runtimes.of_mlx),
    }[backend]
    return load(base), lambda model: of(model).logits(ids)


def _digest(backend: str, model: Any) -> str:
    """Of all parameters by name, every byte."""
    found = hashlib.blake2b()
    if backend == "torch":
        import torch

        for name, t in model.named_parameters(remove_duplicate=False):
            found.update(name.encode())
            found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    for name, a in tree_flatten(model.parameters()):
        found.update(name.encode())
        found.update(np.array(a.reshape(-1).view(mx.uint8)).data)
    return found.hexdigest()
