"""Whether the base is the one that the adapter was trained on, and means the same to everybody."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.formats.base import Base, correlation, misread_fields, rope_conflicts
from loraduct.tensor import FLOATS, Tensor, as_float32
from loraduct.validation import runtimes
from loraduct.validation.checks import Check
from loraduct.validation.suites import Context, Suite, suite

HALF = (
    1e-3  # relative, of a weight stored in FLOAT16: 2^-11 for one number, and room for small ones
)
SMALLEST = 2.0**-24  # FLOAT16's subnormal numbers
# how far a value of kin, relative, may be off in a copy in another dtype: it and its row's largest were
# rounded to BF16 here, to FLOAT16 and then to BF16 there; and both samples to FLOAT16
CAST = 2 * (2 * 2.0**-8 + 2.0**-11) + 2 * 2.0**-11
_NUMBERS = 1 << 20  # of a weight, at once


def run(context: Context) -> Suite:
    """Identity of each adapter, the base's config, and the weights of packages' bases."""
    labels = ["A", "B"] if len(context.adapters) == 2 else [None]
    pairs = list(zip(labels, context.adapters, strict=True))
    checks = [replace(identity(a, context.base), adapter=label) for label, a in pairs]
    checks.append(config(context.base))
    kin = {str(a.path): alike(a, context.base) for _, a in pairs}
    numbers: dict[str, Any] = {"kin": kin, "weights": []}
    packages = {a.path: (label, a) for label, a in pairs if a.format == "coreml"}
    for label, adapter in packages.values():
        if context.base.has_weights and context.base.quantization is None:
            check, rows = weights(adapter, context.base)
            checks.append(replace(check, adapter=label))
            numbers["weights"] += rows
    return suite("base", checks, numbers)


def alike(adapter: Adapter, base: Base) -> float | None:
    """Correlation of the base's sampled weights with those that the adapter records."""
    recorded = adapter.base.kin
    known = recorded and base.has_weights and base.kin
    return correlation(str(recorded), str(base.kin)) if known else None


def beyond(recorded: str, base: Base) -> int:
    """How many of the base's sampled weights differ by more than a copy's dtype explains from those of
    ``recorded``, of the same size as the base's ``kin``."""
    import numpy as np

    ours, theirs = (
        np.frombuffer(b64decode(k), "<f2").astype(np.float64).reshape(base.sample.shape)
        for k in (str(base.kin), recorded)
    )
    largest = np.abs(base.sample).max(axis=1, keepdims=True)
    allowed = CAST * np.maximum(np.abs(ours), np.abs(theirs))
    allowed += SMALLEST + 2 * SMALLEST / np.maximum(largest, 1e-30)
    return int((np.abs(ours - theirs) > allowed).sum())


def identity(adapter: Adapter, base: Base) -> Check:
    """Whether this is the base the adapter was trained on, as far as files can tell."""
    correlated = alike(adapter, base)
    if correlated is not None:
        what = f"sampled weights correlate {correlated:.4f} with the recorded base's"
        off = beyond(str(adapter.base.kin), base) if correlated >= 0.99 else None
        if off:
            what += (
                f", but {off} of {base.sample.size} are off by more than storing them in another dtype"
                " explains: the base was trained further, has an adapter fused in, or went through few"
                " bits; give the base that the adapter was made for"
            )
        return Check("identity", "failed" if off or correlated < 0.99 else "passed", what)
    name = adapter.base.name
    own = base.config.get("_name_or_path")
    known = {str(own or ""), base.path.name, str(base.path)}
    if name and (name in known or Path(name).name.lower() == base.path.name.lower()):
        return Check("identity", "passed", f"named {name}, as the base is")
    if name:
        return Check(
            "identity",
            "warning",
            f"the adapter names its base {name!r}; whether {base.path.name!r} is that can't be told"
            " from the files (a conversion with --base records it)",
        )
    return Check("identity", "warning", "the adapter does not name its base")


def config(base: Base) -> Check:
    """The trap of rope settings that only one runtime reads, or that contradict each other."""
    if what := rope_trap(base):
        return Check("config", "warning", what)
    return Check("config", "passed", "rope settings stand in the forms that both runtimes read")


def rope_trap(base: Base) -> str | None:
    """In words, what is odd about the base's rope settings."""
    file = base.path / "config.json"
    for field, (old, new) in rope_conflicts(base.config).items():
        return (
            f"{file} has {field}={old} and, in rope_parameters, {new}: transformers and mlx-lm may"
            " each read another one; correct the wrong one by hand"
        )
    missing = misread_fields(base.config)
    if not missing:
        return None
    fields = ", ".join(f"{k}={v}" for k, v in missing.items())
    return (
        f"{file} has {fields} only inside rope_parameters, which most of mlx-lm's models don't"
        " read; --fix-base-config writes both forms"
    )


def weights(adapter: Adapter, base: Base) -> tuple[Check, list[dict[str, Any]]]:
    """Whether the base in the adapter's package holds the base's matrices, as FLOAT16 rounds them.

    Compressed ones are `declared.check`'s. Returns the check and a row for each matrix.
    """
    from loraduct.formats.coreml import record
    from loraduct.formats.coreml.stored import PackageBase

    package = runtimes.package_at(adapter.path)
    held = PackageBase(package, record.read(package))
    rows: list[dict[str, Any]] = []
    guilty = []
    for name, stored in sorted(held.tensors.items()):
        own = base.weight_of(name)
        if len(stored.shape) != 2 or own is None or own.stored_dtype not in FLOATS:
            continue
        if own.shape != stored.shape:
            return Check("weights", "failed", f"shape {stored.shape}, not {own.shape}", name), rows
        error, wrong = _compared(stored, own)
        plain = stored.make is None
        rows.append({"module": name, "error": error, "compressed": not plain})
        if plain and wrong:
            guilty.append((name, error, wrong, own.shape[0]))
    if guilty:
        name, error, wrong, height = guilty[0]
        what = (
            f"{wrong} of {height} rows of the package's base are not the base's (relative error of"
        )
        what += f" the matrix {error:.2g}); {len(guilty)} of {len(rows)} matrices are off"
        return Check("weights", "failed", what, name), rows
    errors = [float(r["error"]) for r in rows if not r["compressed"]]
    what = f"{len(errors)} matrices of the package's base are the base's"
    what += f", to {max(errors, default=0.0):.1e} of their size"
    return Check("weights", "passed", what), rows


def _compared(stored: Tensor, own: Tensor) -> tuple[float, int]:
    """(||W' - W|| / ||W||, how many rows are further off than FLOAT16 explains)."""
    import numpy as np

    whole = stored.read(finite=False) if stored.make is not None else None
    off = size = 0.0
    wrong = 0
    step = max(1, _NUMBERS // own.shape[1])
    for i in range(0, own.shape[0], step):
        j = min(i + step, own.shape[0])
        w = as_float32(own.rows(i, j, finite=False), own.dtype).astype(np.float64)
        if whole is None:
            got = as_float32(stored.rows(i, j, finite=False), stored.dtype).astype(np.float64)
        else:
            got = whole[i:j].astype(np.float64)
        errors, sizes = ((got - w) ** 2).sum(1), (w**2).sum(1)
        allowed = HALF * np.sqrt(sizes) + SMALLEST * w.shape[1] ** 0.5
        wrong += int((~(np.sqrt(errors) <= allowed)).sum())
        off += float(errors.sum())
        size += float(sizes.sum())
    return (off / size) ** 0.5 if size > 0 else float(off > 0), wrong
