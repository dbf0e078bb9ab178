"""What `compress --calibrate` composes: a text, what validation measures on it, what converters ask."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraduct.converters.compress_wanted import Calibration
    from loraduct.validation import calibrate_base
    from loraduct.validation.calibrate import Runner, Text


def pieces(file: Path) -> tuple[list[str], list[list[int]]]:
    """(texts, rows of token ids) of a file: a text as a whole, or JSONL with one of ``ids``, ``text``,
    or ``prompt`` (and ``completion``) in each line. Raises Refused."""
    from loraduct.errors import Refused
    from loraduct.validation.texts import PAGE_BYTES, content_of, json_object, lines

    text = content_of(file, PAGE_BYTES)
    values = {n: json_object(row) for n, row in lines(text).items()}
    if not values:
        raise Refused(file, "holds no text; a page of what the model is used for is best")
    if file.suffix != ".jsonl" and None in values.values():
        return [text], []
    texts: list[str] = []
    ids: list[list[int]] = []
    for number, value in values.items():
        given = value or {}
        own = given.get("ids")
        said = given.get("text", given.get("prompt"))
        more = given.get("completion", "")
        if isinstance(own, list) and own and all(type(i) is int for i in own):
            ids.append(own)
        elif isinstance(said, str) and isinstance(more, str):
            texts.append(f"{said}\n{more}" if more else said)
        else:
            what = "is no object with a text, a prompt, or ids (token numbers)"
            raise Refused(file, f"line {number} {what}")
    return texts, ids


class OfPackage:
    """A package's calibration; everything is run when it is first asked for."""

    def __init__(
        self, target: Path, file: Path, base: Path | None, adapters: bool, probing: bool
    ) -> None:
        self.target, self.file, self.base = target, file, base
        self.adapters, self.probing = adapters, probing

    @cached_property
    def runner(self) -> Runner:
        """The package before it is compressed."""
        from loraduct.formats.coreml.package import read
        from loraduct.validation.calibrate import Runner

        return Runner(read(self.target))

    @cached_property
    def text(self) -> Text:
        """Its tokens."""
        from loraduct.converters.coreml import tokenizer_of
        from loraduct.validation import calibrate

        texts, rows = pieces(self.file)
        if texts:
            folder = self.base or tokenizer_of(self.target)
            rows = [*calibrate.tokenized(folder, texts), *rows]
        runner = self.runner
        return calibrate.parted(rows, runner.context, runner.vocabulary, self.file)

    @cached_property
    def names(self) -> list[str]:
        """Functions beside the base's that are run: those of adapters that are compressed too."""
        from loraduct.validation import coreml

        if not self.adapters:
            return []
        package, rows = self.runner.package, _rows(self.runner.package)
        known = coreml.functions(package)
        return [n for n, by_q in known.items() if rows[next(iter(by_q.values()))]["adapters"]]

    def calibration(self) -> Calibration:
        """For converters."""
        from loraduct.converters.compress_wanted import Calibration
        from loraduct.validation import calibrate

        def moments() -> Any:
            return calibrate.second_moments(self.runner, self.text.calibration, self.names)

        def probe() -> Any:
            return calibrate.probe(self.runner, self.text.calibration)

        return Calibration(moments, probe if self.probing else None)

    def quality(self, output: Path) -> list[Any]:
        """What compression did to the base's predictions, and to those of adapters compressed too."""
        from loraduct.formats.coreml.package import read
        from loraduct.validation.calibrate import Runner, quality

        ids, after = self.text.held_out, Runner(read(output))
        return [
            quality(n, ids, self.runner.logits(ids, n), after.logits(ids, n))
            for n in dict.fromkeys([self.runner.base, *self.names])
        ]


class OfBase:
    """A base's calibration, by transformers; everything is run when it is first asked for."""

    def __init__(
        self, target: Path, file: Path, base: Path | None, adapters: bool, probing: bool
    ) -> None:
        self.target, self.file, self.tokenizer = target, file, base or target
        self.probing = probing

    @cached_property
    def runner(self) -> calibrate_base.Runner:
        """The base before it is compressed."""
        from loraduct.formats import base as base_folder
        from loraduct.validation.calibrate_base import Runner

        return Runner(base_folder.read(self.target))

    @cached_property
    def text(self) -> Text:
        """Its tokens."""
        from loraduct.formats import base as base_folder
        from loraduct.validation import calibrate

        texts, rows = pieces(self.file)
        rows = [*(calibrate.tokenized(self.tokenizer, texts) if texts else []), *rows]
        config = base_folder.read(self.target).text_config
        context, vocabulary = (
            n if type(n) is int and n > 0 else None
            for n in (config.get("max_position_embeddings"), config.get("vocab_size"))
        )
        return calibrate.parted(rows, context or 1 << 30, vocabulary, self.file)

    def calibration(self) -> Calibration:
        """For converters."""
        from loraduct.converters.compress_wanted import Calibration
        from loraduct.validation import calibrate

        def moments() -> Any:
            return self.runner.second_moments(self.text.calibration)

        def probe() -> Any:
            return calibrate.probe(self.runner, self.text.calibration)

        return Calibration(moments, probe if self.probing else None)

    def quality(self, output: Path) -> list[Any]:
        """What compression did to the predictions: of weights packed for MLX, the values that it computes
        with, in the runtime that ran the base before."""
        from loraduct.converters.compress_base import decompress
        from loraduct.formats import base as base_folder
        from loraduct.validation.calibrate import quality
        from loraduct.validation.calibrate_base import Runner

        ids = self.text.held_out
        before = self.runner.logits(ids)
        del self.runner  # one model at a time
        with TemporaryDirectory(prefix=".loraduct-", dir=output.absolute().parent) as room:
            made = base_folder.read(output)
            if made.quantization is not None:
                decompress(output, Path(room) / "base", force=False)
                made = base_folder.read(Path(room) / "base")
            return [quality("base", ids, before, Runner(made).logits(ids))]


def _rows(package: Any) -> dict[str, Any]:
    from loraduct.formats.coreml import record

    rows: dict[str, Any] = record.read(package)["functions"]
    return rows
