"""What in a package is known to keep it, or parts of it, off the Neural Engine: read, not run.

Apple documents little of this, so every rule names where it was seen, and none of them fails a
package: on a Mac, ``loraduct bench`` asks Core ML itself which unit each operation gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loraduct.formats.coreml.constexpr import is_constant
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import block_of_function, names_in, states_of, type_of
from loraduct.text import several
from loraduct.validation.checks import Check

WIDEST, DEEPEST = 16384, 65536  # of the axes H, W, D, and of C, N
STATE_STEP = 32
MOST_AXES = 5
_GUIDE = "ane-guide.readthedocs.io, chapter 4"
_ISSUES = "github.com/apple/coremltools/issues"
_LIMITS = "github.com/FluidInference/FluidAudio/issues/121, github.com/ncdrone/rustane/issues/13"
_NO_PATH = {
    "scatter", "scatter_along_axis", "scatter_nd", "reduce_prod", "gru", "lstm", "rnn",
}  # fmt: skip
_CONTROL = {"cond", "while_loop"}
_GATHERS = {"gather", "gather_along_axis", "gather_nd"}
_STATES = {"write_state", "coreml_update_state"}
_LUT, _SCALE = "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"


@dataclass(frozen=True)
class Rule:
    """``find``: the operations or inputs at fault; ``what`` happens; ``source``: where that was seen."""

    name: str
    find: Callable[[Function], Iterator[str]]
    what: str
    source: str


class Function:
    """A function of a package, as rules look at it."""

    def __init__(self, package: Package, name: str) -> None:
        self.package, self.name = package, name
        self.function = package.functions[name]
        self.operations = list(_flat(block_of_function(self.function)))
        self.by_name = {out.name: op for op in self.operations for out in op.outputs}
        self.working = [o for o in self.operations if not is_constant(o)]

    def label(self, op: Any) -> str:
        """What a report calls an operation."""
        return f"{op.outputs[0].name if op.outputs else op.type} ({op.type})"

    def used(self, kinds: set[str]) -> Iterator[str]:
        """Operations of some kinds."""
        return (self.label(o) for o in self.working if o.type in kinds)

    def shapes(self) -> Iterator[tuple[Any, str, tuple[int | None, ...]]]:
        """(operation, dtype, shape) of every tensor that is computed."""
        for op in self.working:
            for out in op.outputs:
                if out.type.WhichOneof("type") == "tensorType":
                    yield (op, *type_of(out.type))

    def states(self) -> Iterator[tuple[str, tuple[int | None, ...]]]:
        """(name, shape) of every state."""
        return ((named.name, type_of(named.type)[1]) for named in states_of(self.function))

    def description(self) -> Any:
        """What the model's description says of the function."""
        whole = self.package.model.description
        return next((f for f in whole.functions if f.name == self.name), whole)


def _flat(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _flat(inner)


def _too_wide(f: Function) -> Iterator[str]:
    """Any axis above what channels may have; the last above what a width may have, unless a product
    made it, whose results can lie along channels."""
    for op, _, shape in f.shapes():
        sizes = [n for n in shape if n is not None]
        last = shape[-1] if shape else None
        product = op.type in ("linear", "conv", "identity")
        if any(n > DEEPEST for n in sizes) or (last is not None and last > WIDEST and not product):
            yield f"{f.label(op)} {list(shape)}"


def _too_many_axes(f: Function) -> Iterator[str]:
    return (f.label(op) for op, _, shape in f.shapes() if len(shape) > MOST_AXES)


def _flexible(f: Function) -> Iterator[str]:
    for feature in f.description().input:
        array = feature.type.multiArrayType
        if array.WhichOneof("ShapeFlexibility") == "shapeRange":
            ranges = array.shapeRange.sizeRanges
            if any(r.lowerBound != r.upperBound for r in ranges):
                yield feature.name


def _wide_floats(f: Function) -> Iterator[str]:
    return (f.label(op) for op, dtype, _ in f.shapes() if dtype in ("FLOAT32", "FLOAT64"))


def _odd_states(f: Function) -> Iterator[str]:
    for name, shape in f.states():
        last = shape[-1] if shape else None
        if last is not None and last % STATE_STEP:
            yield f"{name} {list(shape)}"


def _states_written(f: Function) -> Iterator[str]:
    return f.used(_STATES)


def _four_bits_and_state(f: Function) -> Iterator[str]:
    if not states_of(f.function):
        return
    for op in f.operations:
        if op.type == _LUT and _codes(op, "indices", f) == "UINT4":
            yield f.label(op)


def _scaled_tables(f: Function) -> Iterator[str]:
    """A scale on top of a lookup table, or under it."""
    for op in f.operations:
        if op.type in (_SCALE, _LUT):
            made = {f.by_name[n].type for p in op.inputs for n in names_in(op, p) if n in f.by_name}
            if (_LUT if op.type == _SCALE else _SCALE) in made:
                yield f.label(op)


def _blockwise_four(f: Function) -> Iterator[str]:
    """4-bit linear codes with more than one scale along the columns of a row."""
    for op in f.operations:
        if op.type == _SCALE and _codes(op, "data", f) in ("INT4", "UINT4"):
            shape = _shape(op, "scale", f)
            if len(shape) > 1 and math.prod(n or 1 for n in shape[1:]) > 1:
                yield f.label(op)


def _bound(op: Any, parameter: str, f: Function) -> Any:
    """The ValueType of what is bound to a parameter, or held as an attribute; None if neither."""
    if parameter in op.attributes:
        return op.attributes[parameter].type
    if parameter not in op.inputs:
        return None
    for binding in op.inputs[parameter].arguments:
        if binding.WhichOneof("binding") == "value":
            return binding.value.type
        if binding.name in f.by_name:
            return f.by_name[binding.name].outputs[0].type
    return None


def _codes(op: Any, parameter: str, f: Function) -> str | None:
    found = _bound(op, parameter, f)
    return None if found is None else type_of(found)[0]


def _shape(op: Any, parameter: str, f: Function) -> tuple[int | None, ...]:
    found = _bound(op, parameter, f)
    return () if found is None else type_of(found)[1]


RULES = (
    Rule("size", _too_wide, f"axes above {WIDEST} (channels: {DEEPEST}) don't compile for it", _LIMITS),
    Rule("axes", _too_many_axes, f"tensors of more than {MOST_AXES} axes have no layout on it", _LIMITS),
    Rule("flexible", _flexible, "of a range of shapes only the default one runs on it; use fixed or"
         " enumerated shapes", "Apple's engineer, developer.apple.com/forums/thread/724930"),
    Rule("float32", _wide_floats, "it computes in half precision only; these run elsewhere",
         "apple.github.io/coremltools/docs-guides/source/typed-execution.html"),
    Rule("state size", _odd_states, f"a state whose last axis is no multiple of {STATE_STEP} fails on it",
         f"{_ISSUES}/2631"),
    Rule("state", _states_written, "a cache written within the graph was refused by its compiler"
         " (ANECCompile -14, M5 Pro) or failed to run on it; prompts without a state ran",
         f"github.com/FluidInference/mobius/pull/77, {_ISSUES}/2553"),
    Rule("4-bit tables", _four_bits_and_state, "4-bit tables in a model with states crashed on it after"
         " 100 to 200 calls (as coremltools 9.0 writes them)", f"{_ISSUES}/2716"),
    Rule("scaled tables", _scaled_tables, "a lookup table with scales crashed while it was loaded"
         " (macOS 26)", f"{_ISSUES}/2688"),
    Rule("4-bit blocks", _blockwise_four, "4-bit codes with scales by block along a row compiled for the"
         " GPU only; lookup tables don't have that", "github.com/apple/coreai-models/issues/205"),
    Rule("gather", lambda f: f.used(_GATHERS), "looking up rows stays on the CPU, one switch a token",
         "github.com/hollance/neural-engine docs/unsupported-layers.md,"
         " github.com/maziyarpanahi/openmed/pull/3071"),
    Rule("no path", lambda f: f.used(_NO_PATH), "these have no path on any generation of it", _GUIDE),
    Rule("control", lambda f: f.used(_CONTROL), "branches and loops run on the CPU",
         "github.com/hollance/neural-engine docs/unsupported-layers.md"),
    Rule("sin, cos", lambda f: f.used({"sin", "cos"}), "before the A15 and M2 it lacks them", _GUIDE),
    Rule("8-bit activations", lambda f: f.used({"quantize", "dequantize"}), "faster from the A17 Pro and"
         " M4 on only", "apple.github.io/coremltools/docs-guides/source/opt-whats-new.html"),
)  # fmt: skip


def lint(package: Package, names: Sequence[str] | None = None) -> list[Check]:
    """A warning for each rule that the package hits, or one check that it hits none.

    ``names``: the functions to look at, None: all.
    """
    found: dict[str, list[str]] = {}
    functions: dict[str, list[str]] = {}
    for name in package.functions if names is None else names:
        one = Function(package, name)
        for rule in RULES:
            hits = list(rule.find(one))
            if hits:
                found.setdefault(rule.name, []).extend(
                    h for h in hits if h not in found.get(rule.name, ())
                )
                functions.setdefault(rule.name, []).append(name)
    checks = []
    for rule in RULES:
        if rule.name not in found:
            continue
        where = f"{several(found[rule.name], 2)}; in {several(functions[rule.name], 3)}"
        detail = f"{rule.name}: {rule.what}: {where} [{rule.source}]"
        checks.append(Check("neural engine", "warning", detail))
    return checks or [
        Check("neural engine", "passed", f"none of {len(RULES)} known obstacles; not a promise")
    ]
