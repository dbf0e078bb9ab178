"""What goes into a model's linear layers on a text, and what compression does to its predictions.

The second moments of a layer's inputs, E[x_j^2] per input channel, are what errors of its weights
count: a change dW of its weights moves its outputs by E|dW x|^2 = sum_j E[x_j^2] |dW_j|^2 where inputs
are not correlated (the diagonal of the Hessian of Optimal Brain Surgeon and GPTQ, arXiv:2210.17323).

Packages are run by the reference interpreter, bases' folders by stock transformers (`calibrate_base`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from loraduct.errors import Refused
from loraduct.formats.coreml.package import Package
from loraduct.text import printable
from loraduct.validation import coreml, mil, runtimes
from loraduct.validation.logits import agreement, divergence, log_divergence, log_softmax, losses

MOMENTS, HELD_OUT, PROBED = 256, 128, 64  # tokens at most: of calibration, of the check, of a probe
LEAST = 12  # tokens, below which nothing can be said
_LINEAR = "linear"

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Text:
    """Tokens to calibrate with, and others to check with. ``note``: what was left out, or ''."""

    calibration: list[list[int]]
    held_out: list[list[int]]
    note: str = ""


def tokenized(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text by the tokenizer in ``folder``.

    Raises Refused where there is none, MissingExtra without transformers, RuntimeFailed.
    """
    found = runtimes.tokenized(folder, texts)
    if found is None:
        what = "holds no tokenizer (tokenizer.json); give --base DIR, or JSONL with ids"
        raise Refused(folder, what)
    return found[0]


def parted(rows: Tokens, context: int, vocabulary: int | None, file: Path) -> Text:
    """The tokens for calibration and, behind them or in every third row, those for the check.

    ``context``: positions that the model has; longer rows are cut. Raises Refused for too few tokens,
    and for those beyond the ``vocabulary``.
    """
    count = sum(map(len, rows))
    if count < LEAST:
        raise Refused(file, f"holds {count} tokens; {LEAST} is the least, a page is better")
    for row in rows:
        for token in row:
            if token < 0 or (vocabulary is not None and token >= vocabulary):
                raise Refused(file, f"holds token {token}; the model has 0 to {vocabulary}, less 1")
    if len(rows) == 1:
        row = list(rows[0])
        first = min(2 * count // 3, MOMENTS, context)
        used, held = [row[:first]], [row[first : first + min(HELD_OUT, context)]]
    else:
        used = _limited([r for i, r in enumerate(rows) if i % 3 != 2], MOMENTS, context)
        third = [r for i, r in enumerate(rows) if i % 3 == 2] or [rows[-1]]
        used = used if len(rows) > 2 else _limited(rows[:1], MOMENTS, context)
        held = _limited(third, HELD_OUT, context)
    taken = sum(map(len, [*used, *held]))
    note = ""
    if taken < count:
        note = (
            f"{taken} of the text's {count} tokens are used: at most {MOMENTS} to calibrate and"
            f" {HELD_OUT} to check, and {context} positions at once"
        )
    return Text(used, held, note)


def _limited(rows: Tokens, most: int, context: int) -> list[list[int]]:
    """The rows, as far as ``most`` tokens go, each cut to ``context``."""
    found: list[list[int]] = []
    for row in rows:
        row = list(row[: min(context, most)])
        most -= len(row)
        found += [row] if row else []
    return found


class Runs(Protocol):
    """A model on some tokens."""

    @property
    def names(self) -> frozenset[str]:
        """The weights that can be changed."""

    def logits(self, ids: Tokens) -> list[Any]:
        """(tokens, vocabulary) of each row."""

    def changed(self, values: Mapping[str, Any]) -> AbstractContextManager[None]:
        """With other values in weights, by name."""


def probe(runner: Runs, ids: Tokens) -> Callable[[Mapping[str, Any]], float | None]:
    """What the predictions lose when weights are changed: values by name -> mean KL, in nats; None where
    the model has no such weight."""
    few = _limited(ids, PROBED, PROBED)
    exact = [log_softmax(x) for x in runner.logits(few)]

    def loss(values: Mapping[str, Any]) -> float | None:
        if not values.keys() <= runner.names:
            return None
        with runner.changed(values):
            return log_divergence(exact, [log_softmax(x) for x in runner.logits(few)])

    return loss


# -- packages --------------------------------------------------------------------------------------


class Runner:
    """Functions of a package on some tokens, in float32, with weights changed or as they are."""

    def __init__(self, package: Package) -> None:
        self.package, self.weights = package, mil.Weights(package)
        self.base = next(iter(coreml.functions(package)))
        self.sessions: dict[str, coreml.Session] = {}

    def session(self, name: str | None = None) -> coreml.Session:
        """What runs the function ``name`` (None: the base, or whatever is the default)."""
        name = name or self.base
        if name not in self.sessions:
            made = coreml.session(self.package, name, weights=self.weights, precision=mil.FULL)
            made.extra = _zeros(made)
            self.sessions[name] = made
        return self.sessions[name]

    @property
    def context(self) -> int:
        """Positions that the package has."""
        from loraduct.formats.coreml import record

        context = record.read(self.package).get("context")
        if isinstance(context, int):
            return context
        return min(1024, self.session().positions or 1024)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it knows, as far as its program says."""
        program = next(iter(self.session().machines.values())).program
        for step in program.steps:
            if step.name == coreml.LOGITS and step.outputs[0].shape:
                return step.outputs[0].shape[-1]
        return None

    @property
    def names(self) -> frozenset[str]:
        """The constants of the base's function."""
        return frozenset(_constants(self.session()))

    def logits(self, ids: Tokens, name: str | None = None) -> list[Any]:
        """(tokens, vocabulary) of each row."""
        made, found = self.session(name), []
        for row in ids:
            made.start()
            found.append(made.feed(row))
        return found

    @contextmanager
    def changed(self, values: Mapping[str, Any]) -> Iterator[None]:
        """With other values in the base's weights, by name."""
        keys = _constants(self.session())
        kept: dict[Any, Any] = {}
        try:
            for name, value in values.items():
                constant = keys[name]
                kept[constant.key] = self.weights.get(constant)
                self.weights.held[constant.key] = value.astype("float32")
            yield
        finally:
            self.weights.held.update(kept)


def second_moments(runner: Runner, ids: Tokens, names: Sequence[str] = ()) -> dict[str, Any]:
    """E[x_j^2] over the tokens, (in,) float64, of each linear layer's input, by its weight's name.

    Of the base's function; of further functions ``names``, the keys are FUNCTION/WEIGHT. A weight that
    several layers share gets the mean.
    """
    found = _moments(runner, ids, None)
    for name in names:
        own = _moments(runner, ids, name)
        found |= {f"{name}/{weight}": value for weight, value in own.items()}
    return found


def _moments(runner: Runner, ids: Tokens, name: str | None) -> dict[str, Any]:
    import numpy as np

    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def watch(step: Any, arguments: dict[str, Any]) -> None:
        weight = step.arguments.get("weight")
        if step.kind != _LINEAR or weight is None or isinstance(weight, str):
            return
        x = arguments["x"].reshape(-1, arguments["x"].shape[-1])[:fed]
        with np.errstate(over="ignore"):
            total = np.einsum("ij,ij->j", x, x, dtype=np.float64)
        sums[weight.name] = sums.get(weight.name, 0.0) + total
        counts[weight.name] = counts.get(weight.name, 0) + len(x)

    made, fed = runner.session(name), 0
    for machine in made.machines.values():
        machine.watch = watch
    try:
        for row in ids:
            made.start()
            fed = len(row)  # of fixed shapes, what is filled up comes behind
            made.feed(row)
    finally:
        for machine in made.machines.values():
            machine.watch = None
    return {n: total / counts[n] for n, total in sums.items()}


def _constants(session: coreml.Session) -> dict[str, Any]:
    """The constants that its operations are given, by name."""
    found = {}
    for machine in session.machines.values():
        for step in machine.program.steps:
            for given in step.arguments.values():
                if not isinstance(given, str | tuple):
                    found[given.name] = given
    return found


def _zeros(session: coreml.Session) -> dict[str, Any]:
    """Adapters that are arguments of a call: none."""
    import numpy as np

    program = next(iter(session.machines.values())).program
    usual = (coreml.IDS, coreml.MASK, coreml.POSITION)
    return {
        n: np.zeros([s or 1 for s in o.shape or ()], np.float16)
        for n, o in program.inputs.items()
        if n not in usual
    }


# -- what it does to the model ---------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """Of ``tokens`` predictions: mean KL(before || after) in nats, the share whose likeliest token
    is the same, and the perplexity of the text before and after."""

    name: str
    tokens: int
    kl: float
    top1: float
    before: float
    after: float

    def line(self) -> str:
        """For people."""
        return (
            f"{printable(self.name, 60)}: on {self.tokens} held-out tokens KL {self.kl:.4f}, top-1 equal"
            f" at {self.top1:.1%}, perplexity {self.before:.2f} -> {self.after:.2f}"
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def quality(name: str, ids: Tokens, before: Sequence[Any], after: Sequence[Any]) -> Quality:
    """From logits (tokens, vocabulary) of each row."""
    import numpy as np

    return Quality(
        name, sum(map(len, ids)), divergence(before, after), agreement(before, after),
        *(float(np.exp(_loss(ids, logits))) for logits in (before, after)),
    )  # fmt: skip


def _loss(ids: Tokens, logits: Sequence[Any]) -> float:
    """Mean negative log-likelihood of each token after the first of its row; 0 if there is none."""
    pairs = zip(ids, logits, strict=True)
    total = sum(float(losses(found[:-1], row[1:]).sum()) for row, found in pairs)
    return total / max(sum(len(row) - 1 for row in ids), 1)
