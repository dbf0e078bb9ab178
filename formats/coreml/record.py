"""What loraduct writes into a package's metadata: its base, functions and adapters.

JSON under the key ``loraduct`` of the description's ``userDefined`` texts (coremltools refuses a
program with attributes of its own)::

    {"format": 1, "version": "...",
     "base": {"model_type", "name", "kin", "tied", "layers", "parameters": [names]},
     "functions": {function: {"adapters": [[name, weight], ...], "q": tokens per call or null}},
     "adapters": {name: {"method", "source", "config", "origin", "metadata", "base",
                         "modules": {module: {"rank", "scale", ...}}, "replaced": {parameter: {...}}}},
     "weights": {"end": bytes, "blobs": count},
     "compression": {"base": how, "adapter": how}}

``adapters`` are those that a function uses; a row of ``modules`` also has, where they are not
usual, ``layout``, ``dtypes`` before rounding, ``fold`` (b is stored times 2**fold), ``extra``
(which of magnitude and bias there are) and ``sums`` (CRC-32 of factors that came in few bits, as their
constants have them; null where one is stored in full). ``weights`` is how much of the weight file belongs to
this or an earlier program: what lies behind was left by a writer that was killed.
``compression``, where there was one: ``lut4``, ``int8``, or ``lut`` for a width of each tensor's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraduct.errors import Refused
from loraduct.tensor import FLOATS
from loraduct.text import printable
from loraduct.version import __version__

if TYPE_CHECKING:
    from loraduct.formats.base import Base
    from loraduct.formats.coreml.package import Package

KEY = "loraduct"
FORMAT = 1
BASE = "base"  # the function without an adapter; of several, how their names begin
LAYOUTS = ("linear", "embedding")
EXTRAS = ("magnitude", "bias")
_MOST_FOLD = 64


def fresh(base: Base, functions: Mapping[str, int | None], *, tied: bool) -> dict[str, Any]:
    """The record of a new package. ``functions``: name -> tokens per call (None: any number).
    ``tied``: whether the package's head is the embedding."""
    name = base.config.get("_name_or_path")
    return {
        "format": FORMAT,
        "version": __version__,
        "base": {
            "model_type": base.model_type,
            "name": name if isinstance(name, str) and name else None,
            "kin": base.kin if base.has_weights else None,
            "tied": tied,
            "layers": base.layers,
            "parameters": sorted(base.tensors) if base.has_weights else [],
        },
        "functions": {f: {"adapters": [], "q": q} for f, q in functions.items()},
        "adapters": {},
    }


def write(model: Any, record: Mapping[str, Any]) -> None:
    """Put the record into a Model message."""
    # unsorted: of two patterns in a config the first one wins
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    model.description.metadata.userDefined[KEY] = text


def find(package: Package) -> dict[str, Any] | None:
    """The package's record; None when it has none. Raises Refused for one that is broken."""
    texts = package.model.description.metadata.userDefined
    if KEY not in texts:
        return None
    try:
        value = json.loads(texts[KEY], parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(package.spec_path, "holds a loraduct record that is not JSON") from None
    if isinstance(value, dict) and value.get("format") != FORMAT:
        found = printable(repr(value.get("format")), 40)
        raise Refused(
            package.spec_path, f"holds a loraduct record of format {found}, expected {FORMAT}"
        )
    if what := _wrong(value, package.functions):
        raise Refused(package.spec_path, f"holds a broken loraduct record: {what}")
    return value  # type: ignore[no-any-return]


def read(package: Package) -> dict[str, Any]:
    """The package's record. Raises Refused for a package that loraduct has not built."""
    value = find(package)
    if value is None:
        raise Refused(
            package.path,
            "holds no loraduct record: which adapters and modules it has can't be told; build it with"
            " `loraduct package --base BASE`",
        )
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(text)


def _wrong(value: Any, functions: Mapping[str, Any]) -> str | None:
    """What of a record is not as it should be."""
    parts = ("base", "functions", "adapters")
    if not isinstance(value, dict) or not all(isinstance(value.get(p), dict) for p in parts):
        return "base, functions and adapters are expected"
    base, adapters, weights = value["base"], value["adapters"], value.get("weights")
    texts = all(isinstance(base.get(k), str | None) for k in ("model_type", "name", "kin"))
    names = base.get("parameters")
    if not texts or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return "base has values of other types"
    if not isinstance(base.get("tied"), bool | None) or not _count(base.get("layers"), none=True):
        return "base has values of other types"
    for name, f in value["functions"].items():
        rows = f.get("adapters") if isinstance(f, dict) else None
        if name not in functions:
            return f"function {printable(repr(name), 80)} is not in the program"
        if not isinstance(rows, list) or not all(_is_member(r, adapters) for r in rows):
            return f"the adapters of function {printable(repr(name), 80)}"
        if not _count(f.get("q"), none=True):
            return f"q of function {printable(repr(name), 80)}"
    for name, one in adapters.items():
        if not _is_adapter(one):
            return f"adapter {printable(repr(name), 80)}"
    told = value.get("compression", {})
    if not isinstance(told, dict) or not all(isinstance(t, str) for t in told.values()):
        return "compression"
    sound = isinstance(weights, dict) and all(_count(weights.get(k)) for k in ("end", "blobs"))
    return None if weights is None or sound else "weights"


def _count(value: Any, *, none: bool = False) -> bool:
    return (none and value is None) or (type(value) is int and 0 <= value < 1 << 62)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_member(row: Any, adapters: Mapping[str, Any]) -> bool:
    pair = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
    return pair and row[0] in adapters and _number(row[1])


def _is_adapter(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and one.get("method") in ("lora", "dora", "full")
        and isinstance(one.get("source"), str)
        and isinstance(one.get("config"), dict)
        and _is_past(one.get("origin"))
        and isinstance(one.get("metadata"), dict)
        and all(isinstance(v, str) for v in one["metadata"].values())
        and isinstance(one.get("base"), dict)
        and isinstance(one.get("modules"), dict)
        and all(_is_row(r) for r in one["modules"].values())
        and isinstance(one.get("replaced"), dict)
        and all(_is_replaced(r) for r in one["replaced"].values())
    )


def _is_past(past: Any) -> bool:
    """What `loraduct.origin` recorded of an adapter that was a conversion itself."""
    return past is None or (
        isinstance(past, dict)
        and isinstance(past.get("format"), str)
        and isinstance(past.get("config"), dict)
        and isinstance(past.get("blocks", ""), str)
        and isinstance(past.get("joined", {}), dict)
        and all(type(r) is int and r > 0 for r in past.get("joined", {}).values())
    )


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not _count(row.get("rank")) or not row["rank"]:
        return False
    sums = row.get("sums", [])
    dtypes, extra, fold = row.get("dtypes", []), row.get("extra", []), row.get("fold", 0)
    return (
        _number(row.get("scale"))
        and row.get("layout", "linear") in LAYOUTS
        and isinstance(dtypes, list)
        and all(d in FLOATS for d in dtypes)
        and isinstance(extra, list)
        and all(e in EXTRAS for e in extra)
        and len(dtypes) in (0, 2 + len(extra))
        and type(fold) is int
        and abs(fold) <= _MOST_FOLD
        and isinstance(sums, list)
        and len(sums) in (0, 2)
        and all(_count(n, none=True) for n in sums)
    )


def _is_replaced(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("origin"), str)
        and isinstance(row.get("const"), str)
        and row.get("dtype", "F16") in FLOATS
    )
