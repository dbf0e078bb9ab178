"""Writing an adapter folder: weights, config, model card and companions, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.account import Account
from loraduct.errors import Refused
from loraduct.files import file_chunks, read_bytes, resolved, staged_folder, write_file
from loraduct.formats import CONFIG, companions, mlx, mlx_writer, peft, peft_writer
from loraduct.formats.json_file import dump
from loraduct.formats.safetensors_file import serialized
from loraduct.tensor import UNIT_ROUNDOFF, Tensor
from loraduct.text import several

WEIGHTS = {"peft": peft.WEIGHTS, "mlx": mlx.WEIGHTS}
METADATA = {"peft": peft_writer.METADATA, "mlx": mlx_writer.METADATA}
# what a folder may hold for --force to replace it
_OURS = (
    CONFIG, peft.WEIGHTS, peft.PICKLE, mlx.WEIGHTS, mlx.OLD_WEIGHTS, "adapter_packed.safetensors"
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A folder to be written: everything decided, no values read yet."""

    format: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    card: str
    companions: tuple[Path, ...]
    account: Account


def check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse a target that can't or must not be written, before anything is read."""
    target_real, source_real = resolved(target), resolved(source)
    if target_real == source_real or target_real in source_real.parents:
        raise Refused(target, "is the source, or holds it; choose another output folder")
    if source_real in target_real.parents:
        raise Refused(target, "is inside the source folder; choose another output folder")
    if not target.parent.is_dir():
        raise Refused(target.parent, "does not exist, or is not a folder; make it first")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise Refused(target, "exists; use --force to replace it, or choose another output folder")
    if not target.is_dir():
        raise Refused(target, "is not a folder; --force replaces adapter folders only")
    foreign = sorted(p.name for p in target.iterdir() if not _replaceable(p))
    if foreign:
        raise Refused(
            target,
            f"holds files that are not an adapter's ({several(foreign)}); --force replaces adapter"
            " folders only: move them away first",
        )


def _replaceable(path: Path) -> bool:
    name = path.name
    known = name in _OURS or name in companions.LEFT_BEHIND or companions.is_companion(name)
    return (known or name.endswith("_adapters.safetensors")) and not path.is_dir()


def write(folder: Folder, target: Path | None, *, allow_approximate: bool = False) -> None:
    """Write ``folder`` to ``target``; None reads and checks every value and writes nothing.

    Fills the account's losses and files. Raises Refused, with nothing written, when values are
    not finite or rounding loses more than the dtype's own precision.
    """
    account = folder.account
    weights = WEIGHTS[folder.format]
    data = serialized(folder.tensors, folder.metadata, account.losses)
    texts = {CONFIG: dump(dict(folder.config))}
    if not any(c.name == "README.md" for c in folder.companions):
        texts["README.md"] = folder.card.encode()
    if target is None:
        account.files[weights] = sum(memoryview(c).nbytes for c in data)
        _check_losses(folder, allow_approximate)
        return
    with staged_folder(target) as stage:
        account.files[weights] = _write_counted(stage / weights, data)
        _check_losses(folder, allow_approximate)
        for name, text in texts.items():
            account.files[name] = _write_counted(stage / name, [text])
        for companion in folder.companions:
            told = companion.name == "README.md" and _retold(companion, folder.format)
            account.files[companion.name] = _write_counted(
                stage / companion.name, [told] if told else file_chunks(companion)
            )


def _retold(card: Path, library: str) -> bytes | None:
    """A model card that names the library that loads the folder now; None if it names none."""
    text = read_bytes(card, companions.LIMIT)
    front = re.match(rb"---\r?\n.*?\n---", text, re.DOTALL)
    line = front and re.search(rb"^library_name:[^\r\n]*", front[0], re.MULTILINE)
    if not line:
        return None
    return text[: line.start()] + b"library_name: " + library.encode() + text[line.end() :]


def _write_counted(path: Path, chunks: Iterable[Any]) -> int:
    total = 0

    def counted() -> Iterable[Any]:
        nonlocal total
        for chunk in chunks:
            total += memoryview(chunk).nbytes
            yield chunk

    write_file(path, counted())
    return total


def _check_losses(folder: Folder, allow_approximate: bool) -> None:
    """Rounding to nearest costs at most the unit roundoff; more means values fell out of range."""
    for name, loss in folder.account.losses.items():
        dtype = folder.tensors[name].dtype
        if loss.relative > 1.01 * UNIT_ROUNDOFF[dtype] and not allow_approximate:
            raise Refused(
                folder.tensors[name].path,
                f"loses {loss.relative:.1e} of its norm in {dtype}, whose precision is"
                f" {UNIT_ROUNDOFF[dtype]:.1e}: values are too small for it; use another --dtype, or"
                " --allow-approximate",
                tensor=folder.tensors[name].name,
            )


def model_card(
    to: str, config: Mapping[str, Any], base: str | None, source: str, texts: Mapping[str, str]
) -> str:
    """A model card with the front matter that model hubs read; only facts, nothing invented."""
    import json

    library = {"peft": "peft", "mlx": "mlx"}[to]
    front = {"library_name": library, "pipeline_tag": "text-generation"}
    if base:
        front["base_model"] = base
    if "license" in texts:
        front["license"] = texts["license"]
    # JSON strings are YAML strings, whatever is in them
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in sorted(front.items())), "tags:"]
    tags = ["lora", *([f"base_model:adapter:{base}"] if base and to == "peft" else [])]
    lines += [*(f"- {json.dumps(t)}" for t in tags), "---", ""]
    lines += [f"# {texts.get('name', 'Adapter')}", ""]
    if "description" in texts:
        lines += [texts["description"], ""]
    if to == "peft":
        method = "DoRA" if config.get("use_dora") else "LoRA"
        how = f"rank {config.get('r')}, alpha {config.get('lora_alpha')}"
    else:
        parameters = config.get("lora_parameters") or {}
        method = {"dora": "DoRA", "full": "Full fine-tune"}.get(
            str(config.get("fine_tune_type")), "LoRA"
        )
        how = f"rank {parameters.get('rank')}, scale {parameters.get('scale')}"
    lines += [f"{method} adapter, {how}, converted from {source} by loraduct.", ""]
    return "\n".join(lines)
