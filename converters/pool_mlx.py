"""Adapters on a live mlx-lm model: layers that are wrapped, and arrays that are exchanged.

The wrapper adds to the layer's output in mlx-lm's arithmetic (mlx-lm 0.32.2, ``tuner/lora.py``,
``dora.py``), with the factors in the file's dtype, as its loader holds them. mlx-lm's LoRA on a
tied embedding moves the head too (kind ``both``); PEFT's moves one side, and here each side can be
had alone. Replaced parameters, and in fused mode all weights, are exchanged: the base's own arrays
are kept and put back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters.fuse_places import TOKENS, token_rows
from loraduct.converters.pool_parts import Held, Low, Plan, Stack, misfit, no_place, overflow
from loraduct.errors import Refused
from loraduct.formats.base import HEADS
from loraduct.modules import block_of, kind_of_module
from loraduct.tensor import Tensor

_PACKED = (
    "is packed in this model: adapters can't be fused into it bit-exactly; use the pool unfused"
)
_ONE_SIDE = (
    "is tied to the other side in this model, and fusing would move both; use the pool unfused"
)
_NO_BIAS = (
    "an adapter moves the head's bias (lora_bias), for which this model has no place: it multiplies by"
    " its embedding's weight; deactivate it, and train without lora_bias"
)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Mlx:
    """A `pool_parts.Runtime` over an mlx-lm model."""

    naming = "mlx"

    def __init__(self, model: Any, fused: bool) -> None:
        self.model, self.fused = model, fused
        self._wrapped: dict[str, Any] = {}  # module -> the base's own
        self._kept: dict[str, Any] = {}  # parameter -> the base's own array (None: it has no bias)

    def _at(self, path: str) -> Any:
        """What stands at a path: a module, a list of blocks."""
        found = self.model
        for part in path.split(".") if path else ():
            found = found[int(part)] if isinstance(found, list) else found[part]
        return found

    def _module(self, path: str) -> Any:
        """The base's own module, or None."""
        if path in self._wrapped:
            return self._wrapped[path]
        try:
            return self._at(path)
        except (KeyError, IndexError, ValueError, TypeError):
            return None

    def _array(self, name: str) -> Any:
        """The base's own array of a parameter, or None."""
        if name in self._kept:
            return self._kept[name]
        module = self._module(name.rpartition(".")[0])
        return module.get(name.rpartition(".")[2]) if isinstance(module, dict) else None

    def _home(self, module: str) -> str:
        """Where an update acts: of a head that the model ties, its one embedding."""
        if self._module(module) is not None or not module.endswith(HEADS):
            return module
        found = [
            n
            for n, m in self._originals()
            if hasattr(m, "as_linear") and not block_of(n) and kind_of_module(n) == "embedding"
        ]
        return found[0] if len(found) == 1 else module

    def _originals(self) -> list[tuple[str, Any]]:
        return [(n, self._wrapped.get(n, m)) for n, m in self.model.named_modules()]

    def plan(self, adapter: Adapter) -> Plan:
        """See `pool_parts.Runtime`."""
        plan = Plan(adapter, 0)
        own = adapter.format == "mlx"
        for module, u in adapter.low_rank.items():
            self._check(adapter, module, u)
            if own and u.layout == "embedding" and not self._has_head():
                u = replace(u, layout="both")
            one_side = u.layout == "embedding" or self._home(module) != module
            if self.fused and one_side and not self._has_head():
                raise Refused(adapter.weights, _ONE_SIDE, tensor=module)
            plan.updates[module] = u, False
            plan.nbytes += sum(t.nbytes for t in u.tensors)
        for name, r in adapter.replacements.items():
            rows = name.endswith(TOKENS)
            target = f"{name.removesuffix(TOKENS)}.weight" if rows else name
            weight = self._array(target)
            if weight is None:
                raise no_place(adapter, name)
            if str(weight.dtype).rpartition(".")[2] not in _DTYPES.values():
                raise Refused(adapter.weights, _PACKED, tensor=name)
            if rows:
                plan.rows[target] = token_rows(adapter, name, r.weight, weight.shape), r.weight
            elif r.weight.shape != tuple(weight.shape):
                raise misfit(adapter, name, r.weight.shape, weight.shape)
            else:
                plan.replaced[target] = r.weight
            head = kind_of_module(target.rpartition(".")[0]) == "embedding" and not self._has_head()
            if head and not rows and not own:
                raise Refused(adapter.weights, _ONE_SIDE, tensor=name)
            plan.nbytes += weight.itemsize * prod(r.weight.shape)
        return plan

    def _has_head(self) -> bool:
        return any(n.endswith(HEADS) for n, _ in self._originals())

    def _check(self, adapter: Adapter, module: str, u: LowRank) -> None:
        """Refuse what has no place in the live model, or no meaning there."""
        home = self._home(module)
        layer = self._module(home)
        if not hasattr(layer, "weight") or u.layout not in ("linear", "embedding", "experts"):
            raise no_place(adapter, module)
        shape = _shape(layer)
        if shape != u.shape:
            raise misfit(adapter, module, u.shape, shape)
        out = u.shape[1 if u.layout == "embedding" else 0]
        if any(t is not None and t.shape != (out,) for t in (u.magnitude, u.bias)):
            what = "is joined or split on the way to mlx-lm's layers together with its bias or magnitude"
            raise Refused(adapter.weights, what, tensor=module)
        if self.fused and "scales" in layer:
            raise Refused(adapter.weights, _PACKED, tensor=module)

    def weights(self, plan: Plan) -> Mapping[str, Any]:
        """See `pool_parts.Runtime`."""
        homes = {m: self._module(self._home(m)) for m in plan.updates}
        norms = {m: _weight(homes[m]) for m, (u, _) in plan.updates.items() if u.magnitude}
        return norms | {n: self._array(n) for n in (*plan.replaced, *plan.rows)}

    def read(self, plan: Plan, weights: Mapping[str, Any]) -> Held:
        """See `pool_parts.Runtime`."""
        import mlx.core as mx

        held = Held(plan.adapter.weights, plan.nbytes)
        for name, (u, bare) in plan.updates.items():
            low = Low(
                _made(u.a), _made(u.b), u.scale, u.layout, bias=u.bias and _made(u.bias), bare=bare
            )
            if u.magnitude is not None:
                moved = weights[name].astype(mx.float32) + _delta(low)
                axis = 0 if low.kind == "embedding" else 1
                low.factor = _made(u.magnitude).reshape(-1) / mx.linalg.norm(moved, axis=axis)
            held.updates[name] = low
        for name, tensor in plan.replaced.items():
            held.replaced[name] = _made(tensor).astype(weights[name].dtype)
        for name, (rows, tensor) in plan.rows.items():
            held.rows[name] = rows, _made(tensor).astype(weights[name].dtype)
        _check({**held.replaced, **{n: v for n, (_, v) in held.rows.items()}}, held.file)
        arrays = [x for u in held.updates.values() for x in (u.a, u.b, u.factor, u.bias)]
        mx.eval(arrays, held.replaced, [v for _, v in held.rows.values()])
        return held

    def show(self, stack: Stack) -> None:
        """See `pool_parts.Runtime`."""
        made = self._made(stack)
        _check(made, stack[0][0].file if len(stack) == 1 else None)
        layers: dict[str, list[tuple[Low, float]]] = {}
        heads: dict[str, list[tuple[Low, float]]] = {}
        for held, weight in stack if not self.fused else ():
            for name, low in held.updates.items():
                home = self._home(name)
                if home == name:
                    layers.setdefault(home, []).append((low, weight))
                if home != name or low.kind == "both":
                    heads.setdefault(home, []).append((low, weight))
        for path, module in self._wrapped.items():
            self._put(path, module)
        self._wrapped = {}
        for name, array in self._kept.items():
            self._set(name, array)
        self._kept = {}
        for name, array in made.items():
            self._kept[name] = self._array(name)
            self._set(name, array)
        for path in {**layers, **heads}:
            self._wrapped[path] = self._module(path)
            steps, head = layers.get(path, []), heads.get(path, [])
            self._put(path, _adapted()(self._wrapped[path], steps, head))

    def _put(self, path: str, module: Any) -> None:
        parent, _, leaf = path.rpartition(".")
        there = self._at(parent)
        there[int(leaf) if isinstance(there, list) else leaf] = module

    def _set(self, name: str, array: Any) -> None:
        module = self._module(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if array is None:
            del module[leaf]
        else:
            module[leaf] = array

    def _made(self, stack: Stack) -> dict[str, Any]:
        """Parameter -> what will stand in its place: float32 sums, rounded once."""
        import mlx.core as mx

        done: dict[str, Any] = {}
        sums: dict[str, list[tuple[Low, float]]] = {}
        moved: dict[str, Any] = {}
        for held, weight in stack:
            done |= held.replaced
            for name, (rows, values) in held.rows.items():
                done[name] = mx.array(self._array(name))
                done[name][mx.array(rows)] = values
            for name, low in held.updates.items() if self.fused else ():
                sums.setdefault(f"{name}.weight", []).append((low, weight))
                if low.bias is not None:
                    bias = f"{name}.bias"
                    moved[bias] = moved.get(bias, 0) + low.bias * (low.scale * weight)
        done |= {n: _sum(self._array(n), steps) for n, steps in sums.items()}
        for name, change in moved.items():
            base = done.get(name, self._array(name))
            dtype = self._array(f"{name.removesuffix('bias')}weight").dtype
            done[name] = (change if base is None else base + change).astype(dtype)
        return done

    @property
    def exchanged_bytes(self) -> int:
        """See `pool_parts.Runtime`."""
        arrays = [self._module(n.rpartition(".")[0])[n.rpartition(".")[2]] for n in self._kept]
        heads = [self._at(path).head_weight for path in self._wrapped]
        return sum(a.nbytes for a in (*arrays, *heads) if a is not None)


@functools.cache
def _adapted() -> type:
    """The wrapper's class; mlx is imported when it is first needed."""
    import mlx.nn as nn

    class Adapted(nn.Module):  # type: ignore[misc]
        """A layer of the base with adapters' changes to what it gives."""

        def __init__(self, inner: Any, steps: Any, head: Any) -> None:
            super().__init__()
            self.inner = inner
            self._steps, self._head = steps, head
            self.head_weight = None  # once it was asked for

        @property
        def weight(self) -> Any:
            """For models that multiply by the weight themselves: W + dW, of an embedding the head's."""
            weight = self.inner.weight
            if "scales" in self.inner:
                return weight  # packed, as such a model can't use it
            if not hasattr(self.inner, "as_linear"):
                return _sum(weight, self._steps)
            if self._head and self.head_weight is None:
                if any(low.bias is not None for low, _ in self._head):
                    raise Refused(None, _NO_BIAS)
                made = _sum(weight, self._head)
                _check({"the tied head": made}, None)
                object.__setattr__(self, "head_weight", made)  # no parameter of the model
            return self.head_weight if self._head else weight

        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            y = self.inner(x, *args, **kwargs)
            return _moved(self.inner, y, x, self._steps, _forward, (*args, *kwargs.values()))

        def as_linear(self, x: Any) -> Any:
            return _moved(self.inner, self.inner.as_linear(x), x, self._head, _backward, ())

        def __getattr__(self, key: str) -> Any:
            """What else the model asks of the layer, the base's own has."""
            if key in self:
                return self[key]
            if "inner" in self and not key.startswith("_"):
                return getattr(self["inner"], key)
            raise AttributeError(key)

    return Adapted


def _moved(layer: Any, y: Any, x: Any, steps: Any, change_of: Any, rest: Any) -> Any:
    dtype = y.dtype
    bias = layer.get("bias")
    for low, weight in steps:
        change = (low.scale * weight) * change_of(low, x, rest)
        if low.factor is None:
            y = y + change.astype(y.dtype)
            continue
        free = y if bias is None else y - bias
        y = low.factor.astype(y.dtype) * (free + change.astype(y.dtype))
        y = y if bias is None else y + bias
    return y.astype(dtype)


def _sum(weight: Any, steps: Any) -> Any:
    """A weight with updates in it, in their order: float32 sums, rounded once to its dtype."""
    import mlx.core as mx

    total = weight.astype(mx.float32)
    for low, factor in steps:
        total = total + factor * _delta(low)
        if low.factor is not None:
            total = total * (low.factor if low.kind == "embedding" else low.factor[:, None])
    return total.astype(weight.dtype)


def _check(values: Mapping[str, Any], file: Path | None) -> None:
    """Evaluate. Raises Refused for Inf and NaN, which a dtype has where float32 had numbers."""
    import mlx.core as mx

    fits = {n: mx.isfinite(v).all() for n, v in values.items()}
    mx.eval(values, fits)
    odd = next((n for n, good in fits.items() if not good.item()), None)
    if odd is not None:
        raise overflow(file, odd, values[odd].dtype)


def _forward(low: Low, x: Any, rest: Any) -> Any:
    """b(a(x)) of a layer's input; ``rest``: of experts, which of them, and whether they are sorted."""
    import mlx.core as mx

    if low.kind in ("embedding", "both"):
        return low.a.T[x] @ low.b.T
    if low.kind == "experts":
        given = {"rhs_indices": rest[0], "sorted_indices": rest[1] if len(rest) > 1 else False}
        z = mx.gather_mm(x, low.a.swapaxes(-1, -2), **given)
        return mx.gather_mm(z, low.b.swapaxes(-1, -2), **given)
    z = (x @ low.a.T) @ low.b.T
    return z if low.bias is None else z + low.bias


def _backward(low: Low, x: Any, rest: Any) -> Any:
    """The same where an embedding is the head."""
    return (x @ low.b) @ low.a if low.kind == "both" else _forward(low, x, rest)


def _delta(low: Low) -> Any:
    """dW as the layer's weight is stored, float32."""
    import mlx.core as mx

    a, b = low.a.astype(mx.float32), low.b.astype(mx.float32)
    delta = low.scale * (b @ a)
    return delta.T if low.kind in ("embedding", "both") else delta


def _weight(layer: Any) -> Any:
    """The weight in plain numbers."""
    import mlx.core as mx

    if "scales" not in layer:
        return layer.weight
    kept = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **kept)


def _shape(layer: Any) -> tuple[int, ...]:
    """Of the weight, unpacked."""
    shape = tuple(layer.weight.shape)
    return (
        shape if "scales" not in layer else (*shape[:-1], layer.scales.shape[-1] * layer.group_size)
    )


def _made(tensor: Tensor) -> Any:
    """The values in the dtype of the file."""
    import mlx.core as mx

    return mx.array(tensor.read().reshape(tensor.shape)).astype(getattr(mx, _DTYPES[tensor.dtype]))
