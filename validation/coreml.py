"""A packaged decoder as an app runs it: tokens in, logits out, cache kept between calls.

Works on packages with loraduct's conventions (``loraduct.converters.coreml_graph``), through the
reference interpreter. On a Mac, `mil.predict` runs the same calls on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraduct.errors import Refused
from loraduct.formats.coreml import record
from loraduct.formats.coreml.package import Package
from loraduct.text import several
from loraduct.validation import mil

IDS, MASK, POSITION, LOGITS = "inputIds", "causalMask", "position", "logits"


@dataclass
class Session:
    """One adapter of a package (None: the base), ready to be run.

    ``machines``: tokens per call -> function; 0: any number. ``extra``: arguments of every call,
    such as an adapter's factors.
    """

    machines: dict[int, mil.Machine]
    precision: str = mil.STORAGE
    extra: Mapping[str, Any] = field(default_factory=dict)
    ranges: mil.Ranges | None = None
    state: dict[str, Any] = field(default_factory=dict)
    end: int = 0

    @property
    def stateless(self) -> bool:
        """Whether every call starts from the beginning."""
        return not next(iter(self.machines.values())).program.states

    @property
    def positions(self) -> int:
        """Of the cache; without one, of the longest fixed function; 0: any number."""
        return max(self.machines) if self.stateless else self._context

    def start(self) -> None:
        """Forget all tokens."""
        self.state = next(iter(self.machines.values())).new_state()
        self.end = 0

    def feed(self, ids: Sequence[int]) -> Any:
        """Logits (tokens, vocabulary), float32, of the next tokens."""
        import numpy as np

        if self.stateless:  # whole in one call: the next one would begin anew
            fits = [n for n in sorted(self.machines) if n >= len(ids)]
            if 0 not in self.machines and not fits:
                what = f"takes {max(self.machines)} tokens at most and keeps none, given {len(ids)}"
                raise Refused(next(iter(self.machines.values())).path, what)
            return self._call(ids, fits[0] if fits else len(ids))[: len(ids)]
        parts = []
        left = list(ids)
        while left:
            fixed = sorted(n for n in self.machines if n)
            q = next(
                (n for n in reversed(fixed) if n <= len(left)), fixed[0] if fixed else len(left)
            )
            now, left = left[:q], left[q:]
            parts.append(self._call(now, q)[: len(now)])
        return np.concatenate(parts)

    def _call(self, ids: Sequence[int], q: int) -> Any:
        """One call; fewer tokens than ``q`` are filled up, and what is filled up is forgotten."""
        import numpy as np

        machine = self.machines[q if q in self.machines else 0]
        fixed = 0 not in self.machines and not self.stateless
        span = self._context if fixed else self.end + q
        padded = np.array([*ids, *[ids[-1]] * (q - len(ids))], np.int32)[None]
        rows = np.arange(self.end, self.end + q)[:, None]
        mask = np.where(np.arange(span) <= rows, 0, -np.inf).astype(np.float16)[None, None]
        inputs = {IDS: padded, MASK: mask, **self.extra}
        if fixed:
            inputs[POSITION] = np.array([self.end], np.int32)
        out = machine.run(inputs, self.state, precision=self.precision, ranges=self.ranges)
        self.end += 0 if self.stateless else len(ids)
        return np.asarray(out[LOGITS][0], np.float32)

    @property
    def _context(self) -> int:
        state = next(iter(self.state.values()))
        return int(state.shape[3])


def functions(package: Package) -> dict[str, dict[int, str]]:
    """What can be run, the default first: name -> tokens per call (0: any number) -> function."""
    found: dict[str, dict[int, str]] = {}
    rows = record.read(package)["functions"]
    first = mil.default_function(package)
    for function in sorted(rows, key=lambda f: f != first):
        q = rows[function]["q"]
        found.setdefault(function.removesuffix(f"_q{q}"), {})[q or 0] = function
    return found


def alone(package: Package, adapter: str) -> str:
    """What runs the adapter by itself at its full weight. Raises Refused where nothing does."""
    rows = record.read(package)["functions"]
    for name, members in functions(package).items():
        if rows[next(iter(members.values()))]["adapters"] == [[adapter, 1.0]]:
            return name
    what = f"runs {adapter!r} only together with others, or weighted: add a function of its own"
    raise Refused(package.path, what)


def session(
    package: Package, name: str | None = None, *, weights: mil.Weights | None = None, **options: Any
) -> Session:
    """What runs adapter ``name`` (None: the package's default). Raises Refused if there is none."""
    weights = weights or mil.Weights(package)
    known = functions(package)
    wanted = name or next(iter(known))
    if wanted not in known:
        held = several(sorted(known), 12)
        raise Refused(package.path, f"holds no function {wanted!r}; it holds {held}")
    machines = {q: mil.load(package, f, weights) for q, f in known[wanted].items()}
    made = Session(machines, **options)
    made.start()
    return made


def greedy(made: Session, ids: Sequence[int], count: int, stop: int | None = None) -> list[int]:
    """The ``count`` likeliest tokens after ``ids``, one after the other."""
    made.start()
    found: list[int] = []
    step = list(ids)
    while len(found) < count:
        logits = made.feed([*ids, *found] if made.stateless else step)
        found.append(int(logits[-1].argmax()))
        step = [found[-1]]
        if found[-1] == stop:
            break
    return found
