"""A reference interpreter of Core ML's ML programs, on numpy.

Runs a function of a package from its protobuf and weight file alone: what a program says, not what
a runtime makes of it. Every output is computed in float32, rounded once to its declared dtype, and
checked against the shape and dtype the program declares. Neither coremltools nor torch is needed.

``precision`` is one of PRECISIONS:

* ``fp16-storage``: intermediates inside an operation in float32 (the default);
* ``fp16-strict``: intermediates of reductions, norms and softmax in half precision too, with sums
  in blocks of 32: about the least a device may do. Products of matrices still sum in float32;
* ``fp32``: nothing is rounded to half precision, except the weights, which are stored so.

A run is deterministic: the same machine, package and inputs give the same bits.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraduct.errors import MissingExtra, Refused
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import NUMPY

if TYPE_CHECKING:
    from loraduct.validation.mil_program import Constant, Program, Step

STORAGE, STRICT, FULL = "fp16-storage", "fp16-strict", "fp32"
PRECISIONS = (STORAGE, STRICT, FULL)
KEEP = 8 << 30  # bytes of weights held in float32; beyond, they are widened at every use
# What numpy raises when an operation is given what it can't take.
FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, AttributeError)
LARGEST = 65504.0  # of float16
NEAR = LARGEST / 4  # |x| from which on a value is reported as near to float16's end


@dataclass
class Ranges:
    """Largest magnitudes, as a run finds them.

    ``peaks``: output name -> largest |x| before it was rounded. ``warnings``: operations whose
    output comes near to float16's end, or leaves it, and is larger than what they were given.
    ``first``: (function, operation, output) of the first that made infinity or NaN.
    """

    peaks: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    first: tuple[str, str, str] | None = None

    def note(
        self,
        where: tuple[str, str, str],
        peak: float,
        after: float,
        before: Callable[[], tuple[float, bool]],
    ) -> None:
        """One output. ``where``: function, operation, output.

        ``peak``: its largest |x| (NaN if there is one), ``after``: once it was rounded;
        ``before``: of the operation's inputs, the largest finite |x| and whether all are finite.
        """
        from math import isfinite, isnan

        _, kind, name = where
        self.peaks[name] = peak
        if isfinite(after) and peak <= NEAR:
            return
        largest, finite = before()
        if not isfinite(after):
            # NaN of infinities is news too, unless they come from an overflow that was named
            if finite or (isnan(after) and self.first is None):
                what = "NaN" if isnan(after) else "overflow to inf"
                self.warnings.append(f"{name}, op {kind}: {what} (largest input {largest:.6g})")
                self.first = self.first or where
        elif finite and peak > largest:
            how = "near" if peak <= LARGEST else "beyond"
            self.warnings.append(f"{name}, op {kind}: {peak:.6g} is {how} float16's 65504")


class Weights:
    """The constants of a package, decoded once for all its functions.

    Float weights are held in float32 while they fit into ``keep`` bytes, else as they are stored.
    """

    def __init__(self, package: Package, keep: int = KEEP) -> None:
        self.package = package
        self.left = keep
        self.held: dict[Any, Any] = {}

    def exact(self, constant: Constant) -> Any:
        """In its own dtype (FLOAT16: numpy's float16), for decompressing another; not kept."""
        found = constant.make(self.exact)
        return found.astype("float16") if constant.dtype == "FLOAT16" else found

    def get(self, constant: Constant) -> Any:
        """As it is computed with: float32 for floats if it fits."""
        if constant.key in self.held:
            return self.held[constant.key]
        from loraduct.validation.mil_numbers import rounded, widened

        try:
            made = constant.make(self.exact)
        except FAULTS as e:
            what = f"a constant that can't be made: {type(e).__name__}: {e}"
            raise Refused(self.package.path, what, tensor=constant.name) from None
        if constant.dtype == "FLOAT16":
            fits = made.size * 4 <= self.left
            if made.dtype == "float32":  # decompressed just now
                made = rounded(made) if fits else made.astype("float16")
            elif fits:
                made = widened(made)
            self.left -= made.size * 4 if fits else 0
        self.held[constant.key] = made
        return made


class Machine:
    """A function of a package, ready to be run many times; its weights stay decoded.

    ``watch``: called before each computed step, with the step and its arguments' values.
    """

    watch: Callable[[Step, dict[str, Any]], None] | None = None

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.weights = program, weights
        self.path = weights.package.path

    def new_state(self) -> dict[str, Any]:
        """Zeros for every state, in its declared shape and dtype."""
        return _zeros(self.program, self.path)

    def run(
        self,
        inputs: Mapping[str, Any],
        state: dict[str, Any] | None = None,
        *,
        precision: str = STORAGE,
        ranges: Ranges | None = None,
    ) -> dict[str, Any]:
        """Output name -> array. ``state``: name -> array, replaced as the function writes it.

        FLOAT16 outputs and states are numpy's float16, in precision ``fp32`` float32.
        Raises Refused, naming the operation and its output.
        """
        from loraduct.validation.mil_run import Running

        if precision not in PRECISIONS:
            raise Refused(None, f"precision {precision!r}, expected {', '.join(PRECISIONS)}")
        return Running(self, precision, ranges).run(inputs, state)


def load(package: Package, function: str | None = None, weights: Weights | None = None) -> Machine:
    """A function of a package (None: its default), checked. Raises Refused.

    ``weights``: of the same package, to share with machines of its other functions.
    """
    from loraduct.validation import mil_program

    program = mil_program.read(package, function or default_function(package))
    return Machine(program, weights or Weights(package))


def run(
    package: Package,
    function: str | None,
    inputs: Mapping[str, Any],
    state: dict[str, Any] | None = None,
    *,
    precision: str = STORAGE,
    ranges: Ranges | None = None,
) -> dict[str, Any]:
    """Run a function once; see Machine.run."""
    return load(package, function).run(inputs, state, precision=precision, ranges=ranges)


def new_state(package: Package, function: str | None = None) -> dict[str, Any]:
    """Zeros for every state of a function."""
    return load(package, function).new_state()


def ops_of(package: Package) -> dict[str, list[str]]:
    """Function -> the types of its operations, sorted; known here or not."""
    from loraduct.validation.mil_program import block

    return {
        name: sorted({op.type for op in block(package, name).operations})
        for name in sorted(package.functions)
    }


def supported() -> frozenset[str]:
    """The types of operations that can be run."""
    from loraduct.validation.mil_program import SUPPORTED

    return SUPPORTED


def default_function(package: Package) -> str:
    """The function that runs when none is named."""
    named = package.model.description.defaultFunctionName
    if named or len(package.functions) != 1:
        return str(named or "main")
    return str(next(iter(package.functions)))


def predict(
    path: Path,
    function: str | None,
    inputs: Mapping[str, Any],
    state: dict[str, Any] | None = None,
    compute_units: str = "ALL",
) -> dict[str, Any]:
    """The same call through Core ML itself, on a Mac (states need macOS 15).

    ``compute_units``: ALL, CPU_ONLY, CPU_AND_GPU or CPU_AND_NE. Our tests run on Linux, so this has
    not been run by them. Raises Refused elsewhere, and when Core ML does not load or run it.
    """
    if platform.system() != "Darwin":
        raise Refused(path, f"Core ML runs on a Mac only, this is {platform.system()}")
    try:
        import coremltools
    except ImportError:
        raise MissingExtra("coreml", "running a package on this Mac") from None
    units = getattr(coremltools.ComputeUnit, compute_units, None)
    if units is None:
        raise Refused(None, f"compute units {compute_units!r}, expected ALL, CPU_ONLY, ...")
    try:
        model = coremltools.models.MLModel(str(path), function_name=function, compute_units=units)
        held: Any = model.make_state() if state else None
        for name, value in (state or {}).items():
            held.write_state(name, value)
        found: dict[str, Any] = model.predict(dict(inputs), held)
        for name in state or {}:
            (state or {})[name] = held.read_state(name)
    except Exception as e:  # whatever Core ML raises: RuntimeError, and Exception itself
        raise Refused(path, f"Core ML: {type(e).__name__}: {e}") from None
    return found


def _zeros(program: Program, path: Any) -> dict[str, Any]:
    import numpy as np

    from loraduct.validation.mil_numbers import limited

    made = {}
    for name, held in program.states.items():
        sizes = [s for s in held.shape or () if s is not None]
        if held.shape is None or len(sizes) < len(held.shape):
            raise Refused(path, "a state whose sizes are open", tensor=name)
        made[name] = np.zeros(limited(sizes), NUMPY[held.dtype])
    return made
