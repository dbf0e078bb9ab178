"""Writes docs/compression.md: what bits cost SmolLM2, with and without a text to calibrate with.

Needs the base that `make demo` makes and the extra torch (for the tokenizer). Takes the better part of
an hour on two cores; what was measured is kept in .cache/bench/compression.json, so that a run that was
stopped goes on (`--fresh` begins anew).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPO = Path(__file__).resolve().parent.parent
BASE = REPO / ".cache" / "smollm2-135m-instruct"
ROOM = REPO / ".cache" / "bench" / "compression"
KEPT = REPO / ".cache" / "bench" / "compression.json"
CALIBRATION = REPO / "examples" / "data" / "calibration.txt"
PAGE = REPO / "examples" / "data" / "page.txt"
ADAPTER = REPO / "examples" / "reply"
TOKENS = 256  # of the page
# heading -> what `Wanted` gets; all of them without a text and with one, but for budgets with groups
ROWS: dict[str, dict[str, Any]] = {
    "8 bits": {"palettize": 8},
    "6 bits": {"palettize": 6},
    "4 bits": {"palettize": 4},
    "4 bits, scale per channel": {"palettize": 4, "per_channel_scale": True},
    "4 bits, groups of 16": {"palettize": 4, "group_size": 16},
    "mixed, as large as 4 bits in groups of 16": {"size": "4 bits, groups of 16"},
    "mixed, 70 MB": {"size": 70_000_000},
    "mixed, 3.7 bits": {"bits_per_weight": 3.7},
    "3 bits, groups of 16": {"palettize": 3, "group_size": 16},
    "mixed, as large as 3 bits in groups of 16": {"size": "3 bits, groups of 16"},
    "2 bits, groups of 16": {"palettize": 2, "group_size": 16},
}
# heading -> how the base's folder is packed for mlx-lm; groups of 64
FOLDERS: dict[str, dict[str, Any]] = {
    "4 bits": {"quantize": "mlx4"},
    "mixed, as large as 4 bits": {"bits_per_weight": 4.5},
    "mixed, 3.7 bits": {"bits_per_weight": 3.7},
}
TEXT = """# Compression: what bits cost

Made by `scripts/compression_table.py`.

`loraduct compress PACKAGE -o OUT --palettize 4 --calibrate FILE` stores each matrix as indices into a
table of values. Which values are worth a place in the table depends on what they are multiplied with:
of SmolLM2's inputs some channels are a thousand times as large as others. `--calibrate` runs the model on
the text (the reference interpreter does, in float32; no Core ML is needed), takes the mean square of each
input channel, and lets squared errors count by it. Without that, 4 bits with one table per matrix leave
nothing of this model.

`--size 70MB` or `--bits-per-weight 3.7` choose a width for each matrix, with a scale for each row: the sum of
relative squared errors is the least that the size allows. With `--calibrate` they also choose
how many rows share a table (all, 16, 4 or 1), and the matrices of one kind in a few neighbouring layers are
changed together, alone among all, to measure what that does to the predictions (KL on 64 tokens of the
text); bits then go where the predictions gain most per byte. Such losses tell too much of small changes, so
plans are also made that trust them less; each is tried on the text with all matrices changed, and the one that
loses least is taken. `--plan` shows the table of errors and the
curve of bits, size and predicted KL, `--html FILE` draws it. The predicted KL is the sum over the
matrices: it ranks plans, and is too low or too high where changes are large (2 and 3 bits).

What is lost is measured behind each calibrated compression, on a part of the text that it was not
calibrated with. Give a text like what the model will read: a page is enough, more than 256 tokens are
not used.

`--quantize int8` and `int4` have a scale for each row; `--group-size 32` or `--granularity block` one for each
32 inputs of a row, `--granularity tensor` one for all. `--asymmetric` adds an offset: it pays where a row's
values lie on one side. Scales are searched for the least squared error, weighed by the inputs where a text
is given.

A base's folder (`loraduct compress BASE -o OUT`) is packed for mlx-lm with `--quantize mlx4`, or a width for each
layer with `--bits-per-weight` and `--size`; stock mlx-lm loads it. Scales and biases are searched for the least
error (`--plain`: as `mx.quantize` has them). `--calibrate` does there what it does for packages; the model is
then run by transformers. `--expanded` writes a copy in the base's own dtype with the values that tables
or integers would give, to be evaluated by any tool.

## SmolLM2-135M-Instruct

On a page of English prose ({page}, {tokens} tokens; calibrated on {calibration}, another one). KL and top-1
are against the package in FLOAT16, in nats and as the share of equal likeliest tokens. Everything is
run by the reference interpreter from the packages that were written. "reply" is the function with the adapter
`examples/reply`, whose own factors are left as they are; size is that of the package with both functions.

| | text | size | bits | perplexity | KL | top-1 | reply: perplexity | KL | top-1 |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""
OF_FOLDERS = """
The base's folder packed for mlx-lm, in groups of 64 (with scale and bias 4 bits are 4.5 per weight), on the same
page. One width for all is among the plans that are tried:

| | text | size | bits | perplexity | KL | top-1 |
|---|---|---:|---:|---:|---:|---:|
"""


def built() -> Path:
    """The package of the base with the adapter."""
    path = ROOM / "smol.mlpackage"
    if not path.exists():
        ROOM.mkdir(parents=True, exist_ok=True)
        words = ["package", "--base", BASE, "-a", f"reply={ADAPTER}", "--context", 512, "-o", path]
        subprocess.run([sys.executable, "-m", "loraduct", *map(str, words)], check=True)
    return path


def remembered(kept: dict[str, Any], probe: Any) -> Any:
    """What the probe says of changed weights, measured once: the budgets all ask for the same."""

    def make() -> Any:
        ask: list[Any] = []

        def loss(values: Any) -> Any:
            name = " ".join(values)
            known = isinstance(values, dict)  # else a plan for all of them, each another
            if not ask and not (known and name in kept["losses"]):
                ask.append(probe())
            if not known:
                return ask[0](values)
            if name not in kept["losses"]:
                kept["losses"][name] = ask[0](values)
                keep(kept)
            return kept["losses"][name]

        return loss

    return make


def keep(kept: dict[str, Any]) -> None:
    """For a run that is stopped."""
    KEPT.write_text(json.dumps(kept, indent=1))


def main() -> None:
    """Measure and write."""
    from loraduct.cli.calibration import OfPackage
    from loraduct.converters.compress_package import compress
    from loraduct.converters.compress_wanted import Calibration, Wanted
    from loraduct.converters.package import size_of
    from loraduct.formats.coreml.package import read
    from loraduct.validation import calibrate

    if "--fresh" in sys.argv[1:]:
        KEPT.unlink(missing_ok=True)
    target = built()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"rows": {}, "losses": {}}
    text = OfPackage(target, CALIBRATION, BASE, adapters=False, probing=True)
    given = text.calibration()
    calibration = Calibration(given.measure, remembered(kept, given.probe))
    ids = [calibrate.tokenized(BASE, [PAGE.read_text()])[0][:TOKENS]]
    functions = ("base", "reply")
    exact = {n: text.runner.logits(ids, n) for n in functions}

    def measured(package: Path) -> list[dict[str, Any]]:
        runner = calibrate.Runner(read(package))
        return [
            calibrate.quality(n, ids, exact[n], runner.logits(ids, n)).as_json() for n in functions
        ]

    rows = kept["rows"]
    for heading, options in {"FLOAT16": {}, **ROWS}.items():
        for how in ("", "calibrated"):
            key = f"{heading}|{how}"
            if key in rows or (how and not options):
                continue
            if not options:
                rows[key] = [size_of(target), 16.0, measured(target)]
            else:
                asked = dict(options)
                if isinstance(asked.get("size"), str):
                    asked["size"] = rows[f"{asked['size']}|{how}"][0]
                out = ROOM / "row.mlpackage"
                shutil.rmtree(out, ignore_errors=True)
                made = compress(
                    target, out, Wanted(**asked, calibration=calibration if how else None)
                )
                rows[key] = [made.after, made.bits, measured(out)]
                shutil.rmtree(out)
            keep(kept)
            print(line(key, rows[key]), flush=True)
    names = {
        "page": f"`{PAGE.relative_to(REPO)}`",
        "calibration": f"`{CALIBRATION.relative_to(REPO)}`",
    }
    _folders(kept, ids)
    head = TEXT.format(**names, tokens=len(ids[0]))
    order = [f"{h}|{how}" for h in ("FLOAT16", *ROWS) for how in ("", "calibrated")]
    body = "".join(line(k, rows[k]) + "\n" for k in order if k in rows)
    body += OF_FOLDERS + "".join(line(k, row) + "\n" for k, row in kept["folders"].items())
    (REPO / "docs" / "compression.md").write_text(head + body, encoding="utf-8")


def _folders(kept: dict[str, Any], ids: list[list[int]]) -> None:
    """The rows of `FOLDERS`: the values that MLX computes with, run by transformers."""
    from loraduct.cli.calibration import OfBase
    from loraduct.converters.compress_base import compress, decompress
    from loraduct.converters.compress_wanted import Wanted
    from loraduct.formats import base as base_folder
    from loraduct.validation import calibrate
    from loraduct.validation.calibrate_base import Runner

    rows = kept.setdefault("folders", {})
    exact = Runner(base_folder.read(BASE)).logits(ids)
    for heading, options in FOLDERS.items():
        for how in ("", "calibrated"):
            key = f"{heading}|{how}"
            if key in rows:
                continue
            text = OfBase(
                BASE, CALIBRATION, BASE, adapters=False, probing="quantize" not in options
            )
            given = text.calibration() if how else None
            packed, plain = ROOM / "packed", ROOM / "plain"
            made = compress(BASE, packed, Wanted(**options, calibration=given))
            decompress(packed, plain, force=False)
            found = calibrate.quality("", ids, exact, Runner(base_folder.read(plain)).logits(ids))
            per_weight = 8 * made.nbytes / made.weights
            rows[key] = [made.after, per_weight, [found.as_json()]]
            shutil.rmtree(packed)
            shutil.rmtree(plain)
            keep(kept)
            print(line(key, rows[key]), flush=True)


def line(key: str, row: Any) -> str:
    """One of the table."""
    heading, _, how = key.partition("|")
    size, bits, found = row
    cells = [
        f"{q['after']:{'.1f' if q['after'] < 1e4 else '.1e'}} | {q['kl']:.3f} | {q['top1']:.1%}"
        for q in found
    ]
    with_text = "" if heading == "FLOAT16" else "yes" if how else "no"
    return f"| {heading} | {with_text} | {size / 1e6:.1f} MB | {bits:.2f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
