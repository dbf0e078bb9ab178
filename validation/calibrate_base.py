"""A base's folder for `calibrate`: run by stock transformers, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loraduct.errors import MissingExtra, Refused
from loraduct.formats.base import Base
from loraduct.text import printable
from loraduct.validation import runtimes
from loraduct.validation.calibrate import Tokens


class Runner:
    """The base on some tokens, with weights changed or as they are; weights have the folder's names.

    Raises MissingExtra without torch, Refused where transformers does not load or run it.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        with runtimes.quiet():
            try:
                self.model = runtimes.torch_model(base)
            except ImportError as e:
                raise MissingExtra("torch", f"running the base ({e.name})") from None
            except Exception as e:  # whatever the library raises
                raise self._refused("load", e) from None
        prefix = f"{self.model.base_model_prefix}."
        self.weights: dict[str, Any] = {}
        for live, parameter in self.model.named_parameters():
            stored = next((n for n in (live, live.removeprefix(prefix)) if n in base.tensors), None)
            if stored is not None and base.tensors[stored].shape == tuple(parameter.shape):
                self.weights[stored] = parameter

    def _refused(self, verb: str, error: Exception) -> Refused:
        what = printable(f"{type(error).__name__}: {error}", 300)
        return Refused(self.base.path, f"transformers does not {verb} it: {what}")

    @property
    def names(self) -> frozenset[str]:
        """The weights that are parameters of transformers' model as they are."""
        return frozenset(self.weights)

    def logits(self, ids: Tokens) -> list[Any]:
        """(tokens, vocabulary) of each row, float32."""
        run = runtimes.of_torch(self.model).logits
        with runtimes.quiet():
            try:
                return [run(row) for row in ids]
            except Exception as e:  # whatever the library raises
                raise self._refused("run", e) from None

    @contextmanager
    def changed(self, values: Mapping[str, Any]) -> Iterator[None]:
        """With other values in weights, by name."""
        import torch

        kept = {name: self.weights[name].detach().clone() for name in values}
        try:
            with torch.no_grad():
                for name, value in values.items():
                    self.weights[name].copy_(torch.from_numpy(value.astype("float32")))
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.weights[name].copy_(value)

    def second_moments(self, ids: Tokens) -> dict[str, Any]:
        """E[x_j^2] over the tokens, (in,) float64, of each linear layer's input, by its weight's name.

        A tied embedding gets those of the head; an expert counts the tokens that are sent to others as
        zeros.
        """
        import torch

        owners = {id(p): n for n, p in self.weights.items()}
        sums: dict[str, Any] = {}

        def hook(module: Any, given: Any, result: Any) -> None:
            name = owners.get(id(module.weight))
            if name is not None:
                x = given[0].detach().reshape(-1, given[0].shape[-1]).double()
                sums[name] = sums.get(name, 0.0) + (x * x).sum(0).numpy()

        linear = (m for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        hooks = [m.register_forward_hook(hook) for m in linear]
        try:
            self.logits(ids)
        finally:
            for one in hooks:
                one.remove()
        count = sum(map(len, ids))
        return {n: total / count for n, total in sums.items()}
