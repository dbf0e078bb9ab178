"""PEFT's methods that turn the base's weight: its input, its output, or blocks of it.

As in `peft_tuners_low`: one function a method, PEFT's formula in the docstring (peft 0.21.2). W is
the base's weight (o, i).
"""

from __future__ import annotations

import math

import numpy as np

from loraduct.adapter import Dense, LowRank, Replacement
from loraduct.formats.peft_given import Array, Given, changed, low_rank, new_bias, wide
from loraduct.tensor import Tensor


def oft(g: Given) -> Dense:
    """W' = W @ R.T, R block-diagonal: (blocks, b, b) from upper triangles (blocks, b * (b - 1) / 2).

    tuners/oft/layer.py. R is Cayley's (I - Q) @ inv(I + Q) of the skew-symmetric Q, or (the
    default) the first terms of a series for it. block_share: one block for all; coft: Q is kept
    within eps / sqrt(blocks).
    """
    triangle = g.find("oft_R.weight")
    g.sizes(oft_R__weight="n t")
    out, inner = g.out_in
    blocks, terms = triangle.shape
    size = (1 + math.isqrt(1 + 8 * terms)) // 2
    shared = g.flag("block_share")
    whole = size * (inner // size if shared and size else blocks)
    if size * (size - 1) // 2 != terms or whole != inner or (shared and blocks != 1):
        raise g.refuse(f"shape {list(triangle.shape)} is not of blocks of {inner}", "oft_R.weight")
    series = g.count("num_cayley_neumann_terms", 5) if g.flag("use_cayley_neumann", True) else None
    eps = g.number("eps", 6e-5) / math.sqrt(blocks) if g.flag("coft") else None

    def new(weight: Array) -> Array:
        skew = np.zeros((blocks, size, size))
        skew[:, *np.triu_indices(size, 1)] = wide(triangle)
        skew -= skew.transpose(0, 2, 1)
        if eps is not None:
            norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            skew *= np.minimum(1.0, eps / np.maximum(norm, 1e-300))
        turn = _cayley(skew) if series is None else _neumann(skew, series)
        parts = weight.reshape(out, inner // size, size)
        return np.einsum("onk,nck->onc", parts, turn.repeat(inner // size // blocks, 0)).reshape(
            out, inner
        )

    return changed(g, [triangle], new, "the weight's input is turned")


def _cayley(skew: Array) -> Array:
    """(I - Q) @ inv(I + Q), of each matrix."""
    one = np.eye(skew.shape[-1])
    # x @ (I + Q) = I - Q, and Q.T = -Q: both sides transposed
    return np.linalg.solve(one - skew, one + skew).transpose(0, 2, 1)


def _neumann(skew: Array, terms: int) -> Array:
    """I + 2Q + 2Q^2 + ... + Q^(terms - 1), as PEFT sums it: three terms give four."""
    total = np.eye(skew.shape[-1]) + np.zeros_like(skew)
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def boft(g: Given) -> Dense:
    """W' = s * W @ R_1.T @ R_2.T ..., from the skew parts of boft_R (factors, n, b, b).

    tuners/boft/layer.py. s (o, 1). Each R is block-diagonal, of Cayley's, with its rows and columns
    permuted (`_butterfly`). More than one factor there is only where PEFT's CUDA extension was built:
    elsewhere PEFT makes one of it, whatever the config says.
    """
    g.sizes(boft_R="* n b b", boft_s="o 1")
    blocks, scales = g.find("boft_R"), g.find("boft_s")
    factors, count, size, _ = blocks.shape
    out, inner = g.out_in
    said = g.count("boft_n_butterfly_factor", 1)
    if factors not in (1, said):
        raise g.refuse(f"has {factors} butterfly factors, the config says {said}", "boft_R")
    whole = count * size == inner
    if not whole or (factors > 1 and (size % 2 or count % 2 ** (factors - 1))):
        raise g.refuse(f"shape {list(blocks.shape)} is not of blocks of {inner}", "boft_R")

    def new(weight: Array) -> Array:
        for i, free in enumerate(wide(blocks)):
            turn = _cayley(0.5 * (free - free.transpose(0, 2, 1)))
            order = _butterfly(inner, size, i)
            sorted_back = weight[:, np.argsort(order)].reshape(out, count, size)
            weight = np.einsum("onk,nck->onc", sorted_back, turn).reshape(out, inner)[:, order]
        return weight * wide(scales)

    return changed(g, [blocks, scales], new, "the weight is turned and scaled")


def _butterfly(inner: int, size: int, level: int) -> Array:
    """Which input stands where: in every 2**level blocks the even half-blocks, then the odd ones."""
    half = size // 2
    if not level:
        return np.arange(inner)
    groups = np.arange(inner).reshape(-1, 2**level, 2, half)
    return groups.transpose(0, 2, 1, 3).reshape(inner)


def hra(g: Given) -> LowRank:
    """W' = W @ H, H = the product of I - 2 u_j u_j.T over the unit columns of hra_u (i, r).

    tuners/hra/layer.py. H - I = C @ U.T with c_j = -2 (u_j + C_<j @ U_<j.T @ u_j), so
    dW = (W @ C) @ U.T. apply_GS: the columns are made orthogonal first, by Gram and Schmidt.
    """
    n = g.sizes(hra_u="i r")
    columns, r = g.find("hra_u"), g.check_rank(n["r"], "hra_u")
    ordered = g.flag("apply_GS")

    def factors() -> tuple[Array, Array]:
        u = wide(columns)
        if ordered:
            for j in range(r):
                for k in range(j):
                    u[:, j] -= (u[:, k] @ u[:, j]) * u[:, k]
                u[:, j] /= np.linalg.norm(u[:, j])
            return u, -2 * u
        u /= np.linalg.norm(u, axis=0)
        c = np.zeros_like(u)
        for j in range(r):
            c[:, j] = -2 * (u[:, j] + c[:, :j] @ (u[:, :j].T @ u[:, j]))
        return u, c

    a = ([columns], lambda: factors()[0].T)
    b = ([columns], lambda: g.base_weight() @ factors()[1])
    return low_rank(g, a, b, (*g.out_in, r), 1.0)


def bat(g: Given) -> Dense:
    """dW = W_blocks @ M + M, M (o/r, r, r): MiSS with init_weights "bat".

    tuners/miss/layer.py. W in blocks of r x r; every block of a row of blocks has the same M.
    """
    g.sizes(miss_block="m r r")
    block = g.find("miss_block")
    rows, r, _ = block.shape
    g.check_rank(r, "miss_block", 64)
    out, inner = g.out_in
    if rows * r != out or inner % r:
        raise g.refuse(f"shape {list(block.shape)} does not divide a weight of {[out, inner]}")

    def new(weight: Array) -> Array:
        turn = wide(block)
        parts = weight.reshape(rows, r, inner // r, r).transpose(2, 0, 1, 3)
        return weight + (parts @ turn + turn).transpose(1, 2, 0, 3).reshape(out, inner)

    return changed(g, [block], new, "blocks of the weight times a matrix")


def road(g: Given) -> Dense:
    """W' = R @ W, R turning and scaling pairs of outputs: first halves of groups with second ones.

    tuners/road/layer.py. y = x * alpha cos(theta) + rotated(x) * alpha sin(theta), rotated: each
    group's (first, second) halves become (-second, first).
    """
    first, second = _road_sizes(g)
    return changed(g, [first, second], lambda w: _turned(g, w), "the output is turned and scaled")


def road_bias(g: Given) -> Replacement:
    """b' = R @ b."""
    return new_bias(g, list(_road_sizes(g)), lambda b: _turned(g, b[:, None])[:, 0])


def _road_sizes(g: Given) -> tuple[Tensor, Tensor]:
    variants = {"road_1": 0.5, "road_2": 1, "road_4": 2}
    times = variants[g.choice("variant", "road_1", list(variants))]
    out, group = g.out_in[0], g.count("group_size", 64)
    if out % group or group % 2:
        raise g.refuse(f"groups of {group} don't divide {out} outputs evenly")
    size = str(int(times * out))
    g.sizes(road_theta=size, road_alpha=size)
    return g.find("road_theta"), g.find("road_alpha")


def _turned(g: Given, values: Array) -> Array:
    theta, alpha = (wide(t) for t in _road_sizes(g))
    variant, group = g.config.get("variant", "road_1"), g.count("group_size", 64)
    if variant == "road_1":
        theta, alpha = (
            x.reshape(-1, group // 2).repeat(2, axis=0).reshape(-1) for x in (theta, alpha)
        )
    if variant == "road_4":
        (t1, t2), (a1, a2) = (
            x.reshape(-1, 2, group).transpose(1, 0, 2).reshape(2, -1) for x in (theta, alpha)
        )
    else:
        t1, t2, a1, a2 = theta, theta, alpha, alpha
    halves = values.reshape(-1, 2, group // 2, values.shape[1])
    rotated = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(values.shape)
    return values * (a1 * np.cos(t1))[:, None] + rotated * (a2 * np.sin(t2))[:, None]
