"""What a pool is given, checked: the model, its base, names and weights, an adapter's files."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.converters.pool_parts import Runtime
from loraduct.errors import LoraductError, Refused
from loraduct.formats import CONFIG
from loraduct.formats import base as base_folder
from loraduct.formats.base import Base
from loraduct.text import printable

Wanted = str | tuple[str, float]  # a name, or a name and its weight
Stamps = Mapping[Path, tuple[int, int] | None]  # file -> size and time; None: there is none
_NUMBER: Any = Real  # numpy's too; as a type, Real can't be compared
_MARK = "_loraduct_pool"  # on a model that is in a pool


class PoolError(LoraductError):
    """The pool was asked for what it can't do; the model is as it was unless the message says."""


def check_budget(budget: Any) -> None:
    """Raises PoolError for what is no number of bytes."""
    if budget is None or (isinstance(budget, _NUMBER) and 0 < budget < float("inf")):
        return
    found = printable(repr(budget))
    raise PoolError(f"a budget of {found} bytes: expected a number above 0, or None for no limit")


def check_name(name: Any) -> None:
    """Raises PoolError for a name that is no text."""
    if not isinstance(name, str):
        raise PoolError(f"{printable(repr(name))} is no name of an adapter: expected a string")


def stack_of(wanted: Sequence[Any]) -> list[tuple[str, float]]:
    """(name, weight) of each. Raises PoolError for what is neither that nor a name."""
    stack: list[tuple[str, float]] = []
    for given in wanted:
        match (given, 1.0) if isinstance(given, str) else given:
            case (str() as name, weight) if isinstance(weight, _NUMBER):
                pass
            case _:
                what = "is no adapter to activate: expected a name, or (name, weight)"
                raise PoolError(f"{printable(repr(given))} {what}")
        if not abs(weight) < 1e9:
            raise PoolError(f"a weight of {weight} is not a number to multiply by")
        if name in dict(stack):
            raise PoolError(f"{printable(repr(name))} is asked for twice; give it one weight")
        stack.append((name, float(weight)))
    return stack


def stamps(adapter: Adapter, before: Stamps | None) -> Stamps:
    """Of every file that says what the adapter is. Raises Refused where one is not as ``before``."""
    files = {adapter.weights, adapter.path / CONFIG}
    files |= {t.source.path for t in adapter.tensors() if t.source is not None}
    if adapter.format == "coreml":
        from loraduct.formats.coreml import package

        files |= {adapter.path / package.MANIFEST, package.spec_path(adapter.path)}
    found = {f: _stamp(f) for f in files}
    before = found if before is None else before
    changed = [f for f in sorted({*found, *before}) if found.get(f) != before.get(f)]
    if changed:
        what = "was changed since the pool read it first; load it again under a name"
        raise Refused(changed[0], what)
    return found


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def base_of(model: Any, base: str | Path | Base | None) -> Base:
    """The base that is given, or the folder that the model says it is from.

    Raises PoolError where it says none, Refused for a folder that is no base.
    """
    if isinstance(base, Base):
        return base
    if base is None:
        base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        if not base or not (Path(base) / "config.json").exists():
            raise PoolError("the model does not say which folder it is from; give base=FOLDER")
    return base_folder.read(Path(base))


def _kind(model: Any) -> str | None:
    """By the model's own classes, so that neither library is imported for the other's sake."""
    tops = {c.__module__.partition(".")[0] for c in type(model).__mro__}
    return next((k for k in ("torch", "mlx") if k in tops), None)


def runtime(model: Any, fused: bool) -> Runtime:
    """For a model of this kind. Raises PoolError for another kind, or one with adapters in it."""
    kind = _kind(model)
    if kind == "torch":
        from loraduct.converters.pool_torch import Torch

        if any(hasattr(m, "lora_A") for m in model.modules()):
            raise PoolError("the model has PEFT's adapters in it: give the base model itself")
        return Torch(model, fused)
    if kind == "mlx":
        from loraduct.converters.pool_mlx import Mlx

        if any("lora_a" in m for _, m in model.named_modules()):
            raise PoolError("the model has mlx-lm's adapters in it: give the base model itself")
        return Mlx(model, fused)
    raise PoolError(f"a {type(model).__name__} is neither a torch nor an mlx model")


def claim(model: Any, turn: Any) -> Callable[[], None]:
    """Mark the model as one pool's and, on torch, let every call of it take its turn.

    Gives what undoes both. Raises PoolError for a model that is in a pool.
    """
    kept, own = vars(model), object()
    if kept.setdefault(_MARK, own) is not own:
        what = "the model is in a pool already, or a copy of one that is: close that pool first"
        raise PoolError(f"{what}; one pool takes all adapters of a model")
    torch = _kind(model) == "torch"
    before = kept.get("forward")  # accelerate's, for one
    if torch:
        _guard(model, turn, before)

    def release() -> None:
        kept.pop(_MARK)
        if torch and before is None:
            kept.pop("forward")
        elif torch:
            kept["forward"] = before

    return release


def _guard(model: Any, turn: Any, before: Any) -> None:
    """No hooks: torch skips those behind a call that Ctrl-C ends, and the turn would never end."""
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with turn:
            return plain(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    model.forward = types.MethodType(forward, model)  # a copy of the model gets one of its own
