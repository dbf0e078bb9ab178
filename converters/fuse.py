"""A base's weights with adapters in them, for builders that write every tensor in one dtype.

LoRA: W + sum of w_i s_i B_i A_i. DoRA (arXiv 2402.09353; PEFT's ``lora/dora.py``): multiplied row by
row by m / ||W + s B A||, where W is the base's. Of several adapters each works on what those before
it have made, as PEFT runs them: where DoRA is among them, the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraduct.adapter import Adapter
from loraduct.converters.fuse_places import Placed, check_parted, is_end, placed
from loraduct.converters.fuse_stream import fused_tensor
from loraduct.formats.base import Base
from loraduct.formats.model_folder import Stored
from loraduct.tensor import Tensor

Weighted = Sequence[tuple[Adapter, float]]
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def fused(
    base: Base, tensors: Mapping[str, Tensor], adapters: Weighted, tied: bool, dtype: str
) -> dict[str, Stored]:
    """``tensors``, the base's, with ``adapters`` (each with its weight) in them, in ``dtype``.

    Adapters have transformers' names. A tied head or embedding that one of them changes gets a
    weight of its own: the caller finds ``lm_head.weight`` among the result. So does a bias that the
    base doesn't have. Raises Refused naming what has no weight in the base, and what can't be
    weighted or combined.
    """
    held = dict(tensors)
    if tied and HEAD not in held and moves_one_side(adapters):
        check_parted(adapters)
        held[HEAD] = held[EMBEDDINGS]
    shapes = {n: t.shape for n, t in held.items()}
    places = placed(adapters, base, shapes, new_biases=True)
    touched = places.touched()
    done = {
        n: fused_tensor(n, t, places, dtype) if n in touched else as_stored(t, dtype)
        for n, t in held.items()
    }
    for name in touched - held.keys():
        done[name] = fused_tensor(name, _nothing(name, places), places, dtype)
    return done


def as_stored(tensor: Tensor, dtype: str) -> Stored:
    """A tensor to be written in ``dtype``."""
    return Stored(dtype, tensor.shape, tensor.to(dtype).chunks)


def _nothing(name: str, places: Placed) -> Tensor:
    """A bias that the base doesn't have."""
    import numpy as np

    changes = [places.replaced[name]] if name in places.replaced else []
    shape = (changes or [t for t, _ in places.added[name]])[0].shape
    return Tensor(name, "F32", shape, data=np.zeros(shape, np.float32))


def moves_one_side(adapters: Weighted) -> bool:
    """Whether a head and an embedding that are tied are so no more. Trained tokens are rows of both."""
    return any(is_end(n) for a, _ in adapters for n in a.updates)
