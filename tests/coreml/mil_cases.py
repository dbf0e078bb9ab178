"""A table of every operation the interpreter knows, in several settings each.

Oracles that are not coremltools' own ``value_inference``: torch, or a formula of the operation's
documentation written out with plain loops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from mil_build import Case

RNG = np.random.default_rng(11)


def f(*shape: int) -> np.ndarray:
    """Floats around 0, of both signs."""
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    """Floats above 0."""
    return RNG.uniform(0.1, 3, shape).astype(np.float32)


def i(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    """Integers."""
    return RNG.integers(low, high, shape).astype(np.int32)


def b(*shape: int) -> np.ndarray:
    """Truth values."""
    return RNG.integers(0, 2, shape).astype(bool)


def by_torch(function: Any, *order: str) -> Any:
    """An oracle from a function on tensors, which get the inputs in this order."""

    def oracle(inputs: dict[str, Any], params: dict[str, Any]) -> list[np.ndarray]:
        given = {**inputs, **params}
        tensors = [torch.from_numpy(np.asarray(given[n])) for n in order]
        found = function(*tensors)
        return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]

    return oracle


def by_numpy(function: Any) -> Any:
    """An oracle from a function on all inputs and parameters by name."""
    return lambda inputs, params: [np.asarray(function(**inputs, **params))]


def scattered(data: Any, indices: Any, updates: Any, mode: str = "add", **_: Any) -> Any:
    """scatter_nd's documentation, place by place."""
    steps = {
        "add": lambda old, new: old + new, "sub": lambda old, new: old - new,
        "mul": lambda old, new: old * new, "div": lambda old, new: old / new,
        "max": np.maximum, "min": np.minimum, "update": lambda old, new: new,
    }  # fmt: skip
    out = data.copy()
    for place in np.ndindex(*indices.shape[:-1]):
        at = tuple(indices[place])
        out[at] = steps[mode](out[at], updates[place])
    return out


def along_axis(data: Any, indices: Any, updates: Any, axis: int = 0, mode: str = "add") -> Any:
    """scatter_along_axis's documentation, place by place."""
    places = np.stack(np.meshgrid(*map(np.arange, indices.shape), indexing="ij"), -1)
    places[..., axis] = indices
    return scattered(data, places, updates, mode)


def windows(x: Any, axis: int, size: int, stride: int = 1) -> Any:
    """sliding_windows, window by window."""
    starts = range(0, x.shape[axis] - size + 1, stride)
    cut = [np.take(x, range(s, s + size), axis) for s in starts]
    return np.stack(cut, axis)


UNARY = ("abs", "square", "exp", "exp2", "tanh", "cos", "sin", "tan", "atan", "cosh", "sinh",
         "erf", "sigmoid", "softplus", "softsign", "ceil", "floor", "round", "sign", "relu",
         "relu6", "identity")  # fmt: skip
BINARY = ("add", "sub", "mul", "real_div", "maximum", "minimum", "floor_div", "mod", "equal",
          "not_equal", "greater", "greater_equal", "less", "less_equal")  # fmt: skip
REDUCTIONS = ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min", "reduce_l1_norm",
              "reduce_l2_norm", "reduce_sum_square", "reduce_prod", "reduce_log_sum_exp")  # fmt: skip
_x = f(2, 3, 5)
_q, _k, _v = f(2, 3, 4, 8), f(2, 3, 6, 8), f(2, 3, 6, 5)
_sdpa = torch.nn.functional.scaled_dot_product_attention
_index = {"begin": [0, 1, 4], "end": [2, 3, 0], "stride": [1, 1, -2]}

CASES = [
    *(Case(op, {"x": f(3, 4)}) for op in UNARY),
    Case("square", {"x": i(3, 4)}, label="int"),
    Case("sqrt", {"x": positive(3, 4)}),
    Case("acos", {"x": RNG.uniform(-1, 1, (3, 4)).astype(np.float32)}),
    Case("asin", {"x": RNG.uniform(-1, 1, (3, 4)).astype(np.float32)}),
    Case("atanh", {"x": RNG.uniform(-0.9, 0.9, (3, 4)).astype(np.float32)}),
    Case("silu", {"x": f(3, 40) * 5}, oracle=by_torch(torch.nn.functional.silu, "x")),
    Case("silu", {"x": f(3) * 200}, label="far", oracle=by_torch(torch.nn.functional.silu, "x")),
    Case("erf", {"x": (f(200) * 3)}, label="wide"),
    *(
        Case("gelu", {"x": f(3, 40) * 3}, {"mode": mode}, label=mode[:5])
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    ),
    *(Case(op, {"x": f(3, 4), "y": f(4) + 0.1}) for op in BINARY),
    *(Case(op, {"x": i(3, 4), "y": i(3, 1)}, label="int") for op in BINARY[:6] if op != "real_div"),
    *(Case(op, {"x": i(3, 4), "y": i(4, low=1)}, label="int") for op in ("floor_div", "mod")),
    Case("pow", {"x": positive(3, 4), "y": f(4)}),
    Case("pow", {"x": f(3, 4), "y": np.float32([2])}, label="square"),
    Case("logical_and", {"x": b(3, 4), "y": b(4)}),
    Case("logical_or", {"x": b(3, 4), "y": b(4)}),
    Case("logical_xor", {"x": b(3, 4), "y": b(4)}),
    Case("logical_not", {"x": b(3, 4)}),
    Case("leaky_relu", {"x": f(3, 4)}, {"alpha": np.float32(0.1)}),
    Case("elu", {"x": f(3, 4)}, {"alpha": np.float32(0.7)}),
    Case("prelu", {"x": f(2, 3, 4, 5)}, {"alpha": np.float32([0.1, 0.2, 0.3])}),
    Case("clamped_relu", {"x": f(3, 4)}, {"alpha": np.float32(0.1), "beta": np.float32(0.5)}),
    Case("linear_activation", {"x": f(3, 4)}, {"alpha": np.float32(2), "beta": np.float32(0.5)}),
    Case("scaled_tanh", {"x": f(3, 4)}, {"alpha": np.float32(2), "beta": np.float32(0.5)}),
    Case("sigmoid_hard", {"x": f(3, 4)}, {"alpha": np.float32(0.4), "beta": np.float32(0.5)}),
    Case("softplus_parametric", {"x": f(2, 3, 4, 5)},
         {"alpha": np.float32([1, 2, 3]), "beta": np.float32([0.1, 0.2, 0.3])}),
    Case("thresholded_relu", {"x": f(3, 4)}, {"alpha": np.float32(0.3)},
         oracle=by_numpy(lambda x, alpha: np.where(x < alpha, 0, x))),
    Case("threshold", {"x": f(3, 4)}, {"alpha": np.float32(0.3)}),
    Case("clip", {"x": f(3, 4)}, {"alpha": np.float32(-0.3), "beta": np.float32(0.6)}),
    Case("log", {"x": positive(3, 4)}, {"epsilon": np.float32(0.1)}),
    Case("rsqrt", {"x": positive(3, 4)}, {"epsilon": np.float32(0.1)}),
    Case("rsqrt", {"x": positive(3, 4)}, label="default"),
    Case("inverse", {"x": positive(3, 4)}, {"epsilon": np.float32(0.1)}),
    *(Case("cast", {"x": f(3, 4) * 50}, {"dtype": d}, label=d)
      for d in ("int32", "int8", "fp16", "bool")),
    Case("cast", {"x": i(3, 4)}, {"dtype": "fp32"}, label="from_int"),
    Case("cast", {"x": i(3, 4, low=-1, high=2)}, {"dtype": "bool"}, label="int_bool"),
    Case("cast", {"x": np.float32([3e9, -3e9, np.inf, np.nan])}, {"dtype": "int32"}, label="far",
         oracle=by_numpy(lambda x, dtype: np.int32([2**31 - 1, -(2**31), 2**31 - 1, 0]))),
    Case("select", {"cond": b(3, 4), "a": f(3, 4), "b": f(3, 4)}),
    Case("select", {"cond": b(3, 1), "a": f(3, 4), "b": f(1, 4)}, label="broadcast"),
    Case("quantize", {"input": f(3, 4)}, {"scale": np.float32([0.1, 0.2, 0.3]), "axis": 0,
         "zero_point": np.int8([1, 2, 3]), "output_dtype": "int8"}),
    Case("quantize", {"input": f(3, 4) * 9}, {"scale": np.float32(0.1), "output_dtype": "uint8"},
         label="scalar"),
    Case("dequantize", {"input": i(3, 4).astype(np.int8)}, {"scale": np.float32([0.1, 0.2, 0.3]),
         "axis": 0, "zero_point": np.int8([1, 2, 3])}, label="axis",
         oracle=by_numpy(lambda input, scale, zero_point, axis:
                         (input - zero_point[:, None]) * scale[:, None])),
    Case("dequantize", {"input": i(3, 4).astype(np.int8)}, {"scale": np.float32(0.1)},
         oracle=by_numpy(lambda input, scale: input * scale)),
    # -- shapes
    *(Case("reshape", {"x": _x}, {"shape": s}, label=str(n))
      for n, s in enumerate(([6, 5], [-1, 5], [0, -1], [3, 2, 5], [1, 2, 3, -1, 5]))),
    Case("reshape", {"x": f(2, 50)}, {"shape": [1, 0, -1, 0]}, label="right"),
    Case("reshape", {"x": _x}, {"shape": [0, 0, -1]}, ios=16, label="old"),
    Case("reshape", {"x": _x, "shape": np.int32([5, -1])}, label="dynamic"),
    Case("reshape_like", {"x": f(2, 3, 4)},
         {"ref_tensors": (np.zeros((4, 9), np.float32), np.zeros((1, 6), np.float32)),
          "begins": (0, 1), "ends": (1, 0), "end_masks": (False, True)},
         oracle=lambda inputs, params: [inputs["x"].reshape(4, 6)]),
    *(Case("expand_dims", {"x": _x}, {"axes": a}, label=str(n))
      for n, a in enumerate(([0], [-1], [1, 3], [0, -1]))),
    Case("squeeze", {"x": f(1, 3, 1)}, {"axes": [0]}, label="axis"),
    Case("squeeze", {"x": f(1, 3, 1)}),
    Case("transpose", {"x": _x}, {"perm": [2, 0, 1]}),
    Case("transpose", {"x": _x}, {"perm": [0, -1, 1]}, label="negative"),
    *(Case("tile", {"x": _x}, {"reps": r}, label=str(n))
      for n, r in enumerate(([1, 2, 3], [3, 1, 1], [1, 1, 1]))),
    Case("concat", {"values": [f(2, 3), f(2, 1), f(2, 4)]}, {"axis": -1}),
    Case("concat", {"values": [f(3, 2), f(3, 2)]}, {"axis": 0, "interleave": True},
         label="interleave", oracle=lambda inputs, params:
         [np.stack(inputs["values"], 1).reshape(6, 2)]),
    Case("concat", {"values": [f(3, 2), f(3, 2)]}, {"axis": 1, "interleave": True},
         label="inner", oracle=lambda inputs, params:
         [np.stack(inputs["values"], 2).reshape(3, 4)]),
    Case("stack", {"values": [f(2, 3), f(2, 3)]}, {"axis": 1}),
    Case("stack", {"values": [f(2, 3), f(2, 3)]}, {"axis": -1}, label="last"),
    Case("split", {"x": f(4, 6)}, {"num_splits": 3, "axis": 1}),
    Case("split", {"x": f(4, 6)}, {"split_sizes": [1, 2, 3], "axis": -1}, label="sizes"),
    Case("slice_by_index", {"x": _x}, _index),
    Case("slice_by_index", {"x": _x}, {"begin": [0, 0, 0], "end": [0, 2, 0], "begin_mask":
         [True, False, True], "end_mask": [True, False, True]}, label="masks"),
    Case("slice_by_index", {"x": _x}, {"begin": [1, 0, -2], "end": [2, 3, -1], "squeeze_mask":
         [True, False, False]}, label="squeeze"),
    Case("slice_by_index", {"x": _x}, {"begin": [-1, -2, -4], "end": [2, 3, -1]}, label="negative"),
    Case("slice_by_index", {"x": _x, "begin": np.int32([0, 1, 1]), "end": np.int32([2, 3, 4])},
         label="dynamic"),
    Case("slice_by_size", {"x": _x}, {"begin": [0, 1, -3], "size": [2, -1, 2]}),
    Case("slice_update", {"x": _x, "update": f(2, 2, 2)}, _index),
    Case("slice_update", {"x": _x, "update": f(3, 5), "begin": np.int32([1, 0, 0]),
         "end": np.int32([0, 0, 0])}, {"end_mask": [False, True, True], "squeeze_mask":
         [True, False, False]}, label="squeeze", oracle=by_numpy(
             lambda x, update, **_: np.stack([x[0], update]))),
    Case("shape", {"x": _x}),
    Case("fill", {"shape": np.int32([2, 3])}, {"value": np.float32(1.5)}),
    Case("fill", {"shape": np.int32([2, 3])}, {"value": np.int32(7)}, label="int"),
    Case("fill_like", {"ref_tensor": f(2, 3)}, {"value": np.float32(1.5)},
         oracle=by_numpy(lambda ref_tensor, value: np.full((2, 3), value))),
    Case("range_1d", {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}),
    Case("range_1d", {"start": np.float32(0), "end": np.float32(1), "step": np.float32(0.25)},
         label="float"),
    Case("range_1d", {"start": np.int32(5), "end": np.int32(0), "step": np.int32(-2)}, label="down"),
    *(Case("band_part", {"x": f(4, 5)}, {"lower": low, "upper": up}, label=str(n))
      for n, (low, up) in enumerate(((0, -1), (-1, 0), (1, 1), (-1, -1)))),
    Case("one_hot", {"indices": np.int32([2, 0, 1])}, {"one_hot_vector_size": 4, "axis": 0,
         "on_value": np.float32(3), "off_value": np.float32(-1)},
         oracle=by_numpy(lambda indices, **_: np.where(
             np.arange(4)[:, None] == indices[None], 3.0, -1.0).astype(np.float32))),
    Case("one_hot", {"indices": np.int32([[2, 0], [1, 3]])}, {"one_hot_vector_size": 4},
         label="default", oracle=by_numpy(lambda indices, **_: np.eye(4, dtype=np.int32)[indices])),
    Case("pad", {"x": f(2, 3)}, {"pad": [1, 0, 2, 1], "mode": "constant",
         "constant_val": np.float32(4)}),
    Case("pad", {"x": f(2, 3)}, {"pad": [1, 2], "mode": "reflect"}, label="reflect"),
    Case("pad", {"x": f(2, 3)}, {"pad": [1, 2], "mode": "replicate"}, label="replicate"),
    Case("argsort", {"x": f(3, 6)}),
    Case("argsort", {"x": f(3, 6)}, {"axis": 0, "ascending": True}, label="up"),
    Case("topk", {"x": f(3, 6)}, {"k": 2}),
    Case("topk", {"x": f(3, 6)}, {"k": 2, "axis": 0, "ascending": True}, label="up"),
    Case("topk", {"x": f(3, 6)}, {"k": 4, "output_indices_dtype": "uint16"}, label="short"),
    Case("topk", {"x": f(3, 6)}, {"k": 4, "return_indices": False}, label="values",
         oracle=by_torch(lambda x: torch.topk(x, 4).values, "x")),
    Case("reverse", {"x": _x}, {"axes": [0, 2]}),
    Case("reverse", {"x": _x}, label="all"),
    Case("flatten2d", {"x": _x}, {"axis": 2}),
    Case("non_zero", {"x": i(3, 4, low=0, high=2)}),
    Case("sliding_windows", {"x": f(2, 7)}, {"axis": 1, "size": 3, "stride": 2},
         oracle=by_numpy(windows)),
    Case("sliding_windows", {"x": f(7, 2)}, {"axis": 0, "size": 3}, label="first",
         oracle=by_numpy(windows)),
    # -- gathering
    Case("gather", {"x": f(5, 4), "indices": np.int32([[3, 0], [1, 1]])}),
    Case("gather", {"x": f(5, 4), "indices": np.int32([3, 0])}, {"axis": -1,
         "validate_indices": True}, label="last"),
    Case("gather", {"x": f(5, 4), "indices": np.int32([-1, 2])}, ios=16, label="negative"),
    Case("gather", {"x": f(2, 5, 4), "indices": i(2, 3, low=0, high=5)}, {"axis": 1,
         "batch_dims": 1}, label="batch"),
    Case("gather", {"x": f(2, 3, 4, 5), "indices": i(2, 3, 2, low=0, high=4)}, {"axis": 2,
         "batch_dims": 2}, label="batches"),
    Case("gather_along_axis", {"x": f(3, 4), "indices": i(3, 2, low=0, high=4)}, {"axis": 1}),
    Case("gather_nd", {"x": f(3, 4, 5), "indices": np.int32([[0, 1], [2, 3]])},
         oracle=by_numpy(lambda x, indices: np.stack([x[0, 1], x[2, 3]]))),
    Case("gather_nd", {"x": f(2, 4, 5), "indices": np.int32([[[0], [3]], [[1], [2]]])},
         {"batch_dims": 1}, label="batch", oracle=by_numpy(
             lambda x, indices, batch_dims: np.stack([x[0][[0, 3]], x[1][[1, 2]]]))),
    *(Case("scatter", {"data": positive(4, 3), "indices": np.int32([2, 0, 2]),
           "updates": positive(3, 3)}, {"axis": 0, "mode": m}, label=m,
           oracle=by_numpy(lambda data, indices, updates, axis, mode:
                           scattered(data, indices[:, None], updates, mode)))
      for m in ("add", "sub", "mul", "div", "max", "min", "update")),
    Case("scatter", {"data": f(3, 4), "indices": np.int32([1, 3]), "updates": f(3, 2)},
         {"axis": 1, "mode": "update"}, label="inner",
         oracle=by_torch(lambda d, i, u: d.index_copy(1, i.long(), u), "data", "indices", "updates")),
    Case("scatter_along_axis", {"data": f(3, 4), "indices": np.int32([[0, 0], [1, 3], [2, 2]]),
         "updates": f(3, 2)}, {"axis": 1, "mode": "add"}, oracle=by_numpy(along_axis)),
    Case("scatter_nd", {"data": f(3, 4), "indices": np.int32([[0, 1], [2, 3], [0, 1]]),
         "updates": f(3)}, {"mode": "add"}, oracle=by_numpy(scattered)),
    # -- sums
    Case("linear", {"x": f(2, 3, 5)}, {"weight": f(7, 5), "bias": f(7)}),
    Case("linear", {"x": f(3, 5)}, {"weight": f(7, 5)}, label="plain"),
    Case("matmul", {"x": f(2, 3, 5), "y": f(5, 4)}),
    Case("matmul", {"x": f(2, 5, 3), "y": f(2, 4, 5)}, {"transpose_x": True, "transpose_y": True},
         label="turned"),
    Case("matmul", {"x": f(5), "y": f(5, 4)}, label="vector"),
    Case("einsum", {"values": [f(2, 3, 4, 5), f(2, 5, 4, 6)]}, {"equation": "nchw,nwhu->nchu"}),
    Case("einsum", {"values": [f(3, 4, 5), f(5, 1, 6)]}, {"equation": "chw,whr->chr"},
         label="broadcast"),
    *(Case(op, {"x": f(2, 3, 4)}, {"axes": [-1], "keep_dims": True}) for op in REDUCTIONS),
    *(Case(op, {"x": f(2, 3, 4)}, {"axes": [0, 2], "keep_dims": False}, label="two")
      for op in REDUCTIONS),
    Case("reduce_sum", {"x": i(2, 3)}, label="int"),
    Case("reduce_log_sum", {"x": positive(2, 3)}, {"axes": [1]}),
    Case("reduce_argmax", {"x": f(3, 5)}),
    Case("reduce_argmin", {"x": f(3, 5)}, {"axis": 0, "keep_dims": True}),
    Case("reduce_argmax", {"x": f(3, 5)}, {"output_dtype": "uint16"}, label="short"),
    Case("cumsum", {"x": f(3, 5)}, {"axis": 1}),
    Case("cumsum", {"x": f(3, 5)}, {"axis": 0, "reverse": True}, label="reverse"),
    Case("cumsum", {"x": i(5)}, {"axis": 0, "exclusive": True}, label="exclusive",
         oracle=by_torch(lambda x: (x.cumsum(0) - x).to(torch.int32), "x")),
    Case("cumsum", {"x": i(5)}, {"axis": 0, "exclusive": True, "reverse": True}, label="both",
         oracle=by_torch(lambda x: (x.flip(0).cumsum(0).flip(0) - x).to(torch.int32), "x")),
    Case("softmax", {"x": f(2, 3, 4)}),
    Case("softmax", {"x": f(2, 3, 4) * 50}, {"axis": 1}, label="axis"),
    Case("layer_norm", {"x": f(2, 3, 8)}, {"axes": [-1], "gamma": f(8), "beta": f(8)}),
    Case("layer_norm", {"x": f(2, 3, 8)}, {"axes": [1, 2], "gamma": f(3, 8), "beta": f(3, 8),
         "epsilon": np.float32(0.1)}, label="two"),
    Case("layer_norm", {"x": f(2, 3, 8)}, {"axes": [0, 1, 2]}, label="all"),
    Case("l2_norm", {"x": f(2, 3, 4, 5)}, {"epsilon": np.float32(0.1)}),
    Case("l2_norm", {"x": f(3, 4, 5)}, label="one"),
    Case("batch_norm", {"x": f(2, 3, 4, 5)}, {"mean": f(3), "variance": positive(3),
         "gamma": f(3), "beta": f(3)}, oracle=by_torch(
             lambda x, m, v, g, o: torch.nn.functional.batch_norm(x, m, v, g, o, eps=1e-5),
             "x", "mean", "variance", "gamma", "beta")),
    Case("instance_norm", {"x": f(2, 3, 4, 5)}, {"gamma": f(3), "beta": f(3)}, oracle=by_torch(
             lambda x, g, o: torch.nn.functional.instance_norm(x, weight=g, bias=o, eps=1e-5),
             "x", "gamma", "beta")),
    Case("scaled_dot_product_attention", {"query": _q, "key": _k, "value": _v}),
    Case("scaled_dot_product_attention", {"query": _q, "key": _k, "value": _v,
         "attn_mask": f(1, 1, 4, 6)}, label="mask"),
    Case("scaled_dot_product_attention", {"query": _q, "key": _k, "value": _v,
         "attn_mask": np.tril(np.ones((4, 6), bool))}, label="bool",
         oracle=by_torch(_sdpa, "query", "key", "value", "attn_mask")),
    Case("scaled_dot_product_attention", {"query": _q[0], "key": _k[0], "value": _v[0]},
         label="rank3", oracle=by_torch(_sdpa, "query", "key", "value")),
    *(Case("conv", {"x": f(2, 4, *(9,) * n)}, {"weight": f(6, 4, *(1,) * n), "bias": f(6)},
           label=f"one_{n}d", oracle=by_torch(c, "x", "weight", "bias"))
      for n, c in ((1, torch.conv1d), (2, torch.conv2d), (3, torch.conv3d))),
    Case("conv", {"x": f(2, 4, 9, 8)}, {"weight": f(6, 2, 3, 2), "strides": [2, 1], "groups": 2,
         "pad_type": "custom", "pad": [1, 1, 2, 2], "dilations": [1, 2]}, label="all",
         oracle=by_torch(lambda x, w: torch.conv2d(x, w, None, (2, 1), (1, 2), (1, 2), 2),
                         "x", "weight")),
    *(Case("conv", {"x": f(1, 2, 8, 7)}, {"weight": f(3, 2, 3, 2), "strides": [2, 2],
           "pad_type": kind}, label=kind, oracle=by_torch(
               lambda x, w, p=pads: torch.conv2d(torch.nn.functional.pad(x, p), w, None, 2),
               "x", "weight"))
      for kind, pads in (("same", (0, 1, 0, 1)), ("same_lower", (1, 0, 1, 0)))),
]  # fmt: skip
assert math.isclose(len({(c.name, c.ios) for c in CASES}), len(CASES)), (
    "a case's name is used twice"
)
