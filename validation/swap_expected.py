"""What a model should compute in every state of the swap suite, and the models that are asked.

By stock PEFT or stock mlx-lm where they can hold the state, else by a pool of its own on a fresh
model; an adapter of a Core ML package is held against the package's own function besides.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.formats.base import Base
from loraduct.formats.options import ReadOptions
from loraduct.text import number
from loraduct.validation import loaded, runtimes
from loraduct.validation.checks import Check
from loraduct.validation.declared import BASE, declared
from loraduct.validation.parity import BASE_FACTOR, EFFECT_FACTOR
from loraduct.validation.suites import CannotRun, Context

State = tuple[tuple[str, float], ...]
Given = Mapping[str, tuple[Path, ReadOptions, Adapter]]  # name -> path, how to read it, what it is
TOKENS = 8
# MLX's CPU backend takes a tenth of a second a token; of two, the second looks back at the first
SLOW_TOKENS = 2


@dataclass(frozen=True)
class Live:
    """A fresh model in float32. ``ask`` begins to compute the logits of what it is at this moment,
    ``answers`` waits for those of up to ``width`` asks: lists of (tokens, vocabulary)."""

    model: Any
    ask: Callable[[], Any]
    answers: Callable[[Sequence[Any]], list[Any]]
    width: int = 1

    def logits(self) -> Any:
        """Of what it is now."""
        return self.answers([self.ask()])[0]


def tokens(backend: str) -> int:
    """How many tokens every look at a model takes. Raises ImportError without the runtime."""
    return SLOW_TOKENS if backend == "mlx" and loaded.cpu_streams() else TOKENS


def live(backend: str, base: Base, ids: Sequence[int]) -> Live:
    """A fresh model. Raises CannotRun where the base has no weights."""
    if not base.has_weights:
        raise CannotRun(f"{base.path} holds no weights to run")
    if backend == "torch":
        return of_torch(runtimes.torch_model(base), ids)
    import mlx.core as mx
    import numpy as np

    model, given = runtimes.mlx_model(base), mx.array([list(ids)])
    # a CPU stream computes on one core. A graph holds the arrays that the model has while it is
    # built, so that two states can be looked at together afterwards
    streams = loaded.cpu_streams() or [None]
    turn = iter(range(1 << 62))

    def ask() -> Any:
        stream = streams[next(turn) % len(streams)]
        with mx.stream(stream) if stream else contextlib.nullcontext():
            return model(given)[0].astype(mx.float32)

    def answers(asked: Sequence[Any]) -> list[Any]:
        mx.eval(*asked)
        return [np.array(a) for a in asked]

    return Live(model, ask, answers, len(streams))


def of_torch(model: Any, ids: Sequence[int]) -> Live:
    """A model of transformers' or PEFT's, which computes when it is asked."""
    return Live(model, lambda: runtimes.of_torch(model).logits(ids), list)


def is_stock(backend: str, state: State, given: Given) -> bool:
    """Whether a stock library holds this state: PEFT stacks, mlx-lm one adapter."""
    wanted = {"torch": "peft", "mlx": "mlx"}[backend]
    held = [given[n][2] for n, _ in state]
    plain = all(a.format == wanted and runtimes.usual_weights(a) for a in held)
    return plain and (
        len(held) == 1 or (backend == "torch" and not any(a.replacements for a in held))
    )


def expected(
    make: Any, backend: str, base: Base, given: Given, states: Sequence[State], ids: Sequence[int]
) -> dict[State, Any]:
    """Logits of every state, from the stock library or from a pool used once."""
    stock = [s for s in states if is_stock(backend, s, given)]
    done = dict((_by_peft if backend == "torch" else _by_mlx_lm)(base, given, stock, ids))
    left = [s for s in states if s not in done]
    if left:
        fresh = live(backend, base, ids)
        for state in left:
            with contextlib.closing(make(fresh.model, base)) as pool:
                for name, _ in state:
                    pool.load(name, *given[name][:2])
                pool.activate(*state)
                done[state] = fresh.logits()
    return done


def _by_peft(
    base: Base, given: Given, states: Sequence[State], ids: Sequence[int]
) -> Iterator[tuple[State, Any]]:
    names = list(dict.fromkeys(n for s in states for n, _ in s))
    if not names:
        return
    from peft import PeftModel

    model = runtimes.torch_model(base)
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
        yield state, of_torch(model, ids).logits()


def _by_mlx_lm(
    base: Base, given: Given, states: Sequence[State], ids: Sequence[int]
) -> Iterator[tuple[State, Any]]:
    for state in states:
        model = runtimes.mlx_model(base, given[state[0][0]][0])
        yield state, loaded.of_mlx(model).logits(ids)


def packaged(
    context: Context, given: Given, logits: Mapping[State, Any], backend: str
) -> list[Check]:
    """Each adapter of a package, as the pool computes it, against the package's own function.

    The interpreter runs that in float32; two runtimes differ on the bare base already, and by that
    they are measured, as `parity` does.
    """
    found = []
    plain = logits[()]
    for name, (path, _, adapter) in given.items():
        state = ((name, 1.0),)
        if adapter.format != "coreml" or adapter not in context.adapters:
            continue
        what = f"{path.name}:{adapter.name}"
        if BASE in (compressed := declared(adapter)):
            why = f"its base is compressed ({compressed[BASE]}): `parity` compares it"
            found.append(Check("package", "skipped", f"{what} was not run itself: {why}"))
            continue
        n = len(plain)
        bare, own = (
            side.run.logits[0][:n]
            for side in (context.runs.bare(adapter), context.runs.adapted(adapter))
        )
        off = float(abs(bare - plain).max())
        effect = float(abs(logits[state] - plain).max())
        bound = max(BASE_FACTOR * off, EFFECT_FACTOR * effect)
        far = float(abs(own - logits[state]).max())
        detail = f"{what}: the pool on {backend} and the package's function differ by {number(far)}"
        detail += f" (bound {number(bound)}, the adapter's effect {number(effect)})"
        found.append(Check("package", "passed" if far <= bound else "failed", detail))
    return found


def digest(backend: str, model: Any) -> str:
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
