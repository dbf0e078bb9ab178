"""PEFT's methods whose update is exactly low-rank, without the base's weights (peft 0.21.2).

Each function turns one module's tensors into an update; its docstring has PEFT's formula, with
o x i the shape of the base's weight, and the file it was read in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from loraduct.adapter import LowRank, Update
from loraduct.formats.peft_given import (
    Array,
    Given,
    Part,
    computed,
    factored,
    integers,
    low_rank,
    wide,
)
from loraduct.formats.torch_draws import first_normals
from loraduct.tensor import UNIT_ROUNDOFF, Tensor


def adalora(g: Given) -> LowRank | None:
    """dW = B @ (A * E) * lora_alpha / (init_r + 1e-5); A (r, i), E (r, 1), B (o, r).

    tuners/adalora/layer.py. The divisor stays init_r when the rank was pruned; rank_pattern holds
    masks, by which the file's tensors are cut already. A module pruned to rank 0 does nothing.
    """
    n = g.sizes(lora_A="r i", lora_E="r 1", lora_B="o r")
    alpha, initial = g.number("lora_alpha", 8), g.count("init_r", 12)
    if alpha <= 0:
        raise g.refuse(f"lora_alpha is {alpha:g}; PEFT's scale is unclear unless it is positive")
    mask = (g.config.get("rank_pattern") or {}).get(f"{g.module}.lora_E")
    kept = sum(map(bool, mask)) if isinstance(mask, list) else initial
    if n["r"] != kept:
        raise g.refuse(f"rank {n['r']}, the config says {kept}", "lora_A")
    if n["r"] == 0:
        return None
    a, e, b = (g.find(leaf) for leaf in ("lora_A", "lora_E", "lora_B"))
    scaled = ([a, e], lambda: wide(a) * wide(e))
    scale = alpha / (initial + 1e-5)
    return low_rank(g, scaled, ([b], lambda: wide(b)), (n["o"], n["i"], n["r"]), scale)


def loha(g: Given) -> Update:
    """dW = alpha/r * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; w_a (o, r), w_b (r, i).

    tuners/loha/layer.py. A product of two matrices of rank r is one of rank r * r: its factors are
    the products of all pairs of columns, and of all pairs of rows.
    """
    if "hada_t1" in g.tensors or "hada_t2" in g.tensors:
        raise g.refuse("is LoHa on a convolution, which this version doesn't carry", "hada_t1")
    n = g.sizes(hada_w1_a="o r", hada_w1_b="r i", hada_w2_a="o r", hada_w2_b="r i")
    out, inner, r = n["o"], n["i"], n["r"]
    scale = g.pattern("alpha_pattern", g.number("alpha", 8)) / g.check_rank(r, "hada_w1_a")
    w1a, w1b, w2a, w2b = (g.find(f"hada_{leaf}") for leaf in ("w1_a", "w1_b", "w2_a", "w2_b"))

    def a() -> Array:
        return (wide(w1b)[:, None, :] * wide(w2b)[None, :, :]).reshape(r * r, inner)

    def b() -> Array:
        return (wide(w1a)[:, :, None] * wide(w2a)[:, None, :]).reshape(out, r * r)

    note = f"a product of two matrices of rank {r}, of rank {r * r}"
    return factored(g, ([w1b, w2b], a), ([w1a, w2a], b), (out, inner, r * r), scale, note)


def lokr(g: Given) -> Update:
    """dW = alpha/r * kron(w1, w2), w1 (p, q) and w2 (s, t), either one as a product of rank r.

    tuners/lokr/layer.py. kron(l1 @ r1, l2 @ r2) = kron(l1, l2) @ kron(r1, r2); a factor that is not
    a product has rank min of its sizes, with the identity for one side.
    """
    if "lokr_t2" in g.tensors:
        raise g.refuse("is LoKr on a convolution, which this version doesn't carry", "lokr_t2")
    (p, q, one), (s, t, two) = _kron_sizes(g, "lokr_w1"), _kron_sizes(g, "lokr_w2")
    rank = int(g.pattern("rank_pattern", g.count("r", 8)))
    for leaf in ("lokr_w1_b", "lokr_w2_b"):
        if leaf in g.tensors:
            g.check_rank(g.tensors[leaf].shape[0], leaf)
    if rank < 1:
        raise g.refuse(f"rank_pattern says {rank}")
    scale = g.pattern("alpha_pattern", g.number("alpha", 8)) / rank
    g.check_shape(p * s, q * t)
    tensors = list(g.tensors.values())

    def side(which: int) -> Array:
        return np.kron(_kron_pair(g, "lokr_w1")[which], _kron_pair(g, "lokr_w2")[which])

    note = f"a Kronecker product of rank {one * two}"
    shapes = (p * s, q * t, one * two)
    return factored(g, (tensors, lambda: side(1)), (tensors, lambda: side(0)), shapes, scale, note)


def _kron_sizes(g: Given, leaf: str) -> tuple[int, int, int]:
    """Rows, columns and rank of one factor."""
    if leaf in g.tensors:
        shape = g.find(leaf).shape
        if len(shape) != 2 or f"{leaf}_a" in g.tensors or f"{leaf}_b" in g.tensors:
            raise g.refuse(f"shape {list(shape)}: LoKr on a convolution, or a factor twice", leaf)
        return shape[0], shape[1], min(shape)
    left, right = g.find(f"{leaf}_a").shape, g.find(f"{leaf}_b").shape
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise g.refuse(f"shape {list(left)} does not go with {list(right)}", f"{leaf}_a")
    return left[0], right[1], left[1]


def _kron_pair(g: Given, leaf: str) -> tuple[Array, Array]:
    """(left, right) with the factor = left @ right."""
    if leaf not in g.tensors:
        return wide(g.find(f"{leaf}_a")), wide(g.find(f"{leaf}_b"))
    values = wide(g.find(leaf))
    rows, cols = values.shape
    return (np.eye(rows), values) if rows <= cols else (values, np.eye(cols))


def vera(g: Given) -> LowRank:
    """dW = (lambda_b * B[:o]) @ (lambda_d * A[:, :i]); A (r, most), B (most, r) shared by all.

    tuners/vera/layer.py. The shared matrices are as large as the largest module: each module has
    the corner of its own size.
    """
    n = g.sizes(vera_lambda_b="o", vera_lambda_d="r")
    g.check_rank(n["r"], "vera_lambda_d", 256)
    return _vera(g, "vera", n, 1)


def pvera(g: Given) -> LowRank:
    """VeRA with the first half of lambda_d and of A: the mean; the other half is its variance.

    tuners/pvera/layer.py. With sample_at_inference it draws at random and has no fixed update.
    """
    if g.flag("sample_at_inference"):
        raise g.refuse("samples at inference (sample_at_inference): it has no fixed update")
    n = g.sizes(pvera_lambda_b="o", pvera_lambda_d="d")
    if n["d"] % 2:
        raise g.refuse(f"shape {[n['d']]}, expected an even size", "pvera_lambda_d")
    r = g.check_rank(n["d"] // 2, "pvera_lambda_d", 256)
    return _vera(g, "pvera", n | {"r": r}, 2)


def _vera(g: Given, name: str, n: Mapping[str, int], halves: int) -> LowRank:
    out, inner, r = n["o"], n["i"], n["r"]
    a, b = g.find(f"{name}_A"), g.find(f"{name}_B")
    lambda_b, lambda_d = g.find(f"{name}_lambda_b"), g.find(f"{name}_lambda_d")
    if len(a.shape) != 2 or a.shape[0] != halves * r or a.shape[1] < inner:
        raise g.refuse(
            f"shape {list(a.shape)}, expected [{halves * r}, {inner} or more]", f"{name}_A"
        )
    if len(b.shape) != 2 or b.shape[1] != r or b.shape[0] < out:
        raise g.refuse(f"shape {list(b.shape)}, expected [{out} or more, {r}]", f"{name}_B")
    left = ([b, lambda_b], lambda: wide(lambda_b)[:, None] * wide(b)[:out])
    right = ([a, lambda_d], lambda: wide(lambda_d)[:r, None] * wide(a)[:r, :inner])
    return low_rank(g, right, left, (out, inner, r), 1.0)


def vblora(g: Given) -> LowRank:
    """dW = B @ A, their pieces mixed from a shared bank: softmax(top k logits) @ bank[top k].

    tuners/vblora/layer.py. Bank (vectors, v); logits_A (r, i/v, vectors), logits_B (o/v, r,
    vectors). With save_only_topk_weights the file has the indices and all weights but the last.
    """
    bank, topk = g.find("vblora_vector_bank"), g.count("topk", 2)
    vectors, length = g.count("num_vectors", 256), g.count("vector_length", 256)
    g.sizes(vblora_vector_bank=f"{vectors} {length}")
    if topk > vectors:
        raise g.refuse(f"topk is {topk}, of {vectors} vectors", "vblora_vector_bank")
    compact = g.flag("save_only_topk_weights")
    parts: dict[str, list[Tensor]] = {}
    tiles: dict[str, tuple[int, ...]] = {}
    for side in "AB":
        name = f"vblora_logits_{side}"
        leaves = [f"{name}_topk_indices", f"{name}_topk_weights"] if compact else [name]
        sizes = [topk, topk - 1] if compact else [vectors]
        parts[side] = [g.find(leaf) for leaf in leaves]
        for leaf, tensor, last in zip(leaves, parts[side], sizes, strict=True):
            if len(tensor.shape) != 3 or tensor.shape[2] != last:
                raise g.refuse(f"shape {list(tensor.shape)}, expected [*, *, {last}]", leaf)
            if tiles.setdefault(side, tensor.shape[:2]) != tensor.shape[:2]:
                raise g.refuse(f"shape {list(tensor.shape)} does not go with the indices", leaf)
    (r, across), (down, r2) = tiles["A"], tiles["B"]
    out, inner = down * length, across * length
    g.check_shape(out, inner)
    if g.check_rank(r, parts["A"][0].name, 4) != r2:
        raise g.refuse(f"has rank {r} and rank {r2}")

    def mixed(side: str) -> Array:
        if compact:
            indices, weights = integers(parts[side][0]), wide(parts[side][1])
            weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1)
        else:
            logits = wide(parts[side][0])
            indices = np.argpartition(-logits, topk - 1, axis=-1)[..., :topk]
            top = np.take_along_axis(logits, indices, -1)
            weights = np.exp(top - top.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        if indices.min(initial=0) < 0 or indices.max(initial=0) >= vectors:
            raise g.refuse(f"an index is outside the bank's {vectors} vectors", parts[side][0].name)
        return (weights[..., None] * wide(bank)[indices]).sum(-2)

    a = ([bank, *parts["A"]], lambda: mixed("A").reshape(r, inner))
    b = ([bank, *parts["B"]], lambda: mixed("B").transpose(0, 2, 1).reshape(out, r))
    return low_rank(g, a, b, (out, inner, r), 1.0)


def delora(g: Given) -> LowRank:
    """dW = B @ diag(lambda / r / (|A_j| * |B_j|)) @ A * w_norm, by columns; norms at least 1e-4.

    tuners/delora/layer.py. A (r, i), B (o, r), lambda (1,), w_norm (i,): the norms of the base's
    columns, which are in the file.
    """
    n = g.sizes(delora_A="r i", delora_B="o r", delora_lambda="1", delora_w_norm="i")
    names = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    a, b, strength, norms = (g.find(leaf) for leaf in names)
    g.check_rank(n["r"], "delora_A")

    def right() -> Array:
        rows, cols = wide(a), wide(b)
        sizes = np.maximum(np.linalg.norm(rows, axis=1), 1e-4)
        sizes *= np.maximum(np.linalg.norm(cols, axis=0), 1e-4)
        return (wide(strength)[0] / n["r"] / sizes)[:, None] * rows * wide(norms)

    left = ([b], lambda: wide(b))
    return low_rank(g, ([a, b, strength, norms], right), left, (n["o"], n["i"], n["r"]), 1.0)


def gralora(g: Given) -> LowRank:
    """dW in k x k blocks, each of rank r / k, of one exchange of ranks among the blocks; plus LoRA.

    tuners/gralora/layer.py. A (k, i/k, r), B (k, r, o/k): block (q, n) of dW is
    B[q, n-th part].T @ A[n, :, q-th part].T, parts of r / k. As one product its rank is k * r;
    hybrid_r adds B_general @ A_general. All of it times alpha / (r + hybrid_r).
    """
    k, hybrid = g.count("gralora_k", 2), g.config.get("hybrid_r", 0)
    n = g.sizes(gralora_A="k c r", gralora_B="k r d")
    g.check_rank(n["r"], "gralora_A", 32)
    if n["k"] != k or n["r"] % k or type(hybrid) is not int or hybrid < 0:
        raise g.refuse(f"{n['k']} blocks of rank {n['r']}, gralora_k is {k}", "gralora_A")
    out, inner, r, part = k * n["d"], k * n["c"], n["r"], n["r"] // k
    g.check_shape(out, inner)
    a, b = g.find("gralora_A"), g.find("gralora_B")
    general = []
    if hybrid:
        wanted = {"gralora_A_general__weight": f"{hybrid} {inner}"}
        g.sizes(**wanted, gralora_B_general__weight=f"{out} {hybrid}")
        general = [g.find(f"gralora_{side}_general.weight") for side in "AB"]

    def right() -> Array:  # rows (n, q, s): block column n holds A[n, :, q, s]
        blocks = wide(a).reshape(k, n["c"], k, part)
        full = np.zeros((k, k, part, k, n["c"]))
        for col in range(k):
            full[col, :, :, col] = blocks[col].transpose(1, 2, 0)
        return np.concatenate([full.reshape(k * r, inner), *(wide(t) for t in general[:1])])

    def left() -> Array:  # columns (n, q, s): block row q holds B[q, n, s]
        blocks = wide(b).reshape(k, k, part, n["d"])
        full = np.zeros((k, n["d"], k, k, part))
        for row in range(k):
            full[row, :, :, row] = blocks[row].transpose(2, 0, 1)
        sides = [full.reshape(out, k * r), *(wide(t) for t in general[1:])]
        return np.concatenate(sides, axis=1)

    scale = g.number("alpha", 64) / (r + hybrid)
    shapes = (out, inner, k * r + hybrid)
    return low_rank(g, ([a, *general[:1]], right), ([b, *general[1:]], left), shapes, scale)


def tinylora(g: Given) -> LowRank:
    """dW = B @ (sum_j v[j] * P[j]) @ A; A (r, i), B (o, r), P (u, r, r), v (u,) shared by groups.

    tuners/tinylora/layer.py.
    """
    u = g.count("u", 64)
    n = g.sizes(tinylora_A="r i", tinylora_B="o r", tinylora_P=f"{u} r r")
    vector = g.find(f"tinylora_v.{_tinylora_group(g)}")
    if n["r"] != min(g.count("r", 2), n["o"], n["i"]):
        raise g.refuse(f"rank {n['r']}, the config says {g.count('r', 2)}", "tinylora_A")
    a, b, p = (g.find(f"tinylora_{leaf}") for leaf in "ABP")
    if vector.shape != (u,):
        raise g.refuse(f"shape {list(vector.shape)}, expected {[u]}")
    right = ([a, p, vector], lambda: np.tensordot(wide(vector), wide(p), 1) @ wide(a))
    return low_rank(g, right, ([b], lambda: wide(b)), (n["o"], n["i"], n["r"]), 1.0)


def _tinylora_group(g: Given) -> int:
    """Which of the shared vectors is a module's (tuners/tinylora/model.py:_create_and_replace).

    Groups are made of neighbours in the order of modules in the model. The file does not hold it,
    but P, which PEFT draws by projection_seed + place in that order.
    """
    tying, modules = g.number("weight_tying", 0), g.modules
    groups = max(1, round(modules * (1.0 - tying)))
    if groups == 1:
        return 0
    p, seed = g.find("tinylora_P"), g.config.get("projection_seed", 42)
    if type(seed) is not int or not 0 <= seed < (1 << 32) - modules:
        raise g.refuse(f"projection_seed is {seed!r}, expected an integer below 2**32")
    size = math.prod(p.shape)
    stored = wide(p).ravel()[:16] * p.shape[1] ** 0.5
    fits = []
    for place in range(modules):
        drawn = first_normals(size, seed + place)
        off = np.abs(stored[: len(drawn)] - drawn)
        if (off <= 2 * UNIT_ROUNDOFF[p.stored_dtype] * np.abs(drawn) + 1e-5).all():
            fits.append(place)
    if len(fits) != 1:
        raise g.refuse(
            "which shared vector is of this module follows from its place in the model, and that is"
            f" not told by these values: they are drawn for {len(fits)} places of {modules} by"
            f" projection_seed {seed}; convert it in PEFT with peft.save_as_lora",
            "tinylora_P",
        )
    return min(fits[0] // max(1, modules // groups), groups - 1)


def unilora(g: Given) -> LowRank:
    """A[j] = theta[index_A[j]] * scales_A[j], B likewise; dW = B @ A; theta shared by all.

    tuners/unilora/layer.py. With save_indices, which is not the default: the indices are drawn over
    all modules in the model's own order.
    """
    n = g.sizes(
        unilora_indices_A="r i", unilora_scales_A="r i", unilora_indices_B="o r",
        unilora_scales_B="o r", unilora_theta_d=str(g.count("theta_d_length", 256)),
    )  # fmt: skip
    g.check_rank(n["r"], "unilora_indices_A", 4)
    theta = g.find("unilora_theta_d")

    def part(side: str) -> Part:
        index, scales = g.find(f"unilora_indices_{side}"), g.find(f"unilora_scales_{side}")

        def make() -> Array:
            where = integers(index)
            if where.min() < 0 or where.max() >= theta.shape[0]:
                raise g.refuse(f"an index of {index.name} is outside the shared values")
            return wide(theta)[where] * wide(scales)

        return [theta, index, scales], make

    return low_rank(g, part("A"), part("B"), (n["o"], n["i"], n["r"]), 1.0)


def miss(g: Given) -> LowRank:
    """dW[:, c] = block[c mod r]: blocks of r columns, all the same; block (r, o). MiSS, once Bone.

    tuners/miss/layer.py. As a product: b = block.T, a = identities side by side. init_weights
    "mini" stores the first mini_r columns of the block, which repeat down the rows.
    """
    out, inner = g.out_in
    block, mini = g.find("miss_block"), g.config.get("init_weights") == "mini"
    width = g.count("mini_r", 1) if mini else out
    g.sizes(miss_block=f"r {width}")
    r = g.check_rank(block.shape[0], "miss_block", 64)
    if out % width or r > inner:
        raise g.refuse(f"shape {list(block.shape)} does not divide a weight of {[out, inner]}")
    a: Part = ([], lambda: np.tile(np.eye(r), -(-inner // r))[:, :inner])
    b = ([block], lambda: np.tile(wide(block), out // width).T)
    return low_rank(g, a, b, (out, inner, r), 1.0)


def beft(g: Given) -> LowRank:
    """The output moves by beft_bias (1, o), the weight does not: LoRA of zeros with a lora_bias.

    tuners/beft/layer.py.
    """
    out, inner = g.out_in
    g.sizes(beft_bias="1 o")
    bias = g.find("beft_bias")
    a: Part = ([], lambda: np.zeros((1, inner)))
    b: Part = ([], lambda: np.zeros((out, 1)))
    vector = computed(f"{g.module}.bias", ([bias], lambda: wide(bias)[0]), (out,))
    return replace(low_rank(g, a, b, (out, inner, 1), 1.0), bias=vector)
