"""One target of a measurement, in a process of its own: its memory and its start are its alone.

``python -m loraduct.validation.latency_child JOB`` loads what the JSON text JOB says, then answers
each line on stdin with one JSON line: ``round`` runs every context once, ``end`` says the peak and
leaves. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

SEED = 0


class Runner(Protocol):
    """A loaded model. Every call returns when its result is there."""

    def prompt(self, ids: Sequence[int]) -> int:
        """A new conversation; the token that follows."""

    def step(self, token: int) -> int:
        """One token more; the token that follows."""

    def swap(self) -> float | None:
        """Seconds to load the adapter from disk and make it active; None without one."""

    def facts(self) -> dict[str, Any]:
        """What else is to be said of it."""


class Torch:
    """transformers, with PEFT where there is an adapter."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        from loraduct.formats import base as base_folder
        from loraduct.validation.runtimes import auto_class

        transformers.utils.logging.disable_progress_bar()
        self.torch, self.adapter = torch, job["adapter"]
        kind = auto_class(base_folder.read(Path(job["base"])).model_type)
        wanted = None if job["dtype"] == "stored" else getattr(torch, job["dtype"])
        self.model = kind.from_pretrained(job["base"], dtype=wanted or "auto")
        if self.adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, self.adapter)
        self.model.eval()
        self.cache: Any = None

    def prompt(self, ids: Sequence[int]) -> int:
        self.cache = None
        return self._call(list(ids))

    def step(self, token: int) -> int:
        return self._call([token])

    def _call(self, ids: list[int]) -> int:
        with self.torch.inference_mode():
            given = self.torch.tensor([ids])
            out = self.model(input_ids=given, past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            return int(out.logits[0, -1].argmax())

    def swap(self) -> float | None:
        if not self.adapter:
            return None
        begin = time.perf_counter()
        self.model.load_adapter(self.adapter, "again")
        self.model.set_adapter("again")
        took = time.perf_counter() - begin
        self.model.set_adapter("default")
        self.model.delete_adapter("again")
        return took

    def facts(self) -> dict[str, Any]:
        return {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "threads": self.torch.get_num_threads(),
            "versions": {"torch": self.torch.__version__},
        }


class Mlx:
    """mlx-lm."""

    def __init__(self, job: dict[str, Any]) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        self.mx, self.make_cache, self.adapter = mx, make_prompt_cache, job["adapter"]
        self.model, _ = load_model(Path(job["base"]))
        if self.adapter:
            load_adapters(self.model, self.adapter)
        if job["dtype"] != "stored":
            self.model.set_dtype(getattr(mx, job["dtype"]))
        self.dtype = job["dtype"]
        self.model.eval()
        mx.eval(self.model.parameters())
        self.cache: Any = None

    def prompt(self, ids: Sequence[int]) -> int:
        self.cache = self.make_cache(self.model)
        return self._call(list(ids))

    def step(self, token: int) -> int:
        return self._call([token])

    def _call(self, ids: list[int]) -> int:
        return int(self.model(self.mx.array([ids]), cache=self.cache)[0, -1].argmax().item())

    def swap(self) -> float | None:
        if not self.adapter:
            return None
        begin = time.perf_counter()
        held: Any = self.mx.load(str(Path(self.adapter) / "adapters.safetensors"))
        if self.dtype != "stored":  # as in the model, where set_dtype moved what had been loaded
            wanted = getattr(self.mx, self.dtype)
            held = {
                k: v.astype(wanted) if self.mx.issubdtype(v.dtype, self.mx.floating) else v
                for k, v in held.items()
            }
        self.model.load_weights(list(held.items()), strict=False)
        self.mx.eval(self.model.parameters())
        return time.perf_counter() - begin

    def facts(self) -> dict[str, Any]:
        from importlib import metadata

        names = ("mlx", "mlx-lm")
        return {
            "dtype": self.dtype,
            "device": str(self.mx.default_device()),
            "versions": {n: metadata.version(n) for n in names},
        }


def runner(job: dict[str, Any]) -> Runner:
    """What runs the job."""
    if job["runtime"] == "coreml":
        from loraduct.validation.latency_coreml import CoreML

        return CoreML(job)
    return Torch(job) if job["runtime"] == "torch" else Mlx(job)


def one_round(
    model: Runner, contexts: Sequence[int], generate: int, vocabulary: int
) -> dict[str, Any]:
    """Every context once: milliseconds to the first token, and of each one after it."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = []
    for context in contexts:
        ids = rng.integers(0, vocabulary, context).tolist()
        begin = time.perf_counter()
        token = model.prompt(ids)
        marks = [time.perf_counter()]
        for _ in range(generate):
            token = model.step(token)
            marks.append(time.perf_counter())
        steps = [1e3 * (b - a) for a, b in pairwise(marks)]
        rows.append({"context": context, "ttft_ms": 1e3 * (marks[0] - begin), "token_ms": steps})
    swap = model.swap()
    return {"contexts": rows, "swap_ms": None if swap is None else 1e3 * swap}


def peak_bytes() -> int:
    """The most memory that this process has held.

    On Linux the kernel's high-water mark of this program: getrusage's also counts the process that
    started it.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """The loop."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    job = json.loads(sys.argv[1])
    try:
        begin = time.perf_counter()
        model = runner(job)
        took = time.perf_counter() - begin
        answer({"load_s": took, **model.facts()})
        for line in sys.stdin:
            if line.strip() == "end":
                answer({"peak_bytes": peak_bytes()})
                return
            answer(one_round(model, job["contexts"], job["generate"], job["vocabulary"]))
    except ImportError as e:
        answer({"missing": e.name or str(e)})
    except Exception as e:
        answer({"error": f"{type(e).__name__}: {e}"[:600]})


if __name__ == "__main__":
    main()
