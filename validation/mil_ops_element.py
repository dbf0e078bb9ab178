"""Operations that go value by value: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loraduct.formats.coreml.program import NUMPY
from loraduct.validation.mil_numbers import limited
from loraduct.validation.mil_operation import Op, along

# Names of dtypes as the parameters of operations have them.
DTYPES = {
    "fp16": "FLOAT16", "fp32": "FLOAT32", "bool": "BOOL", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32",
}  # fmt: skip
_SQRT2, _TANH_SCALE = np.float32(np.sqrt(0.5)), np.float32(np.sqrt(2 / np.pi))


def erf(x: Any) -> Any:
    """The error function: Abramowitz and Stegun 7.1.5 near 0, 7.1.14's fraction beyond.

    In float64, to 1e-9 at worst.
    """
    wide = np.asarray(x, np.float64)
    small = np.abs(wide) < 2.5
    out = np.empty(wide.shape, np.float64)
    near, far = wide[small], np.abs(wide[~small])
    term, total = near.copy(), near.copy()
    for n in range(1, 40):
        term = term * (-near * near / n)
        total = total + term / (2 * n + 1)
    out[small] = 2 / np.sqrt(np.pi) * total
    fraction = np.zeros_like(far)
    for n in range(40, 0, -1):
        fraction = (n / 2) / (far + fraction)
    tail = np.exp(-far * far) / (np.sqrt(np.pi) * (far + fraction))
    out[~small] = np.sign(wide[~small]) * (1 - tail)
    return out.astype(np.float32)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def silu(x: Any) -> Any:
    """``x * sigmoid(x)``."""
    below = np.exp(-x)
    below += np.float32(1)
    return np.divide(x, below)


def gelu(x: Any, mode: str = "EXACT") -> Any:
    """``x * Phi(x)``, exactly or by one of two approximations."""
    if mode == "EXACT":
        return np.float32(0.5) * x * (np.float32(1) + erf(x * _SQRT2))
    if mode == "TANH_APPROXIMATION":
        inner = _TANH_SCALE * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    raise ValueError(f"unknown mode {mode!r}")


def softplus(x: Any) -> Any:
    """``log(1 + exp(x))``."""
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def softplus_parametric(x: Any, alpha: Any, beta: Any) -> Any:
    """``alpha * log(1 + exp(beta * x))``, alpha and beta along axis 1."""
    return along(alpha, 1, x.ndim) * softplus(x * along(beta, 1, x.ndim))


def elu(x: Any, alpha: Any) -> Any:
    """``x``, below 0 ``alpha * (exp(x) - 1)``."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def clamped_relu(x: Any, alpha: Any, beta: Any) -> Any:
    """``min(beta, x)``, below 0 ``min(beta, alpha * x)``."""
    return np.minimum(np.where(x >= 0, x, alpha * x), beta)


def thresholded_relu(x: Any, alpha: Any) -> Any:
    """``x`` where it reaches ``alpha``, else 0."""
    return np.where(x >= alpha, x, np.zeros_like(x))


def log(x: Any, epsilon: Any = 1e-45) -> Any:
    """``log(x + epsilon)``."""
    return np.log(x + epsilon)


def rsqrt(x: Any, epsilon: Any = 1e-12) -> Any:
    """``1 / sqrt(x + epsilon)``."""
    return np.float32(1) / np.sqrt(x + epsilon)


def inverse(x: Any, epsilon: Any = 1e-4) -> Any:
    """``1 / (x + epsilon)``."""
    return np.float32(1) / (x + epsilon)


def cast(x: Any, dtype: str) -> Any:
    """To another dtype: towards zero, kept within the bounds of an integer, NaN to 0."""
    target = NUMPY[DTYPES[dtype]]
    if dtype.startswith("fp"):
        return x.astype(np.float32)
    if dtype == "bool":
        return x != 0
    if x.dtype.kind != "f":
        return x.astype(target)
    bounds = np.iinfo(target)
    whole = np.clip(np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0), bounds.min, bounds.max)
    return whole.astype(target)


def real_div(x: Any, y: Any) -> Any:
    """``x / y``; of integers the quotient towards zero."""
    quotient = np.divide(x, y)
    return quotient if x.dtype.kind == "f" else np.trunc(quotient)


def power(x: Any, y: Any) -> Any:
    """``x ** y``; a square is multiplied out, as numpy's general power is 50 times slower."""
    if x.dtype.kind == "f" and np.size(y) == 1 and np.all(y == 2):
        return np.square(x).reshape(np.broadcast_shapes(x.shape, np.shape(y)))
    return np.power(x, y)


def select(cond: Any, a: Any, b: Any) -> Any:
    """``a`` where ``cond``, else ``b``."""
    limited(np.broadcast_shapes(np.shape(cond), np.shape(a), np.shape(b)))
    return np.where(cond, a, b)


def quantize(
    input: Any, scale: Any, output_dtype: str, zero_point: Any = None, axis: Any = None
) -> Any:
    """``clip(round(input / scale) + zero_point)``."""
    bounds = np.iinfo(output_dtype)
    at = 0 if axis is None else int(axis) % input.ndim
    steps = np.round(input / along(scale, at, input.ndim))
    if zero_point is not None:
        steps = steps + along(zero_point, at, input.ndim).astype(np.float32)
    return np.clip(steps, bounds.min, bounds.max).astype(output_dtype)


def dequantize(input: Any, scale: Any, zero_point: Any = None, axis: Any = None) -> Any:
    """``scale * (input - zero_point)``."""
    at = 0 if axis is None else int(axis) % input.ndim
    steps = input.astype(np.float32)
    if zero_point is not None:
        steps = steps - along(zero_point, at, input.ndim).astype(np.float32)
    return steps * along(scale, at, input.ndim)


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(x: Any) -> Any:
        return function(x)

    return run


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(x: Any, y: Any) -> Any:
        limited(np.broadcast_shapes(np.shape(x), np.shape(y)))
        return function(x, y)

    return run


def _bounded(function: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def run(x: Any, alpha: Any, beta: Any) -> Any:
        return function(x, alpha, beta)

    return run


_ROUNDED_UNARY: dict[str, Callable[[Any], Any]] = {
    "sqrt": np.sqrt, "square": np.square, "exp": np.exp, "exp2": np.exp2, "tanh": np.tanh,
    "cos": np.cos, "sin": np.sin, "tan": np.tan, "acos": np.arccos, "asin": np.arcsin,
    "atan": np.arctan, "atanh": np.arctanh, "cosh": np.cosh, "sinh": np.sinh, "erf": erf,
    "sigmoid": sigmoid, "silu": silu, "softplus": softplus,
    "softsign": lambda x: x / (np.float32(1) + np.abs(x)),
}  # fmt: skip
_MOVING_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": np.abs, "ceil": np.ceil, "floor": np.floor, "round": np.round, "sign": np.sign,
    "relu": lambda x: np.maximum(x, np.float32(0)), "identity": lambda x: x,
    "relu6": lambda x: np.clip(x, np.float32(0), np.float32(6)), "logical_not": np.logical_not,
}  # fmt: skip
_ROUNDED_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": real_div, "pow": power,
    "floor_div": np.floor_divide, "mod": np.mod,
}  # fmt: skip
_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip
_XY = ("x", "y")

OPS: dict[str, Op] = {
    **{n: Op(_unary(f)) for n, f in _ROUNDED_UNARY.items()},
    **{n: Op(_unary(f), moves=True) for n, f in _MOVING_UNARY.items()},
    **{n: Op(_binary(f), same=_XY) for n, f in _ROUNDED_BINARY.items()},
    **{n: Op(_binary(f), "BOOL", True, _XY) for n, f in _TESTS.items()},
    "maximum": Op(_binary(np.maximum), moves=True, same=_XY),
    "minimum": Op(_binary(np.minimum), moves=True, same=_XY),
    "gelu": Op(gelu),
    "elu": Op(elu),
    "leaky_relu": Op(lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    "prelu": Op(lambda x, alpha: np.where(x > 0, x, along(alpha, 1, x.ndim) * x)),
    "thresholded_relu": Op(thresholded_relu, moves=True),
    "threshold": Op(lambda x, alpha: np.maximum(x, alpha)),
    "clip": Op(_bounded(lambda x, low, high: np.minimum(np.maximum(x, low), high))),
    "clamped_relu": Op(clamped_relu),
    "linear_activation": Op(_bounded(lambda x, a, b: x * a + b)),
    "scaled_tanh": Op(_bounded(lambda x, a, b: a * np.tanh(x * b))),
    "sigmoid_hard": Op(_bounded(lambda x, a, b: np.clip(a * x + b, 0, 1))),
    "softplus_parametric": Op(softplus_parametric),
    "log": Op(log),
    "rsqrt": Op(rsqrt),
    "inverse": Op(inverse),
    "cast": Op(cast, "dtype"),
    "select": Op(select, "a", True, ("a", "b")),
    "quantize": Op(quantize, "output_dtype"),
    "dequantize": Op(dequantize, "scale"),
}
