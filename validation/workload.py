"""What a decoder reads and computes for one token, from its files alone: nothing is run.

Weights that are looked up by row (an embedding that is no head) are not read whole and don't
count; of experts, the share that a token visits.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.errors import Refused
from loraduct.formats import estimate
from loraduct.formats.base import Base
from loraduct.formats.coreml import record
from loraduct.formats.coreml.constexpr import is_constant
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import (
    blobs_of,
    block_of_function,
    names_in,
    states_of,
    type_of,
)
from loraduct.formats.experts import number_of
from loraduct.modules import kind_of_module
from loraduct.text import printable

HALF = 2  # bytes of a value of the cache
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_STATE_AXIS = 3  # of a package's cache: its tokens
_SEEING = (
    "vision",
    "visual",
    "vision_tower",
    "vision_model",
    "audio_tower",
    "multi_modal_projector",
)
_PLACES = ("wpe", "embed_positions", "position_embeddings")  # looked up by position
_PRODUCTS = ("linear", "matmul", "conv")
_ATTENTION = ("scaled_dot_product_attention", "softmax")


@dataclass(frozen=True)
class Workload:
    """The cost of one token.

    ``weight_bytes``: bytes of weights read; ``macs``: products with weights; ``layers``: blocks;
    ``cache_bytes``: of keys and values that a token adds, and that every later one reads;
    ``buffer_bytes``: of a cache of fixed size, read whole by every token (0: it grows), which
    holds ``buffer_tokens``; ``width``: heads times their dimension; ``stored_bytes``: all weights,
    in memory; ``adapter_bytes``, ``adapter_macs``, ``adapter_ops``: what an adapter that is not
    fused adds (ops: operations a token).
    """

    name: str
    weight_bytes: int
    macs: int
    layers: int
    cache_bytes: int = 0
    buffer_bytes: int = 0
    buffer_tokens: int | None = None
    width: int = 0
    stored_bytes: int = 0
    adapter_bytes: int = 0
    adapter_macs: int = 0
    adapter_ops: int = 0
    context: int | None = None  # the most tokens it was made for, None: not said

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def from_json(value: Any) -> Workload:
    """The way back from `Workload.as_json`. Raises ValueError for what it does not make."""
    try:
        made = Workload(**value)
    except TypeError:
        raise ValueError("has other fields") from None
    for f in fields(made):
        found = getattr(made, f.name)
        if f.name == "name" or (found is None and f.default is None):
            continue
        if type(found) is not int or not 0 <= found < 1 << 62:
            raise ValueError(f"{f.name} is {printable(repr(found), 40)}, expected a count")
    if not made.weight_bytes or not made.macs:
        raise ValueError("reads or computes nothing")
    return replace(made, name=str(made.name))


def of_base(base: Base) -> Workload:
    """A base folder, with or without weights. Raises Refused where its config says too little."""
    layers = base.layers
    if base.quantization is None and "quantization_config" in base.config:
        what = (
            "is quantised in a way that loraduct does not read (quantization_config); give the base"
        )
        raise Refused(base.path / "config.json", f"{what} it was made of, or its config.json")
    if layers is None:
        raise Refused(base.path / "config.json", "does not say the number of layers")
    name = base.path.name or str(base.path)
    width, kv = _heads(base)
    made = Workload(
        name, 0, 0, layers, cache_bytes=2 * HALF * layers * kv, width=width, context=_context(base)
    )
    return _weighed(made, base) if base.has_weights else _counted(made, base)


def _weighed(made: Workload, base: Base) -> Workload:
    """With the bytes and products of the weights in its files."""
    share = _share(base)
    read = macs = stored = 0.0
    for name, tensor in base.tensors.items():
        if any(p in _SEEING for p in name.split(".")):
            continue
        stored += tensor.stored_nbytes
        module = name.rpartition(".")[0]
        kind = kind_of_module(module)
        if (kind == "embedding" and not _tied(base)) or module.rpartition(".")[2] in _PLACES:
            continue
        part = share if kind == "experts" else 1.0
        read += part * tensor.stored_nbytes
        if name.endswith((".weight", "_proj")) and len(tensor.shape) > 1:
            shape = base.shape_of(module) if len(tensor.shape) == 2 else None
            macs += part * math.prod(shape or tensor.shape)
    return replace(made, weight_bytes=round(read), macs=round(macs), stored_bytes=round(stored))


def _counted(made: Workload, base: Base) -> Workload:
    """With the products its config tells of, in the config's dtype or packing."""
    told = estimate.estimate(base.path, 1)
    if told["not_counted"]:
        what = (
            f"does not size {', '.join(told['not_counted'])}; give the base's folder with weights"
        )
        raise Refused(base.path / "config.json", what)
    macs = sum(r["modules"] * o * i for r in told["targets"] for o, i in r["out_in"])
    c = base.text_config
    vocabulary, hidden = c.get("vocab_size"), c.get("hidden_size", c.get("n_embd"))
    if type(vocabulary) is not int or type(hidden) is not int:
        raise Refused(base.path / "config.json", "has no vocab_size and hidden_size")
    head = vocabulary * hidden
    value = _bytes_a_value(base)
    embedding = 0 if _tied(base) else head
    return replace(
        made,
        weight_bytes=round((macs + head) * value),
        macs=macs + head,
        stored_bytes=round((macs + head + embedding) * value),
    )


def _bytes_a_value(base: Base) -> float:
    """Bytes of a weight as the config tells: packed ones with their scales and biases."""
    if base.quantization is not None:
        bits, group = base.quantization.get("bits", 4), base.quantization.get("group_size", 64)
        if type(bits) is not int or type(group) is not int or not (0 < bits <= 8 < group):
            what = f"quantization has bits {bits!r} and group_size {group!r}"
            raise Refused(base.path / "config.json", what)
        return (bits + 32 / group) / 8
    c = base.text_config
    name = str(c.get("dtype") or c.get("torch_dtype") or "float16").removeprefix("torch.")
    if name not in _WIDTHS:
        raise Refused(base.path / "config.json", f"has the dtype {printable(name, 40)!r}")
    return _WIDTHS[name]


def _tied(base: Base) -> bool:
    """Whether the head's weight is the embedding's, which is then read whole."""
    return base.stored_head is None if base.has_weights else base.tied is not False


def _share(base: Base) -> float:
    """Of its experts, the part a token visits."""
    number = number_of(base.text_config)
    if not number:
        return 1.0
    c = base.text_config
    active = next(
        (c[k] for k in ("num_experts_per_tok", "moe_topk", "num_selected") if k in c), None
    )
    if type(active) is not int or not 0 < active <= number:
        raise Refused(base.path / "config.json", "does not say how many experts a token visits")
    return active / number


def _heads(base: Base) -> tuple[int, int]:
    """(heads x dimension, values a token adds to keys in a block)."""
    c = base.text_config

    def of(*names: str) -> int | None:
        return next((c[n] for n in names if type(c.get(n)) is int and c[n] > 0), None)

    heads, hidden = of("num_attention_heads", "n_head"), of("hidden_size", "n_embd", "d_model")
    if heads is None or hidden is None:
        return 0, 0  # no attention of this kind, such as Mamba's
    dimension = of("head_dim") or hidden // heads
    if latent := of("kv_lora_rank"):  # one latent vector and one rotated key, for k and v alike
        return heads * dimension, (latent + (of("qk_rope_head_dim") or 0)) // 2
    return heads * dimension, (of("num_key_value_heads") or heads) * dimension


def _context(base: Base) -> int | None:
    found = [base.text_config.get(k) for k in ("max_position_embeddings", "n_positions", "n_ctx")]
    return next((v for v in found if type(v) is int and v > 0), None)


def with_adapter(made: Workload, adapter: Adapter, base: Base, *, fused: bool = False) -> Workload:
    """``made`` of ``base``, with an adapter beside its weights; one that is fused costs nothing.

    Of a low-rank update two products (x A, then B), its scale and the sum: 4 operations. DoRA's norm
    of the adapted weight is computed in every call, by PEFT 0.21 and mlx-lm 0.32 alike: the weight is
    read, the sum is written and read again, at 2 bytes a value, in 4 operations more. Of experts the
    share that a token visits counts; of an embedding's A one row is looked up.
    """
    name = f"{made.name} + {adapter.name or adapter.path.name}"
    if fused:
        return replace(made, name=f"{name} fused")
    nbytes = macs = ops = 0.0
    for module, u in adapter.low_rank.items():
        experts = u.layout == "experts" or kind_of_module(module) == "experts"
        part = _share(base) if experts else 1.0
        dora = u.magnitude is not None
        # a stacked update is one operation for all of its experts, others are one an expert
        ops += (1.0 if u.layout == "experts" else part) * (8 if dora else 4)
        if u.layout == "embedding" and not _whole(u, adapter, base):
            rows = u.a.shape[1]  # of the table: one of them is looked up, and its magnitude
            nbytes += sum(t.stored_nbytes / (rows if t is not u.b else 1) for t in u.tensors)
            macs += math.prod(u.b.shape)
            continue
        nbytes += part * sum(t.stored_nbytes for t in u.tensors)
        nbytes += part * 3 * HALF * math.prod(u.shape) if dora else 0
        macs += part * sum(math.prod(t.shape) for t in (u.a, u.b))
    return replace(
        made,
        name=name,
        adapter_bytes=round(nbytes),
        adapter_macs=round(macs),
        adapter_ops=round(ops),
    )


def _whole(u: LowRank, adapter: Adapter, base: Base) -> bool:
    """Whether a token reads all of an embedding's update: mlx-lm's moves a tied head too, and the norm
    of PEFT's DoRA is that of the whole table.
    """
    return _tied(base) if adapter.format == "mlx" else u.magnitude is not None


# -- packages --------------------------------------------------------------------------------------


def of_package(package: Package, function: str) -> Workload:
    """A function of a package, from its program."""
    if function not in package.functions:
        raise Refused(package.path, f"holds no function {printable(function, 80)!r}")
    one = _Counts(package, package.functions[function])
    found = record.find(package)
    rows = found["functions"] if found else {}
    base = None
    if rows.get(function, {}).get("adapters"):
        q = rows[function]["q"]
        names = [f for f, r in rows.items() if not r["adapters"] and r["q"] == q]
        base = _Counts(package, package.functions[names[0]]) if names else None
    layers = (found["base"]["layers"] if found else None) or one.attentions or 1
    plain = base or one
    return Workload(
        f"{package.path.name}:{function}",
        plain.read,
        plain.macs,
        layers,
        cache_bytes=one.buffer // one.tokens if one.tokens else 0,
        buffer_bytes=one.buffer,
        buffer_tokens=one.tokens,
        width=one.width,
        stored_bytes=one.stored,
        adapter_bytes=max(0, one.read - base.read) if base else 0,
        adapter_macs=max(0, one.macs - base.macs) if base else 0,
        adapter_ops=max(0, one.ops - base.ops) if base else 0,
        context=one.tokens,
    )


class _Counts:
    """What one function reads and computes."""

    def __init__(self, package: Package, function: Any) -> None:
        self.package = package
        operations = list(block_of_function(function).operations)
        self.held = {o.outputs[0].name: o for o in operations if is_constant(o)}
        self.shapes = {out.name: type_of(out.type)[1] for o in operations for out in o.outputs}
        working = [o for o in operations if not is_constant(o)]
        self.ops = len(working)
        kinds = [o.type for o in working]
        self.attentions = next((kinds.count(k) for k in _ATTENTION if k in kinds), 0)
        self.macs = sum(self._macs(o) for o in working if o.type in _PRODUCTS)
        blobs: dict[tuple[str, int], int] = {}
        looked_up: dict[tuple[str, int], int] = {}
        for op in working:
            for parameter in op.inputs:
                rows_only = op.type.startswith("gather") and parameter == "x"
                for name in names_in(op, parameter):
                    (looked_up if rows_only else blobs).update(self._blobs(name))
        self.read = sum(blobs.values())
        self.stored = sum((looked_up | blobs).values())
        self.buffer, self.tokens = _buffer(function)
        self.width = self._width(working)

    def _macs(self, op: Any) -> int:
        """Products of one row with the operation's weight."""
        for parameter in ("weight", "y", "x"):
            for name in names_in(op, parameter):
                if name in self.held:
                    return math.prod(n or 1 for n in self.shapes[name])
        return 0

    def _blobs(self, name: str) -> dict[tuple[str, int], int]:
        """(file, offset) -> bytes of what a constant is made of, through decompression."""
        found: dict[tuple[str, int], int] = {}
        left = [name]
        seen = set()
        while left:
            one = left.pop()
            if one in seen or one not in self.held:
                continue
            seen.add(one)
            op = self.held[one]
            for blob in blobs_of(op):
                data, end = self.package.blob_file(blob.fileName).span(blob.offset, one)
                found[blob.fileName, blob.offset] = end - data
            left += [n for p in op.inputs for n in names_in(op, p)]
        return found

    def _width(self, working: list[Any]) -> int:
        """Heads times dimension, of the first attention; 0 where its shape is open."""
        for op in working:
            if op.type == _ATTENTION[0]:
                shape = self.shapes[op.outputs[0].name]
                heads, dimension = (shape[-3], shape[-1]) if len(shape) >= 3 else (None, None)
                return (heads or 0) * (dimension or 0)
        return 0


def _buffer(function: Any) -> tuple[int, int | None]:
    """Bytes of a function's states, and the tokens they hold (None: no states of that layout)."""
    total, tokens = 0, None
    for named in states_of(function):
        dtype, shape = type_of(named.type)
        sizes = [n or 1 for n in shape]
        total += math.prod(sizes) * (4 if dtype == "FLOAT32" else HALF)
        if len(sizes) > _STATE_AXIS:
            tokens = sizes[_STATE_AXIS]
    return total, tokens


def read_package(path: Path, name: str | None) -> tuple[Package, str]:
    """A package and the function that serves one token of adapter or function ``name``."""
    from loraduct.formats.coreml.package import read

    package = read(path)
    return package, functions_of(package, name)[0]


def functions_of(package: Package, name: str | None) -> list[str]:
    """The functions that serve adapter or function ``name`` (None: the base alone, or the default).

    Of fixed shapes several, that of the fewest tokens first. Raises Refused naming what there is.
    """
    if name is not None and name in package.functions:
        return [name]
    found = record.find(package)
    rows = found["functions"] if found else {}
    wanted = {
        f: r for f, r in rows.items() if [m for m, _ in r["adapters"]] == ([name] if name else [])
    }
    if not wanted and name is None:
        default = package.model.description.defaultFunctionName or next(iter(package.functions))
        return [str(default)]
    if not wanted:
        known = ", ".join(printable(f, 60) for f in list(package.functions)[:12])
        what = f"holds no function or adapter {printable(str(name), 80)!r}: {known}"
        raise Refused(package.path, what)
    return sorted(wanted, key=lambda f: (wanted[f]["q"] or 1, f))
