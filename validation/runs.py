"""Every model that suites need, loaded once: its logits of the prompts, its losses on the texts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.validation import runtimes, texts
from loraduct.validation.loaded import Loaded
from loraduct.validation.logits import losses
from loraduct.validation.runtimes import NEW_TOKENS, RUNTIME, Run

MOST_TOKENS = 1024  # of a text: what is longer is cut
TEXT_TOKENS, SLOW_TOKENS = 512, 256  # of all texts; where MLX has only its CPU backend
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
)


def most_tokens(adapters: Sequence[Adapter]) -> int:
    """How many tokens of the texts are used unless the user says how many."""
    slow = platform.system() != "Darwin" and any(a.format == "mlx" for a in adapters)
    return SLOW_TOKENS if slow else TEXT_TOKENS


@dataclass(frozen=True)
class Scored:
    """A text's losses (nats) and the likeliest tokens, at its scored positions."""

    losses: Any
    best: Any


@dataclass(frozen=True)
class Done:
    """What one model said of all prompts and texts."""

    run: Run
    scored: list[Scored]


class Runs:
    """Results by model, each computed when it is first asked for.

    ``file``: where the prompts are from, if from the user. ``rows``: the objects of the text file.
    """

    def __init__(
        self,
        base: Base,
        prompts: Sequence[str],
        *,
        file: Path | None = None,
        text: Path | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
        most: int = TEXT_TOKENS,
        adapters: Sequence[Adapter] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.base, self.prompts, self.file = base, prompts, file
        self.text, self.rows, self.most, self.adapters = text, rows, most, adapters
        self.progress = progress
        # the adapter is held: its id is the key
        self._done: dict[object, tuple[Adapter, Done]] = {}

    @cached_property
    def _tokens(self) -> tuple[list[list[int]], Any]:
        ids, tokenizer = runtimes.tokenize(self.base, self.prompts)
        for n, one in enumerate(ids, 1):
            if self.file is not None and len(one) + NEW_TOKENS > self.limit:
                what = f"has {len(one)} tokens, and the context is {self.limit} with {NEW_TOKENS} new ones"
                raise Refused(self.file, f"prompt {n} {what}; shorten it")
        return ids, tokenizer

    @property
    def ids(self) -> list[list[int]]:
        """Tokens of the prompts."""
        return self._tokens[0]

    @property
    def tokenizer(self) -> Any:
        """The base's, or None."""
        return self._tokens[1]

    @cached_property
    def limit(self) -> int:
        """The most positions that the base and all packages have."""
        stated = (self.base.text_config.get(k) for k in _POSITIONS)
        own = [v for v in stated if type(v) is int and v > 0]
        packages = {a.path: a.name for a in self.adapters if a.format == "coreml"}
        own += [runtimes.session_of(path, name).positions for path, name in packages.items()]
        return min((n for n in own if n), default=1 << 20)

    @cached_property
    def texts(self) -> tuple[list[texts.Text], int]:
        """(the first texts, up to ``most`` tokens, and how many were cut); none without a file."""
        if self.text is None:
            return [], 0
        if self.tokenizer is None:
            what = "can't be used: the base has no tokenizer (tokenizer.json)"
            raise Refused(self.text, what)
        longest = min(self.limit, MOST_TOKENS)
        return texts.tokenized(self.rows, self.tokenizer, longest, self.most, self.text)

    def bare(self, adapter: Adapter) -> Done:
        """The base without the adapter, where the adapter runs: a package has a base of its own."""
        return self._of(adapter, bare=True)

    def adapted(self, adapter: Adapter) -> Done:
        """The base with the adapter. Raises RuntimeFailed, MissingExtra."""
        return self._of(adapter, bare=False)

    def _of(self, adapter: Adapter, *, bare: bool) -> Done:
        kind = RUNTIME[adapter.format]
        package = adapter.path if kind == "coreml" else None
        key = (kind, package, None if bare else id(adapter))
        if key not in self._done:
            what = "the base" if bare else str(adapter.path)
            self.progress(f"running {what} in {'the interpreter' if package else kind}")
            given = None if bare else adapter
            # of the bare bases, quality asks A's alone
            scores = not bare or not self.adapters or adapter is self.adapters[0]
            work = partial(self._work, scores=scores)
            if package is not None:
                done = runtimes.use_package(package, given.name if given else None, work)[0]
            else:
                done = runtimes.use(kind, self.base, given, work)
            self._done[key] = adapter, done
        return self._done[key][1]

    def _work(self, model: Loaded, *, scores: bool) -> Done:
        """All that is asked of a loaded model."""
        run = Run(list(model.each(self.ids)), model.greedy(self.ids[0], NEW_TOKENS))
        rows = self.texts[0] if scores else []
        given = model.each([t.ids for t in rows])
        return Done(run, [_scored(z, t) for z, t in zip(given, rows, strict=True)])


def _scored(logits: Any, text: texts.Text) -> Scored:
    """The loss of each scored token given those before it, from a row's logits."""
    import numpy as np

    z = np.asarray(logits)[np.array(text.scored) - 1]
    with np.errstate(invalid="ignore"):
        return Scored(losses(z, [text.ids[p] for p in text.scored]), z.argmax(axis=-1))
