"""Measuring a package with Core ML itself, on a Mac, and where each of its operations runs.

Our tests run on Linux, where Core ML does not exist: `CoreML` has not been run by them, and
`placement` only against a stand-in for Apple's plan. Interfaces are those of coremltools 9.0
(``models/compute_plan.py``, ``models/model.py``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraduct.validation.coreml import IDS, LOGITS, MASK, POSITION

# classes of coremltools.models.compute_device
_NAMES = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}


def placement(plan: Any, function: str) -> dict[str, Any]:
    """Unit -> operations that Core ML prefers it for, their share of the estimated cost, and kinds
    that are kept off the Neural Engine.

    ``plan``: an MLComputePlan. Constants are no work and are not counted.
    """
    functions = plan.model_structure.program.functions
    name = function if function in functions else next(iter(functions))
    counts: Counter[str] = Counter()
    costs: dict[str, float] = {}
    off: Counter[str] = Counter()
    for op in _operations(functions[name].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
        if usage is None:  # constants, and what is folded away
            continue
        unit = _unit(usage.preferred_compute_device)
        counts[unit] += 1
        cost = plan.get_estimated_cost_for_mlprogram_operation(op)
        costs[unit] = costs.get(unit, 0.0) + (0.0 if cost is None else float(cost.weight))
        if unit != "Neural Engine":
            off[op.operator_name.rpartition(".")[2]] += 1
    total = sum(costs.values())
    return {
        "operations": dict(counts),
        "cost_share": {u: c / total for u, c in costs.items()} if total else {},
        "off_neural_engine": dict(off.most_common()),
    }


def _operations(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks or ():
            yield from _operations(inner)


def _unit(device: Any) -> str:
    return _NAMES.get(type(device).__name__, type(device).__name__)


class CoreML:
    """A package's function (of fixed shapes: functions), as `loraduct.validation.coreml` runs it."""

    def __init__(self, job: dict[str, Any]) -> None:
        import coremltools as ct
        import numpy as np

        from loraduct.formats.coreml.package import read
        from loraduct.formats.coreml.program import states_of
        from loraduct.validation import coreml, workload

        self.np, self.job = np, job
        package = read(Path(job["base"]))
        known = coreml.functions(package)
        members = known[job["adapter"] or next(iter(known))]
        self.units = getattr(ct.ComputeUnit, job["units"])
        begin = time.perf_counter()
        self.compiled = ct.models.utils.compile_model(job["base"])
        self.compile_s = time.perf_counter() - begin
        begin = time.perf_counter()
        self.models = {
            q: ct.models.CompiledMLModel(self.compiled, compute_units=self.units, function_name=f)
            for q, f in members.items()
        }
        self.load_s = time.perf_counter() - begin
        self.function = next(iter(members.values()))
        found = workload.of_package(package, self.function)
        self.context, self.stateless = found.buffer_tokens, not found.buffer_bytes
        self.states = [named.name for named in states_of(package.functions[self.function])]
        self.seen: list[int] = []
        self.held: dict[int, Any] = {}
        self.last: int | None = None

    def prompt(self, ids: Sequence[int]) -> int:
        self.seen, self.last = [], None
        self.held = {} if self.stateless else {q: m.make_state() for q, m in self.models.items()}
        return self._feed(list(ids))

    def step(self, token: int) -> int:
        return self._feed([*self.seen, token] if self.stateless else [token])

    def _feed(self, left: list[int]) -> int:
        if self.stateless:
            self.seen = []
        fixed = sorted(q for q in self.models if q)
        found = 0
        while left:
            q = next(
                (n for n in reversed(fixed) if n <= len(left)), fixed[0] if fixed else len(left)
            )
            if self.stateless and fixed:
                q = next((n for n in fixed if n >= len(left)), fixed[-1])
            now, left = left[:q], left[q:]
            found = self._call(now, q)
        return found

    def _call(self, ids: list[int], q: int) -> int:
        np, key = self.np, q if q in self.models else 0
        state: Any = self.held.get(key)
        if self.last is not None and self.last != key:  # a cache belongs to one function
            for name in self.states:
                state.write_state(name, self.held[self.last].read_state(name))
        end = len(self.seen)
        span = self.context if 0 not in self.models and not self.stateless else end + q
        rows = np.arange(end, end + q)[:, None]
        mask = np.where(np.arange(span) <= rows, 0, -np.inf).astype(np.float16)[None, None]
        inputs = {IDS: np.array([*ids, *[ids[-1]] * (q - len(ids))], np.int32)[None], MASK: mask}
        if 0 not in self.models and not self.stateless:
            inputs[POSITION] = np.array([end], np.int32)
        out = self.models[key].predict(inputs, state)[LOGITS]
        self.seen += ids
        self.last = None if self.stateless else key
        return int(out[0, len(ids) - 1].argmax())

    def swap(self) -> float | None:
        """Another function of the compiled package, loaded anew."""
        import coremltools as ct

        begin = time.perf_counter()
        ct.models.CompiledMLModel(
            self.compiled, compute_units=self.units, function_name=self.function
        )
        return time.perf_counter() - begin

    def facts(self) -> dict[str, Any]:
        import coremltools as ct
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(self.compiled, self.units)
        return {
            "compute_units": self.job["units"],
            "compile_s": self.compile_s,
            "open_s": self.load_s,
            "placement": placement(plan, self.function),
            "versions": {"coremltools": ct.__version__},
        }
