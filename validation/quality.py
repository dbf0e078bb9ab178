"""What is left of an adapter's gain on the user's own text: losses of base, source and result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraduct.validation import runtimes
from loraduct.validation.checks import Check
from loraduct.validation.parity import PACKED
from loraduct.validation.runs import Scored
from loraduct.validation.runtimes import RUNTIME
from loraduct.validation.suites import CannotRun, Context, Suite, suite

SAMPLES, SEED = 2000, 0  # of the bootstrap: with this many, other seeds move its ends by under 1 %
ENDS = (2.5, 97.5)  # percentiles
LEAST = 5  # units that are drawn: of fewer texts, blocks of tokens; of fewer blocks nothing is said
BLOCK = 16  # tokens, long enough that what neighbours share stays within
TOO_FEW = f"the text is too short for an interval: give {LEAST} texts, or {LEAST * BLOCK} tokens"


def run(context: Context) -> Suite:
    """The suite. Raises CannotRun without a text or a base to run."""
    if context.runs.text is None:
        raise CannotRun("no text: --text FILE, what the adapter should be good at")
    if not context.base.has_weights:
        raise CannotRun(f"{context.base.path} holds no weights to run")
    kinds = [RUNTIME[a.format] for a in context.adapters]
    if context.base.quantization is not None and "torch" in kinds:
        raise CannotRun(PACKED)
    runs = context.runs
    try:
        sides = {"base": runs.bare(context.adapters[0]).scored}
        for name, adapter in zip(("source", "result"), context.adapters, strict=False):
            sides[name] = runs.adapted(adapter).scored
    except runtimes.RuntimeFailed as e:
        return suite("quality", [Check("quality", "failed", str(e))])
    texts, cut = runs.texts
    checks = []
    if cut:
        most = max(len(t.ids) for t in texts)
        what = f"{cut} of {len(texts)} texts were cut to {most} tokens, the most that is run"
        checks.append(Check("text", "warning", what))
    if len(texts) < len(runs.rows):
        what = f"the first {len(texts)} of {len(runs.rows)} texts were used (--text-tokens {runs.most})"
        checks.append(Check("text", "warning", what))
    numbers: dict[str, Any] = {
        "tokens": sum(len(t.scored) for t in texts),
        "cut": cut,
        "perplexities": {name: perplexity(rows) for name, rows in sides.items()},
        "texts": [
            {
                "text": n,
                "tokens": len(t.scored),
                **{name: perplexity([rows[n - 1]]) for name, rows in sides.items()},
            }
            for n, t in enumerate(texts, 1)
        ],
    }
    checks += judge(sides, numbers)
    return suite("quality", checks, numbers)


def judge(sides: dict[str, list[Scored]], numbers: dict[str, Any]) -> list[Check]:
    """The checks; adds ``gain``, ``gain_kept`` and ``greedy_agreement`` to the numbers."""
    words = ", ".join(f"{name} {v:.4g}" for name, v in numbers["perplexities"].items())
    if not all(math.isfinite(v) for v in numbers["perplexities"].values()):
        return [Check("perplexity", "failed", f"NaN or infinite: {words}")]
    found = [Check("perplexity", "passed", f"{words}, on {numbers['tokens']} tokens")]
    losses = {name: units(rows) for name, rows in sides.items()}
    gain, kept = intervals(losses["base"], losses["source"], losses.get("result"))
    numbers["gain"] = {k: v / numbers["tokens"] for k, v in gain.items()}
    nats = "{value:.4f} nats a token ({low:.4f} to {high:.4f})".format(**numbers["gain"])
    if math.isinf(gain["low"]):
        what = f"A gains {numbers['gain']['value']:.4f} nats a token; {TOO_FEW}"
        found.append(Check("gain", "warning", what))
    elif gain["high"] < 0:
        found.append(Check("gain", "failed", f"A makes this text worse: it gains {nats}"))
    elif gain["low"] <= 0:
        what = f"A gains {nats} on this text, which can't be told from nothing"
        found.append(Check("gain", "warning", what))
    else:
        found.append(Check("gain", "passed", f"A gains {nats}"))
    if "result" not in sides:
        return found
    numbers["greedy_agreement"] = agreement(sides["source"], sides["result"])
    if kept is None:
        why = TOO_FEW if math.isinf(gain["low"]) else "A has none"
        what = f"how much of A's gain B keeps can't be told on this text: {why}"
        return [*found, Check("gain kept", "skipped", what)]
    numbers["gain_kept"] = kept
    what = "B keeps {value:.2%} of A's gain ({low:.2%} to {high:.2%})".format(**kept)
    return [*found, Check("gain kept", "passed", what)]


def units(rows: Sequence[Scored]) -> list[float]:
    """Summed losses of what is drawn: of each text, or of the blocks of tokens of few texts."""
    import numpy as np

    if len(rows) >= LEAST:
        return [float(s.losses.sum()) for s in rows]
    parts = [p for s in rows for p in np.array_split(s.losses, math.ceil(len(s.losses) / BLOCK))]
    return [float(p.sum()) for p in parts]


def perplexity(rows: Sequence[Scored]) -> float:
    """exp of the mean loss of all scored tokens."""
    count = sum(len(s.losses) for s in rows)
    try:
        return math.exp(sum(float(s.losses.sum()) for s in rows) / count)
    except OverflowError:
        return math.inf


def agreement(source: Sequence[Scored], result: Sequence[Scored]) -> float:
    """Share of scored tokens where both find the same one likeliest, given the same text before."""
    equal = sum(int((x.best == y.best).sum()) for x, y in zip(source, result, strict=True))
    return equal / sum(len(x.best) for x in source)


def intervals(
    base: Sequence[float],
    source: Sequence[float],
    result: Sequence[float] | None,
    seed: int = SEED,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """(A's gain, B's share of it), each ``{value, low, high}``, from the summed losses of each unit.

    Percentile bootstrap over units (Efron and Tibshirani 1993, chapter 13): a sample's share is the
    ratio of sums, not the mean of ratios. The share is None where the gain's interval reaches 0; of
    fewer than LEAST units the interval is all numbers.
    """
    import numpy as np

    gains = np.subtract(base, source)
    if len(gains) < LEAST:
        return {"value": float(gains.sum()), "low": -math.inf, "high": math.inf}, None
    picks = np.random.default_rng(seed).integers(0, len(gains), (SAMPLES, len(gains)))
    sums = gains[picks].sum(axis=1)
    gain = _ends(float(gains.sum()), sums)
    if result is None or gain["low"] <= 0:
        return gain, None
    kept = np.subtract(base, result)
    good = sums > 0
    ratios = kept[picks].sum(axis=1)[good] / sums[good]
    return gain, _ends(float(kept.sum() / gains.sum()), ratios)


def _ends(value: float, samples: Any) -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(samples, ENDS)
    return {"value": value, "low": float(low), "high": float(high)}
