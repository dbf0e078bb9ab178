"""Operations that sum: products of matrices, reductions, norms, attention, convolution.

Products sum in float32 in every precision, as accelerators do; reductions, norms and softmax
follow the Numbers they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loraduct.validation.mil_numbers import Numbers, limited
from loraduct.validation.mil_operation import Op, along, axes_of, axis_of, ints, times

_PIECE = 1 << 27  # values of a weight that are multiplied at a time; from shapes alone, so that
# results don't depend on what happens to be in memory


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x (..., in), weight (out, in), bias (out): ``x @ weight.T + bias``."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x of {list(x.shape)} and a weight of {list(weight.shape)}")
    limited([*x.shape[:-1], weight.shape[0]])
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _PIECE // max(1, weight.shape[1]))
    if weight.shape[0] <= step:
        out = rows @ _wide(weight).T
    else:
        out = np.empty((rows.shape[0], weight.shape[0]), rows.dtype)
        for at in range(0, weight.shape[0], step):
            out[:, at : at + step] = rows @ _wide(weight[at : at + step]).T
    if bias is not None and np.any(bias):
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _wide(weight: Any) -> Any:
    """A piece of a weight that was too large to be kept in float32."""
    return weight.astype(np.float32) if weight.dtype == np.float16 else weight


def matmul(x: Any, y: Any, transpose_x: Any = False, transpose_y: Any = False) -> Any:
    """The product over the last axis of x and the last but one of y; leading axes broadcast."""
    if transpose_x and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    if transpose_y and y.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    leading = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    limited([*leading, *x.shape[-2:-1], *y.shape[-1:]])
    return np.matmul(_wide(x), _wide(y))


def einsum(values: Any, equation: str) -> Any:
    """Products and sums as the equation says; axes of size 1 broadcast."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            if size != 1 and sizes.get(letter, size) != size and sizes[letter] != 1:
                raise ValueError(f"axis {letter} of {sizes[letter]} and of {size}")
            sizes[letter] = max(size, sizes.get(letter, 1))
    limited([sizes[letter] for letter in right])
    full = [np.broadcast_to(v, [sizes[c] for c in t]) for t, v in zip(terms, values, strict=True)]
    return np.einsum(f"{left}->{right}", *full, optimize=True)


# -- reductions ------------------------------------------------------------------------------------


def _reduction(f: Callable[[Any, tuple[int, ...], Numbers], Any]) -> Callable[..., Any]:
    """From a function that keeps the axes it reduces."""

    def run(x: Any, axes: Any = None, keep_dims: Any = False, *, numbers: Numbers) -> Any:
        over = axes_of(axes, x.ndim)
        found = f(x, over, numbers)
        return found if keep_dims else np.squeeze(found, over)

    return run


def _log_sum_exp(x: Any, axes: tuple[int, ...], n: Numbers) -> Any:
    top = np.max(x, axis=axes, keepdims=True)
    return top + n.round(np.log(n.sum(n.round(np.exp(n.round(x - top))), axes)))


def _product(x: Any, axes: tuple[int, ...], n: Numbers) -> Any:
    return np.prod(x, axis=axes, keepdims=True, dtype=x.dtype)


_REDUCTIONS: dict[str, Callable[[Any, tuple[int, ...], Numbers], Any]] = {
    "reduce_mean": lambda x, axes, n: n.mean(x, axes),
    "reduce_sum": lambda x, axes, n: n.sum(x, axes),
    "reduce_sum_square": lambda x, axes, n: n.sum(n.round(np.square(x)), axes),
    "reduce_l1_norm": lambda x, axes, n: n.sum(np.abs(x), axes),
    "reduce_l2_norm": lambda x, axes, n: np.sqrt(n.sum(n.round(np.square(x)), axes)),
    "reduce_log_sum": lambda x, axes, n: np.log(n.sum(x, axes)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_prod": _product,
}
_EXTREMES: dict[str, Callable[[Any, tuple[int, ...], Numbers], Any]] = {
    "reduce_max": lambda x, axes, n: np.max(x, axis=axes, keepdims=True),
    "reduce_min": lambda x, axes, n: np.min(x, axis=axes, keepdims=True),
}


def _extreme(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Any:
        return f(x, axis=axis_of(axis, x.ndim), keepdims=bool(keep_dims))

    return run


def cumsum(x: Any, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Any:
    """Running sums along ``axis``, from the end where ``reverse``, without the value itself where
    ``exclusive``."""
    at = axis_of(axis, x.ndim)
    values = np.flip(x, at) if reverse else x
    sums = np.cumsum(values, axis=at, dtype=x.dtype)
    if exclusive:
        before = [(1, 0) if i == at else (0, 0) for i in range(x.ndim)]
        sums = np.pad(sums, before)[tuple(slice(n) for n in x.shape)]
    return np.flip(sums, at) if reverse else sums


# -- norms and attention ---------------------------------------------------------------------------


def softmax(x: Any, axis: Any = -1, *, numbers: Numbers) -> Any:
    """``exp(x - max) / sum``."""
    over = (axis_of(axis, x.ndim),)
    parts = numbers.round(np.exp(numbers.round(x - np.max(x, axis=over, keepdims=True))))
    return parts / numbers.sum(parts, over)


def layer_norm(
    x: Any,
    axes: Any = None,
    gamma: Any = None,
    beta: Any = None,
    epsilon: Any = 1e-5,
    *,
    numbers: Numbers,
) -> Any:
    """``gamma * (x - mean) / sqrt(variance + epsilon) + beta``; gamma, beta: sizes of ``axes``."""
    over, n = axes_of(axes, x.ndim), numbers
    shape = [x.shape[i] if i in over else 1 for i in range(x.ndim)]
    centred = n.round(x - n.mean(x, over))
    variance = n.mean(n.round(np.square(centred)), over)
    out = centred / n.round(np.sqrt(n.round(variance + epsilon)))
    if gamma is not None:
        out = n.round(out) * np.reshape(gamma, shape)
    return out if beta is None else n.round(out) + np.reshape(beta, shape)


def l2_norm(x: Any, epsilon: Any = 1e-6, *, numbers: Numbers) -> Any:
    """``x / sqrt(sum(x ** 2) + epsilon)`` over the last three axes."""
    if x.ndim < 3:
        raise ValueError(f"a value with {x.ndim} axes, expected 3 or more")
    n = numbers
    total = n.sum(n.round(np.square(x)), axes_of([-3, -2, -1], x.ndim))
    return x / n.round(np.sqrt(n.round(total + epsilon)))


def batch_norm(
    x: Any,
    mean: Any,
    variance: Any,
    gamma: Any = None,
    beta: Any = None,
    epsilon: Any = 1e-5,
) -> Any:
    """``gamma * (x - mean) / sqrt(variance + epsilon) + beta``, all along axis 1."""
    scale = np.float32(1) / np.sqrt(variance + epsilon)
    out = (x - along(mean, 1, x.ndim)) * along(scale, 1, x.ndim)
    if gamma is not None:
        out = out * along(gamma, 1, x.ndim)
    return out if beta is None else out + along(beta, 1, x.ndim)


def instance_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    epsilon: Any = 1e-5,
    *,
    numbers: Numbers,
) -> Any:
    """layer_norm over the axes from 2 on, gamma and beta along axis 1."""
    out = layer_norm(x, range(2, x.ndim), epsilon=epsilon, numbers=numbers)
    if gamma is not None:
        out = out * along(gamma, 1, x.ndim)
    return out if beta is None else out + along(beta, 1, x.ndim)


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *, numbers: Numbers) -> Any:
    """query (..., L, E), key (..., S, E), value (..., S, V): (..., L, V).

    Scores are divided by sqrt(E); a float mask is added, a bool mask keeps what is true.
    """
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1]:
        shapes = [list(v.shape) for v in (query, key, value)]
        raise ValueError(f"query, key and value of {shapes}")
    limited([*query.shape[:-1], key.shape[-2]])
    scores = numbers.round(np.matmul(query, np.swapaxes(key, -1, -2)))
    scores = numbers.round(scores * np.float32(1 / np.sqrt(query.shape[-1])))
    if attn_mask is not None and attn_mask.dtype == bool:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = numbers.round(scores + attn_mask)
    return np.matmul(numbers.round(softmax(scores, numbers=numbers)), value)


# -- convolution -----------------------------------------------------------------------------------


def conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Any:
    """x (n, in, *d), weight (out, in / groups, *k), bias (out): (n, out, *d')."""
    x, weight = _wide(x), _wide(weight)
    inner, parts = x.ndim - 2, int(groups)
    steps = (1,) * inner if strides is None else ints(strides)
    spread = (1,) * inner if dilations is None else ints(dilations)
    kernel = weight.shape[2:]
    if min((*steps, *spread, parts, *kernel)) < 1 or x.shape[1] != weight.shape[1] * parts:
        raise ValueError(f"x of {list(x.shape)}, weight of {list(weight.shape)}, groups {parts}")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    widths = _padding(pad_type, pad, x.shape[2:], reach, steps)
    limited([*x.shape[:2], *(n + a + b for n, (a, b) in zip(x.shape[2:], widths, strict=True))])
    padded = np.pad(x, [(0, 0), (0, 0), *widths])
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, x.ndim)))
    views = views[(slice(None),) * 2 + tuple(slice(None, None, s) for s in (*steps, *spread))]
    limited([times(views.shape)])
    sums = []
    for g in range(parts):
        own = views[:, g * weight.shape[1] : (g + 1) * weight.shape[1]]
        rows = np.moveaxis(own, 1, inner + 1)  # (n, *d', in, *k)
        share = weight.shape[0] // parts
        filters = weight[g * share : (g + 1) * share].reshape(share, -1)
        flat = rows.reshape(-1, filters.shape[1]) @ filters.T
        sums.append(np.moveaxis(flat.reshape(*rows.shape[: inner + 1], share), -1, 1))
    out = np.concatenate(sums, 1)
    return out if bias is None else out + along(bias, 1, x.ndim)


def _padding(
    kind: str, pad: Any, sizes: Any, reach: list[int], steps: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Values added before and after every inner axis."""
    if kind == "valid":
        return [(0, 0)] * len(reach)
    if kind == "custom":
        counts = ints(pad)
        return [(counts[2 * i], counts[2 * i + 1]) for i in range(len(reach))]
    lower = {"same": False, "same_lower": True}[kind]
    found = []
    for size, span, step in zip(sizes, reach, steps, strict=True):
        total = max(0, (-(-size // step) - 1) * step + span - size)
        less = total // 2
        found.append((total - less, less) if lower else (less, total - less))
    return found


OPS: dict[str, Op] = {
    "linear": Op(linear),
    "matmul": Op(matmul),
    "einsum": Op(einsum, "values"),
    "cumsum": Op(cumsum),
    "softmax": Op(softmax),
    "layer_norm": Op(layer_norm),
    "l2_norm": Op(l2_norm),
    "batch_norm": Op(batch_norm),
    "instance_norm": Op(instance_norm),
    "scaled_dot_product_attention": Op(attention, "query", same=("query", "key", "value")),
    "conv": Op(conv),
    "reduce_argmax": Op(_extreme(np.argmax), "output_dtype", True, default="INT32"),
    "reduce_argmin": Op(_extreme(np.argmin), "output_dtype", True, default="INT32"),
    **{n: Op(_reduction(f)) for n, f in _REDUCTIONS.items()},
    **{n: Op(_reduction(f), moves=True) for n, f in _EXTREMES.items()},
}
