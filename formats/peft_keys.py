"""Keys of PEFT's weights file, taken apart (peft 0.21.2, measured).

``base_model.model.`` + module + ``.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r),
``.lora_magnitude_vector`` (out,) for DoRA, ``.lora_diag`` (r,) for KaSA, ``.lora_B.bias`` for lora_bias,
``.lora_embedding_A`` (r, tokens) and ``.lora_embedding_B`` (dim, r); raw dumps carry the adapter's
name before ``.weight``. A parameter of target_parameters has its module's path, one
``.base_layer`` deeper for each further parameter of that module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraduct.errors import Refused
from loraduct.tensor import Tensor
from loraduct.text import printable, several

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "base_model.model."
# word in a key -> (part without a leaf or with .weight, with .bias)
MARKS = {
    "lora_A": ("a", None),
    "lora_B": ("b", "bias"),
    "lora_embedding_A": ("embedding_a", None),
    "lora_embedding_B": ("embedding_b", None),
    "lora_magnitude_vector": ("magnitude", None),
    "lora_diag": ("diag", None),
}
# no .weight needed
_BARE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag")
# Marks of other methods inside a key, to refuse them by name.
_OTHER_MARKS = {
    "lora_E": "AdaLoRA",
    "hada_w1_a": "LoHa",
    "hada_w1_b": "LoHa",
    "hada_w2_a": "LoHa",
    "hada_w2_b": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w2": "LoKr",
    "lokr_w1_a": "LoKr",
    "lokr_w2_a": "LoKr",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "vera_A": "VeRA",
    "vera_B": "VeRA",
    "ia3_l": "IA3",
    "oft_R": "OFT",
    "oft_r": "OFT",
    "boft_R": "BOFT",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "prompt_embeddings": "prompt tuning",
}


def sorted_by_module(
    tensors: Mapping[str, Tensor], file: Path, chosen: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> part -> tensor) of the low-rank tensors, and the plain parameters by name."""
    low_rank: list[tuple[str, str, str | None, Tensor]] = []
    plain: list[tuple[str, str | None, Tensor]] = []
    for key, tensor in tensors.items():
        words = _words(key, file)
        mark = next((i for i, w in enumerate(words) if w in MARKS), None)
        if mark is not None:
            low_rank.append((*_part(words, mark, file, key), tensor))
        elif "modules_to_save" in words[:-2]:  # a raw dump: module.modules_to_save.NAME.weight
            plain.append((key, words[words.index("modules_to_save") + 1], tensor))
        else:
            plain.append((key, None, tensor))
    name = _choose([n for *_, n, _ in low_rank if n] + [n for _, n, _ in plain if n], chosen, file)
    parts: dict[str, dict[str, Tensor]] = {}
    for module, part, own, tensor in low_rank:
        if own not in (None, name):
            continue
        slot = parts.setdefault(module, {})
        if part in slot:
            raise Refused(
                file,
                f"is there twice, also as {printable(slot[part].name)}; PEFT takes either",
                tensor=tensor.name,
            )
        slot[part] = tensor
    return parts, {key: tensor for key, own, tensor in plain if own in (None, name)}


def _words(key: str, file: Path) -> list[str]:
    """The parts of a key behind PEFT's prefix; keys of other methods are refused by name."""
    if not key.startswith(PREFIX):
        mlx = ".lora_a" in key or ".lora_b" in key
        raise Refused(
            file,
            f"key does not begin with {PREFIX!r}: "
            + ("these are MLX names" if mlx else "PEFT would silently load none of it")
            + "; save it with PEFT's save_pretrained",
            tensor=key,
        )
    words = key[len(PREFIX) :].split(".")
    if other := next((w for w in words if w in _OTHER_MARKS), None):
        raise Refused(file, f"is of {_OTHER_MARKS[other]}, but the config says LORA", tensor=key)
    return words


def _choose(names: list[str], chosen: str | None, file: Path) -> str | None:
    """Which adapter of a file is meant, by the names inside its keys."""
    known = list(dict.fromkeys(names))
    if chosen is None and len(known) > 1:
        raise Refused(
            file, f"holds several adapters ({several(known)}); choose one with --adapter NAME"
        )
    if chosen is not None and chosen not in (known or ["default"]):
        raise Refused(
            file,
            f"holds no adapter {printable(chosen, 80)!r}, only {several(known or ['default'])}",
        )
    return chosen or (known[0] if known else None)


def _part(words: list[str], mark: int, file: Path, key: str) -> tuple[str, str, str | None]:
    """(module, part, adapter's name or None) of a low-rank key."""
    module, what, tail = ".".join(words[:mark]), words[mark], words[mark + 1 :]
    leaf = "weight" if what in _BARE else None
    if tail and tail[-1] in ("weight", "bias"):
        leaf, tail = tail[-1], tail[:-1]
    part = MARKS[what][leaf == "bias"]
    if leaf is None or part is None or len(tail) > 1 or not module:
        raise Refused(file, "is not a name that PEFT's LoRA has", tensor=key)
    return module, part, tail[0] if tail else None
