"""The real runtimes: stock PEFT on torch, stock mlx-lm. Both in float32, on the same tokens."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import LoraductError, MissingExtra
from loraduct.formats.base import Base
from loraduct.text import printable

RUNTIME = {"peft": "torch", "mlx": "mlx"}
PROMPTS = (
    "The meeting has been moved to Thursday because",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return",
    "Dear Anna,\nthank you for the photos from last week.",
)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Run:
    """Logits (tokens, vocabulary) for every prompt, and the tokens continued greedily from the first."""

    logits: list[Any]
    greedy: list[int]


class RuntimeFailed(LoraductError):
    """The stock library did not load or run the adapter."""


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep the libraries' chatter out of our output; yields the warnings they raised."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(previous)


def tokenize(base: Base, prompts: Sequence[str]) -> tuple[list[list[int]], Any]:
    """Token ids of the prompts with the base's tokenizer.

    A base without one gets fixed pseudo-random tokens. Returns (ids, tokenizer or None).
    """
    has_tokenizer = any((base.path / n).exists() for n in ("tokenizer.json", "tokenizer.model"))
    if has_tokenizer:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingExtra("torch", "tokenizing prompts") from None
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(base.path))
            return [tokenizer(p)["input_ids"] or [0] for p in prompts], tokenizer
    import numpy as np

    vocabulary = int(base.text_config.get("vocab_size", 2))
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, 12 + 3 * i).tolist() for i in range(len(prompts))], None


def run(runtime: str, base: Base, adapter: Path | None, ids: Sequence[Sequence[int]]) -> Run:
    """Run the base, or the base with an adapter folder, in a runtime.

    Raises MissingExtra when it isn't installed, RuntimeFailed when the library refuses.
    """
    call = {"torch": _torch, "mlx": _mlx}[runtime]
    with quiet() as caught:
        try:
            done = call(base, adapter, ids)
        except ImportError as e:
            raise MissingExtra(runtime, f"running {runtime} ({e.name})") from None
        except (LoraductError, MemoryError):
            raise
        except Exception as e:
            what = f"with {adapter}" if adapter else "alone"
            raise RuntimeFailed(
                f"{runtime} did not run {base.path} {what}: {printable(f'{type(e).__name__}: {e}', 600)}"
            ) from e
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise RuntimeFailed(
            f"PEFT found tensors missing in {adapter}: {printable(missing[0], 300)}"
        )
    return done


def _torch(base: Base, adapter: Path | None, ids: Sequence[Sequence[int]]) -> Run:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # eager attention: the fused kernel turns a NaN in the weights into finite logits
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base.path), dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([list(i)])).logits[0].float().numpy() for i in ids]
        greedy: list[int] = []
        step, cache = torch.tensor([list(ids[0])]), None
        for _ in range(NEW_TOKENS):
            out = model(step, past_key_values=cache, use_cache=True)
            greedy.append(int(out.logits[0, -1].argmax()))
            step, cache = torch.tensor([[greedy[-1]]]), getattr(out, "past_key_values", None)
            if cache is None:
                step = torch.tensor([[*ids[0], *greedy]])
    return Run(logits, greedy)


def _mlx(base: Base, adapter: Path | None, ids: Sequence[Sequence[int]]) -> Run:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base.path)
    if adapter is not None:
        load_adapters(model, str(adapter))
    if base.quantization is None:
        model.set_dtype(mx.float32)
    model.eval()
    logits = [np.array(model(mx.array([list(i)]))[0].astype(mx.float32)) for i in ids]
    greedy: list[int] = []
    step, cache = mx.array([list(ids[0])]), make_prompt_cache(model)
    for _ in range(NEW_TOKENS):
        out = model(step, cache=cache)
        greedy.append(int(out[0, -1].argmax()))
        step = mx.array([[greedy[-1]]])
    return Run(logits, greedy)
