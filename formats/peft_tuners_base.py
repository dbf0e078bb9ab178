"""PEFT's methods that scale, split or rebuild the base's weight.

As in `peft_tuners_low`: one function a method, PEFT's formula in the docstring (peft 0.21.2). W is
the base's weight (o, i). Where the output is scaled, the base's bias moves as well: the functions
that end in ``_bias`` give the new one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loraduct.adapter import Dense, LowRank, Replacement
from loraduct.formats.peft_given import Array, Given, changed, integers, low_rank, new_bias, wide
from loraduct.patterns import first_matches
from loraduct.tensor import Tensor


def ia3(g: Given) -> Dense:
    """W' = W * l: rows l (o, 1), or in feedforward_modules columns l (1, i).

    tuners/ia3/layer.py.
    """
    g.sizes(ia3_l="1 i" if _is_feedforward(g) else "o 1")
    scales = g.find("ia3_l")
    return changed(g, [scales], lambda w: w * wide(scales), "the weight times a vector")


def ia3_bias(g: Given) -> Replacement | None:
    """b' = b * l, where the output is scaled."""
    if _is_feedforward(g):
        return None
    scales = g.find("ia3_l")
    return new_bias(g, [scales], lambda b: b * wide(scales)[:, 0])


def _is_feedforward(g: Given) -> bool:
    """Whether IA3 scales this module's input; names are compared as ends of paths, without a dot."""
    names = g.config.get("feedforward_modules") or []
    if isinstance(names, str):
        what = "feedforward_modules"
        return first_matches([names], [g.module], full=True, file=g.file, what=what)[0] >= 0
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise g.refuse(f"feedforward_modules is {str(names)[:80]!r}, expected names or one pattern")
    return g.module.endswith(tuple(names))


def hira(g: Given) -> Dense:
    """dW = W * (B @ A), elementwise; A (r, i), B (o, r).

    tuners/hira/layer.py.
    """
    n = g.sizes(hira_A="r i", hira_B="o r")
    g.check_rank(n["r"], "hira_A", 32)
    a, b = g.find("hira_A"), g.find("hira_B")
    return changed(g, [a, b], lambda w: w + w * (wide(b) @ wide(a)), "the weight, scaled entrywise")


def glora(g: Given) -> Dense:
    """dW = W * A + B, elementwise; A and B each a product Xd @ Xu, a column X (o, 1) or a number.

    tuners/glora/layer.py.
    """
    form = g.choice("config_A_B", "lora", ["lora", "vector", "constant", "none"])
    a, b = (_path(g, f"glora_{side}", form, ("o", "i"), "o 1") for side in "AB")

    def new(weight: Array) -> Array:
        return weight + weight * _value(a) + _value(b)

    return changed(g, [*a, *b], new, "the weight, scaled entrywise")


def glora_bias(g: Given) -> Replacement:
    """b' = b + b * D + E + W @ C; C (i, 1), D and E (o,) or numbers."""
    form = g.choice("config_C", "lora", ["lora", "vector", "none"])
    c = _path(g, "glora_C", form, ("i", "1"), "i 1")
    form = g.choice("config_D_E", "constant", ["vector", "constant", "none"])
    d, e = (_path(g, f"glora_{side}", form, ("o", ""), "o") for side in "DE")

    def new(bias: Array) -> Array:
        return bias + bias * _value(d) + _value(e) + (g.base_weight() @ _value(c))[:, 0]

    return new_bias(g, [*c, *d, *e], new)


def _path(g: Given, name: str, form: str, full: tuple[str, str], vector: str) -> list[Tensor]:
    """The tensors of one of GLoRA's paths, in the form that the config says; shapes checked.

    ``full``: rows and columns of what it stands for; ``vector``: the shape of a vector for it.
    """
    if form == "lora":
        r = str(g.count("r", 8))
        g.sizes(**{f"{name}__Xd": f"{full[0]} {r}", f"{name}__Xu": f"{r} {full[1]}"})
        return [g.find(f"{name}.Xd"), g.find(f"{name}.Xu")]
    leaf = f"{name}.zeros" if form == "none" else f"{name}.X"
    shapes = {"none": " ".join(full), "vector": vector, "constant": "1"}
    g.sizes(**{leaf.replace(".", "__"): shapes[form]})
    return [g.find(leaf)]


def _value(path: list[Tensor]) -> Array:
    values = [wide(t) for t in path]
    return values[0] @ values[1] if len(values) == 2 else values[0]


def osf(g: Given) -> Dense:
    """dW = U @ diag(S) @ V - (W - the k largest singular parts of W): the small parts, replaced.

    tuners/osf/layer.py. U (o, l), S (l,), V (l, i), with l + k the smaller size of W. What is taken
    away does not depend on the signs of the singular vectors.
    """
    leaves = [f"osf_svd_params.{leaf}" for leaf in ("U_low", "S_low", "V_low")]
    g.sizes(osf_svd_params__U_low="o l", osf_svd_params__S_low="l", osf_svd_params__V_low="l i")
    u, s, v = (g.find(leaf) for leaf in leaves)
    kept = min(g.out_in) - s.shape[0]
    if kept < 0:
        raise g.refuse(f"shape {list(s.shape)} for a weight of {list(g.out_in)}", leaves[1])

    def new(weight: Array) -> Array:
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        large = (left[:, :kept] * values[:kept]) @ right[:kept]
        return large + (wide(u) * wide(s)) @ wide(v)

    return changed(g, [u, s, v], new, "the small singular parts of the weight, replaced")


def frod(g: Given) -> Dense:
    """W' = U @ (S + diag(l)) @ V.T; V (i, i) shared by modules of one role, S sparse.

    tuners/frod/layer.py. U has the columns of W @ inv(V).T, each of length one.
    """
    role = _role(g.module)
    names = {what: f"frod_{what}.{role}" for what in ("V", "s_indices", "s_size")}
    if missing := [n for n in names.values() if n not in g.shared]:
        raise g.refuse(f"has no shared {missing[0]}; the adapter is incomplete")
    shared_v, places, size = (g.shared[n] for n in names.values())
    n = g.sizes(frod_lambda_l="i", frod_lambda_s_values="n")
    inner = n["i"]
    if shared_v.shape != (inner, inner) or places.shape != (2, n["n"]) or size.shape != (2,):
        what = f"{list(shared_v.shape)} and {n['n']} values at {list(places.shape)} places"
        raise g.refuse(f"does not fit: shape {what}", "frod_lambda_s_values")
    values, scales = g.find("frod_lambda_s_values"), g.find("frod_lambda_l")

    def new(weight: Array) -> Array:
        rows, cols = integers(places)
        if list(integers(size)) != [inner, inner]:
            raise g.refuse(f"is not {[inner, inner]}", names["s_size"])
        if (
            min(rows.min(initial=0), cols.min(initial=0)) < 0
            or max(rows.max(initial=0), cols.max(initial=0)) >= inner
        ):
            raise g.refuse("an index is outside the matrix", names["s_indices"])
        right = wide(shared_v)
        left = np.linalg.solve(right, weight.T).T
        norms = np.linalg.norm(left, axis=0)
        left = np.divide(left, norms, out=np.zeros_like(left), where=norms > 1e-12)
        middle = np.diag(wide(scales))
        np.add.at(middle, (rows, cols), wide(values))
        return left @ middle @ right.T

    inputs = [shared_v, places, size, values, scales]
    return changed(g, inputs, new, "the weight, rebuilt from factors")


def _role(module: str) -> str:
    """FRoD's name of a module's role (`_category_from_key`): the last two parts of its path."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def deft(g: Given) -> LowRank:
    """dW = Q @ (alpha/r * R - K.T @ W): Q = K from the QR of P (o, r), or Q = P and K = relu(P).

    tuners/deft/layer.py. R (r, i); with para there is no R. Without alpha R is not scaled.
    """
    n = g.sizes(deft_P="o r")
    p, r = g.find("deft_P"), n["r"]
    if r != min(g.count("r", 8), n["o"]):
        raise g.refuse(f"rank {r}, the config says {g.count('r', 8)}", "deft_P")
    orthogonal = g.choice("decomposition_method", "relu", ["relu", "qr"]) == "qr"
    removal = g.flag("para")
    injected = None if removal else g.find("deft_R")
    if injected is not None:
        g.sizes(deft_R=f"{r} i")
    scale = g.number("alpha", 0) / r if g.config.get("alpha") else 1.0

    def left() -> Array:
        return np.linalg.qr(wide(p))[0] if orthogonal else wide(p)

    def right() -> Array:
        taken = left() if orthogonal else np.maximum(wide(p), 0)
        removed = taken.T @ g.base_weight()
        return (0 if injected is None else scale * wide(injected)) - removed

    a = ([p] if injected is None else [p, injected], right)
    return low_rank(g, a, ([p], left), (*g.out_in, r), 1.0)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


def peanut(g: Given) -> LowRank:
    """dW = scaling * B @ h(W).T; h: act(W.T @ A.T), then depth encoders and decoders, residual.

    tuners/peanut/layer.py. A (r, o), B (o, r), encoders and decoders (r, r): a small network that
    reads the base's weight, whose output (i, r) has rank r.
    """
    n = g.sizes(peanut_A__weight="r o", peanut_B__weight="o r")
    r, depth = g.check_rank(n["r"], "peanut_A.weight", 32), g.config.get("depth", 0)
    name = g.config.get("act_fn", "relu")
    if name not in _ACTIVATIONS:
        raise g.refuse(f"act_fn is {name!r}; carried are {', '.join(_ACTIVATIONS)}")
    act = _ACTIVATIONS[name]
    if type(depth) is not int or not 0 <= depth <= 64:
        raise g.refuse(f"depth is {depth!r}")
    layers = [f"peanut_{side}coders.{j}.weight" for side in ("en", "de") for j in range(depth)]
    g.sizes(**{leaf.replace(".", "__"): f"{r} {r}" for leaf in layers})
    first, last = g.find("peanut_A.weight"), g.find("peanut_B.weight")
    inputs = [first, *(g.find(leaf) for leaf in layers)]

    def right() -> Array:
        hidden = act(g.base_weight().T @ wide(first).T)
        residuals = []
        for leaf in layers[:depth]:
            residuals.append(hidden)
            hidden = act(hidden @ wide(g.find(leaf)).T)
        for leaf in layers[depth:]:
            hidden = act(hidden @ wide(g.find(leaf)).T) + residuals.pop()
        return hidden.T

    shapes = (*g.out_in, r)
    return low_rank(
        g, (inputs, right), ([last], lambda: wide(last)), shapes, g.number("scaling", 1)
    )
