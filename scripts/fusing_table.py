"""Writes docs/fusing.md: what survives of an adapter in a 4-bit base, by remedy. Takes minutes.

Needs the base that `make demo` makes, and the extras torch and mlx.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
REPO = Path(__file__).resolve().parent.parent
BASE = REPO / ".cache" / "smollm2-135m-instruct"
PACKED = REPO / ".cache" / "bench" / "smollm2-4bit"
ADAPTER = REPO / "examples" / "reply"
# heading -> how many times the adapter's update is taken
SIZES = {"as it was trained": 1.0, "scaled to about 1 % of the weights": 2.4}
WAYS = [
    ("none", 0.0),
    ("rescale", 0.0),
    ("compensate", 0.0),
    ("bits", 0.1),
    ("bits", 0.3),
    ("bits", 1.0),
]
TEXT = """# Fusing an adapter into its base

Made by `scripts/fusing_table.py`.

`loraduct fuse ADAPTER --base BASE -o OUT` adds in float32 and rounds once to what the base is stored
in. In a base of 16 or 32 bits nothing to speak of is lost. In a packed one (MLX, 2 to 8 bits) a weight
moves only where the update is larger than about half a step, and of a trained adapter hardly any is: what
comes out may be the base, with the adapter rounded off. So there the verb measures what survives:

- **share**: <dW', dW> / <dW, dW>, where dW' is what the stored weights really changed by;
- **cosine** of dW' and dW. Small where noise was added, even if the share is near 1;
- **codes**: how many of the packed numbers changed;
- **effect**: cosine of the change of the logits, against the base with the adapter beside it, on
  texts (`--prompts`); **KL** from that model's predictions, in nats per token. `--min-effect 0.8` fails
  with exit code 3 below it, and writes nothing.

The remedies (`--remedy`; `auto` compares them and takes the smallest that keeps 0.8):

- **none** packs the sum as `mx.quantize` does, and as `mlx_lm.fuse` would: scales move, and with them
  all weights, which adds noise larger than the update;
- **rescale** searches scales for the least squared error;
- **compensate** keeps the base's scales and moves single codes where that makes up for the error along
  the inputs that the adapter reads. It costs no bytes;
- **bits** stores the layers whose update is largest for its bytes in 8 bits, within `--growth`, and
  does the others as `compensate`;
- **side path**: not to fuse. The adapter beside the base keeps everything, for its own bytes.

Base: SmolLM2-135M-Instruct in 4 bits, groups of 64, packed by mlx-lm. Adapter: `examples/reply`, rank
4 on all linear layers. Four short texts.
"""
AFTER = """
A trained update this small does not fit into 4 bits: no way to round reaches 0.8 within 10 % more bytes, and
8 bits for every layer are needed to come near. Beside the base it is whole and costs less than any of
them; that is what the verb then recommends.
"""


def packed() -> Path:
    """The base in 4 bits, made once by stock mlx-lm."""
    if not (PACKED / "config.json").exists():
        shutil.rmtree(PACKED, ignore_errors=True)
        words = [
            "--hf-path",
            BASE,
            "--mlx-path",
            PACKED,
            "-q",
            "--q-bits",
            "4",
            "--q-group-size",
            "64",
        ]
        subprocess.run([sys.executable, "-m", "mlx_lm", "convert", *map(str, words)], check=True)
    return PACKED


def scaled(folder: Path, times: float) -> Path:
    """The adapter with its update taken so many times."""
    shutil.copytree(ADAPTER, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * times}))
    return folder


def table(adapter_folder: Path) -> tuple[float, list[str]]:
    """(||dW|| / ||W||, the rows)."""
    from loraduct.cli.fuse_report import Judge, side_bytes
    from loraduct.converters import fuse_folder
    from loraduct.formats import base as base_folder
    from loraduct.formats import read

    base = base_folder.read(packed())
    given = [(read(adapter_folder), 1.0)]
    judge = Judge(base, given, None, needed=True)
    before = sum(t.nbytes for t in base.tensors.values())
    rows = [
        "| remedy | bytes | share | cosine | codes | effect | KL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    size = 0.0
    for remedy, growth in WAYS:
        plan = fuse_folder.plan(base, given, fuse_folder.Options(remedy=remedy, growth=growth))
        with tempfile.TemporaryDirectory() as folder:
            fuse_folder.write(plan, Path(folder))
            found = judge.measure(remedy, plan, Path(folder))
        s, e = found.survived, found.effect
        assert e is not None
        size = s.size
        codes = "" if s.codes is None else f"{s.codes:.1%}"
        rows.append(
            f"| {remedy} | {found.nbytes / before - 1:+.1%} | {s.share:.2f} | {s.cosine:.2f} | {codes} |"
            f" {e.cosine:.2f} | {e.kl:.3f} |"
        )
        print(rows[-1], flush=True)
    side = side_bytes(plan) / before
    rows += [f"| side path | {side:+.1%} | 1 | 1 | 0.0% | 1 | 0 |"]
    rows += [f"| (the base alone) | +0.0% | 0 | | 0.0% | 0 | {e.base_kl:.3f} |"]
    return size, rows


def main() -> None:
    """Measure and write."""
    parts = [TEXT]
    for heading, times in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            size, rows = table(scaled(Path(folder) / "a", times))
        parts += [
            f"\n## The update {heading} (||dW|| = {size:.2%} of ||W||)\n\n",
            "\n".join(rows),
            "\n",
        ]
    (REPO / "docs" / "fusing.md").write_text("".join([*parts, AFTER]), encoding="utf-8")


if __name__ == "__main__":
    main()
