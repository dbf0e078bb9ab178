"""Adapters on a live torch model: forward hooks, and parameters that are exchanged and given back.

A linear layer, a convolution or an embedding keeps its weights, and a hook adds to its output, in
PEFT's order and arithmetic (peft 0.21.2, ``tuners/lora/layer.py``, ``dora.py``): float32 factors,
each adapter on what those before it have made. Replaced parameters, bare ones (experts, routers),
and in fused mode all weights, are exchanged: the module gets another Parameter, the base's own is
kept untouched and comes back as the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters.fuse_places import TOKENS, token_rows
from loraduct.converters.pool_parts import Held, Low, Plan, Stack, misfit, no_place, overflow
from loraduct.errors import Refused
from loraduct.tensor import Tensor

_BARE = ("weight", "parameter", "experts")
_CONV = "is a convolution with groups, dilation or padding of its own kind, which PEFT's LoRA lacks"


class Torch:
    """A `pool_parts.Runtime` over a torch module with transformers' names."""

    naming = "hf"

    def __init__(self, model: Any, fused: bool) -> None:
        self.model, self.fused = model, fused
        self._modules = dict(model.named_modules())
        self._kept: dict[str, Any] = {}  # parameter -> the base's own (None: it has no bias)
        self._hooks: list[Any] = []

    def _owner(self, adapter: Adapter, parameter: str) -> Any:
        owner = self._modules.get(parameter.rpartition(".")[0])
        if owner is None:
            raise no_place(adapter, parameter)
        return owner

    def _base(self, parameter: str) -> Any:
        """The base's own parameter, whatever stands in its place now."""
        if parameter in self._kept:
            return self._kept[parameter]
        path, _, leaf = parameter.rpartition(".")
        return self._modules[path]._parameters.get(leaf)

    def _parameter(self, adapter: Adapter, name: str) -> Any:
        """A float parameter of the base. Raises Refused when there is none."""
        self._owner(adapter, name)
        found = self._base(name)
        if found is None:
            raise no_place(adapter, name)
        if not found.is_floating_point() or found.is_meta:
            what = "is not in plain floats in this model: it can't be exchanged; load the base unpacked"
            raise Refused(adapter.weights, what, tensor=name)
        return found

    def plan(self, adapter: Adapter) -> Plan:
        """See `pool_parts.Runtime`."""
        plan = Plan(adapter, 0)
        for module, u in adapter.low_rank.items():
            bare = self._place(adapter, module, u)
            name = (
                f"{module}.weight"
                if u.layout == "weight" or (bare and u.layout == "linear")
                else module
            )
            plan.updates[name] = u, bare
            plan.nbytes += 4 * sum(prod(t.shape) for t in u.tensors)  # as PEFT holds them: float32
        for name, r in adapter.replacements.items():
            if name.endswith(TOKENS):
                target = f"{name.removesuffix(TOKENS)}.weight"
                weight = self._parameter(adapter, target)
                rows = token_rows(adapter, name, r.weight, weight.shape)
                for same in self._tied(target, weight):  # PEFT trains a tied head's rows too
                    plan.rows[same] = rows, r.weight
            else:
                weight = self._parameter(adapter, name)
                if tuple(weight.shape) != r.weight.shape:
                    raise misfit(adapter, name, r.weight.shape, weight.shape)
                plan.replaced[name] = r.weight
            plan.nbytes += weight.element_size() * prod(r.weight.shape)
        return plan

    def _tied(self, target: str, weight: Any) -> list[str]:
        """``target`` and every other name of the same parameter of the base."""
        names = dict(self.model.named_parameters(remove_duplicate=False))
        return [target, *(n for n in names if n != target and self._base(n) is weight)]

    def _place(self, adapter: Adapter, module: str, u: LowRank) -> bool:
        """Whether the update is one of a bare parameter. Raises Refused when it has no place."""
        import torch

        bare = u.layout in _BARE
        if bare:
            name = f"{module}.weight" if u.layout == "weight" else module
            weight = self._parameter(adapter, name)
            owner = self._owner(adapter, name)
            shape, turned = tuple(weight.shape), u.shape[:-2] + u.shape[:-3:-1]
            if (turned if _turned(owner, u) else u.shape) != shape:
                raise misfit(adapter, module, u.shape, shape)
            return True
        layer = self._owner(adapter, f"{module}.weight")
        weight = self._base(f"{module}.weight")
        if weight is None:
            raise no_place(adapter, module)
        there = _shape(layer, weight, u)
        if there != u.shape:
            raise misfit(adapter, module, u.shape, there)
        if (self.fused or u.magnitude is not None) and not weight.is_floating_point():
            what = "is packed in this model: neither DoRA nor fusing is possible on it; load the base unpacked"
            raise Refused(adapter.weights, what, tensor=module)
        if u.layout == "conv":
            plain = (
                layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
            )
            if not plain:
                raise Refused(adapter.weights, _CONV, tensor=module)
        parent = self._modules[module.rpartition(".")[0]]
        bare = isinstance(parent, torch.nn.MultiheadAttention)  # reads its layers' weights itself
        if bare and u.magnitude is not None:
            what = "is DoRA on an attention layer that torch runs as a whole: not supported here"
            raise Refused(adapter.weights, what, tensor=module)
        return bare

    def weights(self, plan: Plan) -> Mapping[str, Any]:
        """See `pool_parts.Runtime`."""
        names = [n if bare else f"{n}.weight" for n, (_, bare) in plan.updates.items()]
        return {n: self._base(n) for n in [*names, *plan.replaced, *plan.rows]}

    def read(self, plan: Plan, weights: Mapping[str, Any]) -> Held:
        """See `pool_parts.Runtime`."""
        held, arrays = Held(plan.adapter.weights, plan.nbytes), _Arrays(plan)
        for name, (u, bare) in plan.updates.items():
            weight = weights[name if bare else f"{name}.weight"]
            a, b, m, bias = (
                None if t is None else arrays.read(t).to(weight.device)
                for t in (u.a, u.b, u.magnitude, u.bias)
            )
            low = Low(a, b, u.scale, u.layout, bias=bias, bare=bare)
            if m is not None:
                layer = self._modules[name]
                low.factor = m.reshape(-1).div_(_lengths(layer, low, weight))
            held.updates[name] = low
        for name, tensor in plan.replaced.items():
            held.replaced[name] = _as(weights[name], tensor, held.file, name)
        for name, (rows, tensor) in plan.rows.items():
            held.rows[name] = rows, _as(weights[name], tensor, held.file, name)
        return held

    def show(self, stack: Stack) -> None:
        """See `pool_parts.Runtime`. Everything is computed before the first thing is exchanged."""
        import torch

        with torch.no_grad():
            made = self._made(stack)
        hooked: dict[str, list[tuple[Low, float]]] = {}
        for held, weight in stack:
            for name, low in held.updates.items():
                if not (low.bare or self.fused):
                    hooked.setdefault(name, []).append((low, weight))
        for hook in self._hooks:
            hook.remove()
        for name, original in self._kept.items():
            self._put(name, original)
        self._hooks, self._kept = [], {}
        for name, value in made.items():
            self._kept[name] = self._base(name)
            self._put(name, torch.nn.Parameter(value, requires_grad=False))
        for name, steps in hooked.items():
            layer = self._modules[name]
            self._hooks.append(layer.register_forward_hook(_Hook(steps)))

    def _put(self, name: str, parameter: Any) -> None:
        path, _, leaf = name.rpartition(".")
        self._modules[path]._parameters[leaf] = parameter

    def _made(self, stack: Stack) -> dict[str, Any]:
        """Parameter -> what will stand in its place: float32 sums, rounded once."""
        import torch

        done: dict[str, Any] = {}
        sums: dict[str, list[tuple[Low, float]]] = {}
        moved: dict[str, Any] = {}
        file = stack[0][0].file if len(stack) == 1 else None
        for held, weight in stack:
            done |= held.replaced
            for name, (rows, values) in held.rows.items():
                done[name] = self._base(name).detach().clone()
                done[name][torch.tensor(rows, device=values.device)] = values
            for name, low in held.updates.items():
                if low.bare or self.fused:
                    sums.setdefault(name if low.bare else f"{name}.weight", []).append(
                        (low, weight)
                    )
                if self.fused and low.bias is not None:
                    bias = f"{name}.bias"
                    moved[bias] = moved.get(bias, 0) + low.bias * (low.scale * weight)
        for name, updates in sums.items():
            base = self._base(name)
            owner = self._modules[name.rpartition(".")[0]]
            total = base.detach().float().clone()
            for low, weight in updates:
                total += _delta(owner, low, weight).reshape(total.shape)
                if low.factor is not None:
                    total *= _along(owner, low, total)
            done[name] = _fitted(total.to(base.dtype), file, name)
        for name, change in moved.items():
            base = done.get(name, self._base(name))
            weight = self._base(f"{name.removesuffix('bias')}weight")
            total = change if base is None else base.float() + change
            done[name] = _fitted(total.to(weight.dtype), file, name)
        return done

    @property
    def exchanged_bytes(self) -> int:
        """See `pool_parts.Runtime`."""
        held = [self.model.get_parameter(n) for n in self._kept]
        return sum(p.numel() * p.element_size() for p in held)


class _Hook:
    """What is added to a layer's output: LoRA, then DoRA's factor, adapter by adapter."""

    def __init__(self, steps: list[tuple[Low, float]]) -> None:
        self.steps = steps

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        x, y = args[0], output
        for low, weight in self.steps:
            change = _change(layer, low, x) * (low.scale * weight)
            if low.factor is None:
                y = y + change
                continue
            bias = None if low.kind == "embedding" else layer.bias
            shape = (-1,) + (1,) * (y.dim() - 2) if low.kind == "conv" else (-1,)
            factor = low.factor.reshape(shape)
            free = y if bias is None else y - bias.reshape(shape)
            y = y + (factor - 1) * free + factor * change
        return y.to(output.dtype)


def _change(layer: Any, low: Low, x: Any) -> Any:
    """b(a(x)) of a layer's input, float32, with LoRA's own bias."""
    import torch.nn.functional as F

    if low.kind == "embedding":
        scale = getattr(layer, "embed_scale", None)  # Gemma's embedding multiplies what it looks up
        y = F.linear(F.embedding(x, low.a.T), low.b)
        return y if scale is None else y * scale
    x = x.to(low.a.dtype)
    if low.kind == "conv":
        conv = (F.conv1d, F.conv2d, F.conv3d)[low.a.dim() - 3]
        return conv(conv(x, low.a, None, layer.stride, layer.padding), low.b, low.bias)
    return F.linear(F.linear(x, low.a), low.b, low.bias)


def _delta(owner: Any, low: Low, weight: float = 1.0) -> Any:
    """dW times ``weight`` in the stored orientation of the parameter, float32."""
    a, b = (t.flatten(1) if low.kind == "conv" else t for t in (low.a, low.b))
    delta = (b @ a) * (low.scale * weight)
    return delta.mT if _turned(owner, low) else delta


def _turned(owner: Any, u: Low | LowRank) -> bool:
    """Whether the parameter is stored (in, out): embeddings, Conv1D, and experts that say so."""
    kind = u.kind if isinstance(u, Low) else u.layout
    if kind == "experts":
        return bool(getattr(owner, "is_transposed", False))
    return kind == "embedding" or (kind == "linear" and type(owner).__name__ == "Conv1D")


def _along(owner: Any, low: Low, weight: Any) -> Any:
    """DoRA's factor in the shape in which it multiplies the weight."""
    if _turned(owner, low):
        return low.factor
    return low.factor.reshape(-1, *(1,) * (weight.dim() - 1))


def _lengths(layer: Any, low: Low, weight: Any) -> Any:
    """||W + dW|| of each output (embeddings: of each dimension), float32."""
    moved = weight.detach().float() + _delta(layer, low).reshape(weight.shape)
    moved = moved.T if _turned(layer, low) else moved.reshape(moved.shape[0], -1)
    return moved.norm(dim=1)


def _shape(layer: Any, weight: Any, u: LowRank) -> tuple[int, ...]:
    """Of the weight of a layer as `LowRank.shape` counts it; a packed layer says its own sizes."""
    shape = tuple(weight.shape)
    if not weight.is_floating_point() and hasattr(layer, "in_features"):
        shape = layer.out_features, layer.in_features
    conv1d = u.layout == "linear" and type(layer).__name__ == "Conv1D"
    return shape[::-1] if conv1d else shape


class _Arrays:
    """Float32 tensors of one piece of memory, which is as large as all of a plan's updates.

    Memory of many megabytes comes in large pages, which take half as long to read into.
    """

    def __init__(self, plan: Plan) -> None:
        import numpy as np

        sizes = [prod(t.shape) for u, _ in plan.updates.values() for t in u.tensors]
        self._space, self._used = np.empty(sum(sizes), np.float32), 0

    def read(self, tensor: Tensor) -> Any:
        """One tensor's values."""
        begin, self._used = self._used, self._used + prod(tensor.shape)
        return _read(tensor, self._space[begin : self._used].reshape(tensor.shape))


def _array(tensor: Tensor) -> Any:
    """The values as a float32 tensor of its own memory."""
    import numpy as np

    return _read(tensor, np.empty(tensor.shape, np.float32))


def _as(weight: Any, tensor: Tensor, file: Path, name: str) -> Any:
    """The values in the dtype of the base's parameter, where that is."""
    return _fitted(_array(tensor).to(weight), file, name)


def _fitted(value: Any, file: Path | None, name: str) -> Any:
    """``value``. Raises Refused for Inf and NaN, which its dtype has where float32 had numbers."""
    if value.numel() and not all(e.isfinite() for e in value.aminmax()):
        raise overflow(file, name, value.dtype)
    return value


def _read(tensor: Tensor, out: Any) -> Any:
    import torch

    tensor.read_into(out)
    return torch.from_numpy(out)
