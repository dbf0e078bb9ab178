"""The real runtimes: stock PEFT on torch, stock mlx-lm. Both in float32, on the same tokens."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from loraduct.adapter import Adapter, LowRank
from loraduct.errors import LoraductError, MissingExtra, Refused
from loraduct.files import write_file
from loraduct.formats import CONFIG, json_file, mlx, packed_adapter, peft, peft_keys
from loraduct.formats.base import Base
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.package import Package, spec_path
from loraduct.formats.safetensors_file import serialized
from loraduct.tensor import Tensor
from loraduct.text import printable, several
from loraduct.validation import coreml, loaded, mil
from loraduct.validation.loaded import Loaded, of_mlx

RUNTIME = {"peft": "torch", "mlx": "mlx", "coreml": "coreml"}
PROMPTS = (
    "The meeting has been moved to Thursday because",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return",
    "Dear Anna,\nthank you for the photos from last week.",
)
NEW_TOKENS = 16
T = TypeVar("T")


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
    found = tokenized(base.path, prompts)
    if found is not None:
        none = [p for p, ids in zip(prompts, found[0], strict=True) if not ids and p not in PROMPTS]
        if none:
            what = f"its tokenizer makes no token of the prompt {printable(repr(none[0]), 60)}"
            raise Refused(base.path, f"{what}; give another")
        return [ids or [0] for ids in found[0]], found[1]
    import numpy as np

    vocabulary = base.text_config.get("vocab_size", 2)
    if type(vocabulary) is not int or not 0 < vocabulary < 1 << 31:
        raise Refused(
            base.path / "config.json",
            f"vocab_size is {printable(repr(vocabulary), 60)}, expected a positive integer",
        )
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, 12 + 3 * i).tolist() for i in range(len(prompts))], None


def tokenized(folder: Path, texts: Sequence[str]) -> tuple[list[list[int]], Any] | None:
    """Token ids of the texts, and the folder's tokenizer; None where it has none.

    Raises MissingExtra without transformers, RuntimeFailed where it can't use the tokenizer.
    """
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("torch", "tokenizing text") from None
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            return [list(tokenizer(t)["input_ids"]) for t in texts], tokenizer
        except Exception as e:  # whatever the library raises
            what = printable(f"{type(e).__name__}: {e}", 300)
            raise RuntimeFailed(f"the tokenizer of {folder} can't be used: {what}") from e


def run(
    runtime: str,
    base: Base,
    adapter: Adapter | None,
    ids: Sequence[Sequence[int]],
    count: int = NEW_TOKENS,
) -> Run:
    """Run the base, or the base with an adapter, in a runtime of folders (torch, mlx).

    Raises MissingExtra when it isn't installed, RuntimeFailed when the library refuses.
    """
    return use(runtime, base, adapter, lambda model: _all(model, ids, count))


def _all(model: Loaded, ids: Sequence[Sequence[int]], count: int) -> Run:
    return Run([model.logits(i) for i in ids], model.greedy(ids[0], count))


def use(runtime: str, base: Base, adapter: Adapter | None, work: Callable[[Loaded], T]) -> T:
    """What ``work`` makes of the base, or of the base with an adapter, loaded once.

    Raises MissingExtra when the runtime (torch, mlx) isn't installed, RuntimeFailed when it refuses.
    """
    load = {"torch": _torch, "mlx": _mlx}[runtime]
    with quiet() as caught, _folder_of(adapter) as folder:
        try:
            done = work(load(base, folder))
        except ImportError as e:
            raise MissingExtra(runtime, f"running {runtime} ({e.name})") from None
        except (LoraductError, MemoryError):
            raise
        except Exception as e:
            what = f"with {adapter.weights}" if adapter else "alone"
            raise RuntimeFailed(
                f"{runtime} did not run {base.path} {what}: {printable(f'{type(e).__name__}: {e}', 600)}"
            ) from e
    if adapter is not None:
        _check_missing([str(w.message) for w in caught], adapter)
    return done


def run_package(
    path: Path,
    adapter: str | None,
    ids: Sequence[Sequence[int]],
    precision: str = mil.FULL,
    count: int = NEW_TOKENS,
) -> tuple[Run, list[str]]:
    """Run a package's base, or one of its adapters, through the reference interpreter.

    ``count``: tokens to continue with. Returns the run and the warnings of overflow.
    """
    return use_package(path, adapter, lambda model: _all(model, ids, count), precision)


def use_package(
    path: Path, adapter: str | None, work: Callable[[Loaded], T], precision: str = mil.FULL
) -> tuple[T, list[str]]:
    """What ``work`` makes of a package's base or adapter, and the warnings of overflow."""
    ranges = mil.Ranges()
    session = session_of(path, adapter, precision=precision, ranges=ranges)

    def logits(ids: Sequence[int]) -> Any:
        session.start()
        return session.feed(ids)

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        return coreml.greedy(session, list(ids), count)

    return work(Loaded(logits, greedy)), ranges.warnings


def session_of(path: Path, adapter: str | None, **options: Any) -> coreml.Session:
    """What runs a package's adapter alone, or its default function. Raises Refused."""
    package = package_at(path)
    name = coreml.alone(package, adapter) if adapter else None
    return coreml.session(package, name, weights=_weights(path, _stamp(path)), **options)


def package_at(path: Path) -> Package:
    """The package, parsed once for all that is asked of it. Raises Refused."""
    return _package(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    """Of a package's specification: another one is there after every edit."""
    stamp = spec_path(path).stat()
    return stamp.st_ino, stamp.st_mtime_ns


@lru_cache(maxsize=2)
def _package(path: Path, stamp: tuple[int, int]) -> Package:
    return packages.read(path)


@lru_cache(maxsize=1)
def _weights(path: Path, stamp: tuple[int, int]) -> mil.Weights:
    """A package's weights, decoded once for all its runs."""
    return mil.Weights(_package(path, stamp))


def usual_weights(adapter: Adapter) -> bool:
    """Whether a stock library finds the weights by itself: config beside them, usual name."""
    if adapter.format == "coreml":
        return True
    if adapter.container == "packed":
        return False
    names = (peft.WEIGHTS, peft.PICKLE) if adapter.format == "peft" else (mlx.WEIGHTS,)
    in_place = adapter.weights.parent == adapter.path and adapter.weights.name in names
    return in_place and (adapter.path / CONFIG).exists()


@contextlib.contextmanager
def _folder_of(adapter: Adapter | None) -> Iterator[Path | None]:
    """The folder to give to a stock library, so that it loads the very file that was compared.

    For a checkpoint or an old .npz it is a temporary one: the config, and the weights under the
    name that the library looks for.
    """
    if adapter is None or usual_weights(adapter):
        yield adapter.path if adapter else None
        return
    with tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        folder = Path(name)
        write_file(folder / CONFIG, [json_file.dump(adapter.config)])
        target = folder / (peft.WEIGHTS if adapter.format == "peft" else mlx.WEIGHTS)
        if adapter.container == "packed":
            _, tensors, texts = packed_adapter.unpacked(adapter.weights)
            write_file(target, serialized(tensors, texts, {}))
        elif adapter.weights.suffix == ".npz":
            write_file(target, serialized(_as_stored(adapter), {"format": "mlx"}, {}))
        else:
            target.symlink_to(adapter.weights.absolute())
        yield folder


def _as_stored(adapter: Adapter) -> dict[str, Tensor]:
    """An MLX adapter's tensors as its file has them: the factors stand the other way round there."""
    return {
        t.name: t.T if isinstance(u, LowRank) and len(t.shape) == 2 else t
        for u in adapter.updates.values()
        for t in u.tensors
    }


def _check_missing(messages: Sequence[str], adapter: Adapter) -> None:
    """PEFT only warns of tensors it doesn't find; what the file has, or chance, must not be lost.

    Modules without any tensors keep their starting values, which have no effect; the structure
    checks warn of them.
    """
    found = [m for m in messages if "missing adapter keys" in m]
    keys = [k for m in found for k in re.findall(r"'([^']+)'", m.split("checkpoint:", 1)[-1])]
    random = adapter.config.get("init_lora_weights") is False
    lost = [
        k
        for k in keys
        if random or k.removeprefix(peft_keys.PREFIX).partition(".lora_")[0] in adapter.low_rank
    ]
    if not lost and (keys or not found):
        return
    odd = [
        u.a.name
        for m, u in adapter.low_rank.items()
        if u.a.name != f"{peft_keys.PREFIX}{m}.lora_A.weight"
    ]
    what = f"PEFT does not find {several(lost) or printable(found[0], 300)} in {adapter.weights}"
    if odd:
        what += (
            f": the file's keys carry an adapter's name ({printable(odd[0])}), which stock PEFT can't"
            " load; `loraduct convert --to peft` writes the usual names"
        )
    elif random:
        what += " and fills in random numbers, because init_lora_weights is false"
    raise RuntimeFailed(what)


def torch_model(base: Base) -> Any:
    """The base in stock transformers, in float32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # eager attention: the fused kernel turns a NaN in the weights into finite logits
    return (
        auto_class(base.model_type)
        .from_pretrained(str(base.path), dtype=torch.float32, attn_implementation="eager")
        .eval()
    )


def _torch(base: Base, adapter: Path | None) -> Loaded:
    model = torch_model(base)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return of_torch(model)


def of_torch(model: Any) -> Loaded:
    """What is asked of a model of transformers' or PEFT's."""
    import torch

    def logits(ids: Sequence[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([list(ids)])).logits[0].float().numpy()

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        step, cache = torch.tensor([list(ids)]), None
        with torch.inference_mode():
            for _ in range(count):
                out = model(step, past_key_values=cache, use_cache=True)
                found.append(int(out.logits[0, -1].argmax()))
                step, cache = torch.tensor([[found[-1]]]), getattr(out, "past_key_values", None)
                if cache is None:
                    step = torch.tensor([[*ids, *found]])
        return found

    return Loaded(logits, greedy)


def auto_class(model_type: str) -> Any:
    """What loads this type in transformers with a head: models that also see have no causal class.

    Which classes there are is transformers' own table (5.23.0, models/auto/modeling_auto.py).
    """
    import transformers
    from transformers.models.auto import modeling_auto as table

    seeing = table.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if model_type not in table.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type in seeing:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def mlx_model(base: Base, adapter: Path | None = None) -> Any:
    """The base in stock mlx-lm, with an adapter's folder or without, computing in float32."""
    loaded.alternate()
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base.path)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.set_dtype(
        mx.float32
    )  # packed weights stay packed; their scales and all else compute wide
    model.eval()
    return model


def _mlx(base: Base, adapter: Path | None) -> Loaded:
    return of_mlx(mlx_model(base, adapter))
