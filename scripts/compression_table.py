"""Writes docs/compression.md: what fewer bits cost SmolLM2, through torch on expanded weights.

python scripts/compression_table.py [BASE] [ADAPTER ...]

Perplexity on a page of text that is not in this project's data, the share of positions whose likeliest
token stays, and the mean KL divergence from the float16 model's distribution. With an adapter, that
is on top, at 16 bits, and what is compared with is the uncompressed base with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

REPO = Path(__file__).resolve().parent.parent
BASE = REPO / ".cache/smollm2-135m-instruct"
ADAPTERS = (REPO / "examples/summary", REPO / "examples/reply")
WAYS = {
    "tables, 8 bits": ["--palettize", "8"],
    "tables, 6 bits": ["--palettize", "6"],
    "tables, 4 bits": ["--palettize", "4"],
    "tables, 4 bits, groups of 16": ["--palettize", "4", "--group-size", "16"],
    "tables, 3.7 bits on average": ["--bits-per-weight", "3.7"],
    "tables, 3 bits": ["--palettize", "3"],
    "tables, 2 bits": ["--palettize", "2"],
    "int8 per channel": ["--quantize", "int8"],
    "int4, groups of 32": ["--quantize", "int4", "--group-size", "32"],
}
PAGE = (
    REPO / "LICENSE",
    1024,
)  # a page of running text that comes with every checkout: file, tokens


def expanded(options: list[str], folder: Path) -> tuple[Path, float]:
    """(the base written with ``options``, bits per weight)."""
    words = [
        sys.executable,
        "-m",
        "loraduct",
        "compress",
        str(BASE),
        "-o",
        str(folder),
        "--expanded",
    ]
    done = subprocess.run([*words, *options, "--json"], check=True, capture_output=True, text=True)
    return folder, float(json.loads(done.stdout)["bits_per_weight"])


def distributions(base: Path, ids: Any) -> Iterator[Any]:
    """Log-probabilities at each position: of the base alone, then with each adapter."""
    for adapter in (None, *ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            yield torch.log_softmax(model(ids).logits[0].float(), -1)


def compared(now: Any, then: Any, ids: Any) -> str:
    """Perplexity, top-1, KL."""
    wanted = ids[0, 1:, None]
    perplexity = float((-now[:-1].gather(1, wanted)).mean().exp())
    top = float((now.argmax(-1) == then.argmax(-1)).float().mean())
    kl = float((then.exp() * (then - now)).sum(-1).mean())
    return f"{perplexity:.2f} | {top:.3f} | {kl:.4f}"


def main() -> None:
    file, count = PAGE
    ids = AutoTokenizer.from_pretrained(BASE)(file.read_text(), return_tensors="pt").input_ids
    ids = ids[:, :count]
    reference = list(distributions(BASE, ids))
    names = ["the base", *(f"with {a.name}" for a in ADAPTERS)]
    rows = [("float16", 16.0, [compared(x, x, ids) for x in reference])]
    for name, options in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            base, each = expanded(options, Path(folder) / "base")
            found = zip(distributions(base, ids), reference, strict=True)
            rows.append((name, each, [compared(now, then, ids) for now, then in found]))
        print(rows[-1], flush=True)
    heads = " | ".join(f"{n}: perplexity | top-1 | KL" for n in names)
    lines = ["# What fewer bits cost", "", __doc__.split("\n\n")[2].strip(), ""]
    lines += [
        f"SmolLM2-135M-Instruct, {ids.shape[1]} tokens of `{file.name}`, embedding compressed too; written"
        " by `scripts/compression_table.py`.", "",
        f"| | bits per weight | {heads} |", "|---|" + "---|" * (1 + 3 * len(names)),
    ]  # fmt: skip
    lines += [f"| {n} | {b:.2f} | {' | '.join(cells)} |" for n, b, cells in rows]
    (REPO / "docs/compression.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
