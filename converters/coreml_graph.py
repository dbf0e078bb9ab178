"""A decoder as an ML program: one function, from the table of features.

Conventions are those of Apple's stateful Mistral for Core ML (Hugging Face, "WWDC 24: Running
Mistral 7B with Core ML"): ``inputIds`` (1, q), ``causalMask`` (1, 1, q, end) added to the scores,
states ``keyCache`` and ``valueCache`` (layers, 1, heads, context, head_dim), ``logits`` (1, q,
vocabulary). How much is cached already is end - q.

RMSNorm is computed in a form that fits FLOAT16 whatever x is: with m = max(|x|, 1/256),
x / rms(x) = (x/m) / sqrt(mean((x/m)^2) + eps/m^2), and nothing squared exceeds 1. The naive form
overflows as soon as one activation exceeds 255, which real models reach by far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraduct.converters.decoder import Decoder
from loraduct.formats.coreml.graph import BOOL, INT, Graph, Value
from loraduct.formats.coreml.program import feature, mangled
from loraduct.formats.coreml.schema import new

SMALLEST = (
    1 / 256
)  # what RMSNorm divides by at least: eps / m**2 then stays below FLOAT16's largest
MASKED = -30000.0  # added to, or instead of, a score that must not count
IDS, MASK, POSITION, LOGITS = "inputIds", "causalMask", "position", "logits"
KEYS, VALUES = "keyCache", "valueCache"
COS, SIN = "cos", "sin"
FUSED_ATTENTION = ("CoreML8",)  # opsets with scaled_dot_product_attention: from iOS18 on


@dataclass(frozen=True)
class Form:
    """How a program is shaped. ``q``: a fixed number of tokens per call, else any.

    ``inputs``: module kind -> (rank, in, out) of adapters that come as arguments.
    """

    opset: str
    context: int
    stateless: bool = False
    q: int | None = None
    inputs: dict[str, tuple[int, int, int]] | None = None


class Weights:
    """Looks a parameter up: ``find(name)`` gives its shape and offset in the weight file, or None."""

    def __init__(
        self, graph: Graph, find: Callable[[str], tuple[tuple[int, ...], int] | None], file: str
    ) -> None:
        self.graph, self.find, self.file = graph, find, file

    def get(self, name: str) -> Value | None:
        """The constant of a parameter, if the model has it."""
        found = self.find(name)
        return found and self.graph.weight(mangled(name), found[0], found[1], self.file)

    def __getitem__(self, name: str) -> Value:
        value = self.get(name)
        assert value is not None, name
        return value


@dataclass(frozen=True)
class Place:
    """Where the tokens of a call stand: what every layer shares."""

    q: int | None
    end: int | None
    masks: dict[int | None, Value]
    turns: dict[str, tuple[Value, Value]]
    begin: Value | None  # (1,) positions before; None: no cache
    stop: Value | None


def function(
    decoder: Decoder, form: Form, find: Callable[[str], tuple[tuple[int, ...], int] | None],
    file: str, name: str,
) -> tuple[Any, Any]:  # fmt: skip
    """The Function and its FunctionDescription."""
    g = Graph(form.opset)
    w = Weights(g, find, file)
    q = form.q
    ids = g.input(IDS, INT, (1, q))
    end = form.context if q and not form.stateless else None
    mask = g.input(MASK, "FLOAT16", (1, 1, q, end if not form.stateless else q))
    cached = not form.stateless
    position = g.input(POSITION, INT, (1,)) if q and cached else None
    factors = _adapter_inputs(g, decoder, form)
    cache: dict[str, Value] = {}
    if cached:
        shape = (decoder.layers, 1, decoder.kv_heads, form.context, decoder.head_dim)
        cache = {n: g.state(n, shape) for n in (KEYS, VALUES)}
    place = _place(g, decoder, form, w, ids, mask, position)
    x = _embedding(g, decoder, form, w, ids)
    held: dict[str, Value] = {n: g.read_state(n + "_now", s) for n, s in cache.items()}
    for i in range(decoder.layers):
        x = _layer(g, decoder, form, w, place, x, i, cache, held, factors)
    x = _norm(g, decoder, w, "model.norm", "norm", x)
    head = "model.embed_tokens.weight" if decoder.tied else "lm_head.weight"
    capped = decoder.logits_cap is not None
    out = _module(g, w, "lm_head", x, None, weight=head)
    if capped:
        out = _cap(g, "head", out, float(decoder.logits_cap or 1))
    out = g.unary("identity", LOGITS, out)  # the output has its own name, whatever is adapted
    return g.function([out]), _description(decoder, form, name, factors)


def _place(
    g: Graph, d: Decoder, form: Form, w: Weights, ids: Value, mask: Value, position: Value | None
) -> Place:
    """Positions, masks and rotations of the call's tokens."""
    q, one = form.q, g.constant(1, INT)
    begin = stop = None
    if form.stateless and q:
        rows = cols = g.constant(list(range(q)), INT)
        count: int | None = q
    elif position is not None:  # fixed shapes: the mask spans the whole context
        assert q is not None
        begin, count = position, form.context
        stop = g.binary("add", "stop", position, q)
        rows = g.binary("add", "rows", g.constant(list(range(q)), INT), position)
        cols = g.constant(list(range(count)), INT)
    else:
        # sizes are only known now: begin = end - q
        sizes = [
            g.slice(
                n, g.op("shape", f"{n}_shape", (len(v.shape),), {"x": v}, INT), (1,), [a], [a + 1]
            )
            for n, v, a in (("q", ids, 1), ("stop", mask, 3))
        ]
        count, stop = None, sizes[1]
        begin = g.binary("sub", "begin", stop, sizes[0])
        scalars = [g.op("squeeze", f"{v.name}0", (), {"x": v}, INT) for v in (begin, stop)]
        rows = g.op(
            "range_1d", "rows", (None,), {"start": scalars[0], "end": scalars[1], "step": one}, INT
        )
        cols = rows
        if not form.stateless and any(_short(d, form)):
            cols = g.op(
                "range_1d", "cols", (None,),
                {"start": g.constant(0, INT), "end": scalars[1], "step": one}, INT,
            )  # fmt: skip
    masks: dict[int | None, Value] = {None: mask}
    back = None
    for window in sorted(set(_short(d, form))):
        if back is None:
            left = g.op(
                "expand_dims",
                "rows4",
                (1, 1, q, 1),
                {"x": rows, "axes": g.constant([0, 1, 3], INT)},
                INT,
            )
            right = g.op(
                "expand_dims",
                "cols4",
                (1, 1, 1, count),
                {"x": cols, "axes": g.constant([0, 1, 2], INT)},
                INT,
            )
            back = g.binary("sub", "back", left, right)
        far = g.binary("greater_equal", f"far{window}", back, window, BOOL)
        masks[window] = g.op(
            "select", f"window{window}", mask.shape,
            {"cond": far, "a": g.constant(MASKED, "FLOAT16"), "b": mask},
        )  # fmt: skip
    turns = {}
    for kind in sorted({r for r in d.ropes if r}):
        pair = []
        for part in (COS, SIN):
            table = w[table_name(part, kind)]
            shape = (q, table.shape[1])
            pair.append(_rows(g, f"{part}_{kind[:4]}", table, rows, shape))
        turns[kind] = (pair[0], pair[1])
    return Place(q, count, masks, turns, None if form.stateless else begin, stop)


def _short(d: Decoder, form: Form) -> list[int]:
    """Windows that the context exceeds: the others mask nothing."""
    return [w for w in d.windows if w and w < form.context]


def table_name(part: str, kind: str) -> str:
    """The constant that holds cos or sin of a kind of layer."""
    return f"rope.{kind}.{part}"


def _rows(g: Graph, name: str, table: Value, indices: Value, shape: Any) -> Value:
    extra: dict[str, Value] = {
        "axis": g.constant(0, INT),
        "batch_dims": g.constant(0, INT),
        "validate_indices": g.constant(False, BOOL),
    }
    return g.op("gather", name, shape, {"x": table, "indices": indices, **extra})


def _embedding(g: Graph, d: Decoder, form: Form, w: Weights, ids: Value) -> Value:
    name = "model.embed_tokens"
    x = _rows(g, mangled(name), w[f"{name}.weight"], ids, (1, form.q, d.hidden))
    return x if d.embed_scale is None else g.binary("mul", "scaled", x, d.embed_scale)


def _norm(g: Graph, d: Decoder, w: Weights, module: str, name: str, x: Value) -> Value:
    """RMSNorm over the last axis; see the module's docstring."""
    most = g.reduce("reduce_max", f"{name}_max", g.unary("abs", f"{name}_abs", x))
    most = g.binary("maximum", f"{name}_m", most, SMALLEST)
    y = g.binary("real_div", f"{name}_y", x, most)
    mean = g.reduce("reduce_mean", f"{name}_mean", g.binary("mul", f"{name}_sq", y, y))
    root = g.op(
        "real_div",
        f"{name}_e",
        most.shape,
        {"x": g.constant(math.sqrt(d.eps), "FLOAT16"), "y": most},
    )
    total = g.binary("add", f"{name}_ms", mean, g.binary("mul", f"{name}_e2", root, root))
    unit = g.unary("rsqrt", f"{name}_r", total, epsilon=g.constant(0.0, "FLOAT16"))
    z = g.binary("mul", f"{name}_z", y, unit)
    scaled = g.binary("mul", f"{name}_w", z, w[f"{module}.weight"])
    return g.binary("add", f"{name}_o", z, scaled) if d.family.norm_plus_one else scaled


def _module(
    g: Graph, w: Weights, module: str, x: Value, factors: tuple[Value, Value] | None,
    weight: str | None = None, layer: int = 0,
) -> Value:  # fmt: skip
    """A linear layer; its result bears the module's name, by which adapters find it."""
    y = g.linear(mangled(module), x, w[weight or f"{module}.weight"], w.get(f"{module}.bias"))
    if factors is None:
        return y
    stem = f"L{layer}_{module.rpartition('.')[2]}"
    a, b = (
        g.slice(
            f"{stem}_{n}", f, f.shape[1:], [layer, 0, 0], [layer + 1, 0, 0],
            to_end=[False, True, True], squeeze=[True, False, False],
        )
        for n, f in zip("ab", factors, strict=True)
    )  # fmt: skip
    low = g.matmul(f"{stem}_xa", x, a, transpose_y=True)
    return g.binary("add", f"{stem}_sum", y, g.matmul(f"{stem}_xab", low, b, transpose_y=True))


def _cap(g: Graph, name: str, x: Value, cap: float) -> Value:
    """cap * tanh(x / cap)."""
    inner = g.unary("tanh", f"{name}_tanh", g.binary("mul", f"{name}_in", x, 1 / cap))
    return g.binary("mul", f"{name}_cap", inner, cap)


def _layer(
    g: Graph, d: Decoder, form: Form, w: Weights, place: Place, x: Value, i: int,
    cache: dict[str, Value], held: dict[str, Value], factors: dict[str, tuple[Value, Value]],
) -> Value:  # fmt: skip
    """One block: attention and feed-forward, each with its residual."""
    base, n = f"model.layers.{i}.", f"L{i}"

    def module(name: str, value: Value) -> Value:
        return _module(g, w, base + name, value, factors.get(name.rpartition(".")[2]), layer=i)

    h = _norm(g, d, w, f"{base}input_layernorm", f"{n}_n1", x)
    h = _attention(g, d, form, w, place, h, i, cache, held, module)
    if d.family.sandwich:
        h = _norm(g, d, w, f"{base}post_attention_layernorm", f"{n}_n2", h)
    x = g.binary("add", f"{n}_x1", x, h)
    before = "pre_feedforward_layernorm" if d.family.sandwich else "post_attention_layernorm"
    h = _norm(g, d, w, base + before, f"{n}_n3", x)
    if d.family.fused:
        gate, up = g.split(f"{n}_gu", module("mlp.gate_up_proj", h), [d.intermediate] * 2)
    else:
        gate, up = module("mlp.gate_proj", h), module("mlp.up_proj", h)
    h = module("mlp.down_proj", g.binary("mul", f"{n}_act", _activation(g, d, f"{n}_g", gate), up))
    if d.family.sandwich:
        h = _norm(g, d, w, f"{base}post_feedforward_layernorm", f"{n}_n4", h)
    return g.binary("add", f"{n}_x2", x, h)


def _activation(g: Graph, d: Decoder, name: str, x: Value) -> Value:
    modes = {"gelu": "EXACT", "gelu_tanh": "TANH_APPROXIMATION"}
    if d.activation == "silu":
        return g.unary("silu", name, x)
    return g.unary("gelu", name, x, mode=g.constant(modes[d.activation], "STRING"))


def _attention(
    g: Graph, d: Decoder, form: Form, w: Weights, place: Place, h: Value, i: int,
    cache: dict[str, Value], held: dict[str, Value], module: Callable[[str, Value], Value],
) -> Value:  # fmt: skip
    n, size = f"L{i}", d.head_dim
    if d.family.fused:
        sizes = [d.heads * size, d.kv_heads * size, d.kv_heads * size]
        parts = g.split(f"{n}_qkv", module("self_attn.qkv_proj", h), sizes)
    else:
        parts = [module(f"self_attn.{p}_proj", h) for p in "qkv"]
    q, k, v = (
        g.transpose(
            f"{n}_{p}t",
            g.reshape(
                f"{n}_{p}r", part, (1, place.q, heads, size), [1, place.q or -1, heads, size]
            ),
            [0, 2, 1, 3],
        )
        for p, part, heads in zip("qkv", parts, (d.heads, d.kv_heads, d.kv_heads), strict=True)
    )
    if d.family.qk_norm:
        where = f"model.layers.{i}.self_attn."
        q = _norm(g, d, w, f"{where}q_norm", f"{n}_qn", q)
        k = _norm(g, d, w, f"{where}k_norm", f"{n}_kn", k)
    if (kind := d.ropes[i]) is not None:
        q, k = (_turn(g, f"{n}_{p}", x, *place.turns[kind]) for p, x in (("q", q), ("k", k)))
    if cache:
        k, v = _cached(g, d, form, place, i, cache, held, k, v)
    k, v = (_repeat(g, d, f"{n}_{p}", x) for p, x in (("k", k), ("v", v)))
    window = d.windows[i]
    mask = place.masks[window if window and window < form.context else None]
    out = _attend(g, d, form, n, q, k, v, mask)
    out = g.transpose(f"{n}_ot", out, [0, 2, 1, 3])
    flat = d.heads * size
    out = g.reshape(f"{n}_or", out, (1, place.q, flat), [1, place.q or -1, flat])
    return module("self_attn.o_proj", out)


def _turn(g: Graph, name: str, x: Value, cos: Value, sin: Value) -> Value:
    """Rotated by position: the halves of the rotated part swapped; sin has their signs."""
    size, turned = x.shape[-1], cos.shape[-1]
    assert size is not None
    assert turned is not None
    rest = None
    if turned < size:
        x, rest = g.split(f"{name}_part", x, [turned, size - turned])
    low, high = g.split(f"{name}_half", x, [turned // 2] * 2)
    swapped = g.concat(f"{name}_swap", [high, low], -1)
    done = g.binary(
        "add", f"{name}_rope", g.binary("mul", f"{name}_cos", x, cos),
        g.binary("mul", f"{name}_sin", swapped, sin),
    )  # fmt: skip
    return done if rest is None else g.concat(f"{name}_all", [done, rest], -1)


def _cached(
    g: Graph, d: Decoder, form: Form, place: Place, i: int, cache: dict[str, Value],
    held: dict[str, Value], k: Value, v: Value,
) -> tuple[Value, Value]:  # fmt: skip
    """Write this call's keys and values behind what is cached; give all of them."""
    assert place.begin is not None
    assert place.stop is not None
    zeros = g.constant([0], INT)
    begin = g.concat(f"L{i}_at", [g.constant([i, 0, 0], INT), place.begin, zeros], 0)
    stop = g.concat(f"L{i}_to", [g.constant([i + 1, 0, 0], INT), place.stop, zeros], 0)
    squeeze, to_end = [True] + [False] * 4, [False, True, True, False, True]
    found = []
    for name, new_part in ((KEYS, k), (VALUES, v)):
        p = f"L{i}_{name[0]}"
        full = g.update(
            f"{p}_new", held[name], new_part, begin, stop, to_end=to_end, squeeze=squeeze
        )
        g.write_state(f"{p}_write", cache[name], full)
        held[name] = g.read_state(f"{p}_now", cache[name])
        shape = (1, d.kv_heads, place.end, d.head_dim)
        first = [i, 0, 0, 0, 0]
        if form.q:  # all of the context: the mask says what counts
            last: Value | list[int] = [i + 1, 0, 0, 0, 0]
            to_end_all = [False, True, True, True, True]
        else:
            last, to_end_all = stop, to_end
        found.append(
            g.slice(f"{p}_all", held[name], shape, first, last, to_end=to_end_all, squeeze=squeeze)
        )
    return found[0], found[1]


def _repeat(g: Graph, d: Decoder, name: str, x: Value) -> Value:
    """Each key and value head serves several query heads."""
    times = d.heads // d.kv_heads
    if times == 1:
        return x
    end = x.shape[2]
    x = g.tile(f"{name}_tile", g.expand(f"{name}_x", x, 2), [1, 1, times, 1, 1])
    shape = (1, d.heads, end, d.head_dim)
    return g.reshape(f"{name}_heads", x, shape, [1, d.heads, end or -1, d.head_dim])


def _attend(
    g: Graph, d: Decoder, form: Form, n: str, q: Value, k: Value, v: Value, mask: Value
) -> Value:
    """softmax(scale q k^T + mask) v. The fused operation divides by sqrt(head_dim) itself."""
    own = d.scale * math.sqrt(d.head_dim)
    if form.opset in FUSED_ATTENTION and d.attention_cap is None:
        if abs(own - 1) > 1e-6:
            q = g.binary("mul", f"{n}_qs", q, own)
        inputs = {"query": q, "key": k, "value": v, "attn_mask": mask}
        return g.op("scaled_dot_product_attention", f"{n}_att", q.shape, dict(inputs))
    # scaled before the product, so that the scores stay in range
    scores = g.matmul(f"{n}_qk", g.binary("mul", f"{n}_qs", q, d.scale), k, transpose_y=True)
    if d.attention_cap is not None:
        scores = _cap(g, f"{n}_s", scores, float(d.attention_cap))
    scores = g.binary("add", f"{n}_sm", scores, mask)
    weights = g.unary("softmax", f"{n}_p", scores, axis=g.constant(-1, INT))
    return g.matmul(f"{n}_att", weights, v)


def _adapter_inputs(g: Graph, d: Decoder, form: Form) -> dict[str, tuple[Value, Value]]:
    """Arguments that hold an adapter: per module kind a (layers, r, in) and b (layers, out, r)."""
    found = {}
    for kind, (rank, width, height) in (form.inputs or {}).items():
        a = g.input(f"lora_a_{kind}", "FLOAT16", (d.layers, rank, width))
        b = g.input(f"lora_b_{kind}", "FLOAT16", (d.layers, height, rank))
        found[kind] = (a, b)
    return found


def _description(d: Decoder, form: Form, name: str, factors: dict[str, tuple[Value, Value]]) -> Any:
    """Inputs with their ranges, states, the output."""
    made = new("FunctionDescription", name=name)
    many = (form.q, form.q) if form.q else (1, form.context)
    span = (form.context, form.context) if form.q and not form.stateless else many
    made.input.append(feature(IDS, INT, [(1, 1), many]))
    made.input.append(feature(MASK, "FLOAT16", [(1, 1), (1, 1), many, span]))
    if form.q and not form.stateless:
        made.input.append(feature(POSITION, INT, [(1, 1)]))
    for pair in factors.values():
        for value in pair:
            shape = [(s, s) for s in value.shape if s is not None]
            made.input.append(feature(value.name, "FLOAT16", shape))
    out = made.output.add(name=LOGITS)
    out.CopyFrom(feature(LOGITS, "FLOAT16", []))
    if not form.stateless:
        sizes = (d.layers, 1, d.kv_heads, form.context, d.head_dim)
        for state in (KEYS, VALUES):
            made.state.append(feature(state, "FLOAT16", [(s, s) for s in sizes], state=True))
    return made
