"""Files that travel with an adapter or a model: tokenizer, chat template, model card, licence."""

from __future__ import annotations

from pathlib import Path

# Exact names, or beginnings of names. Training state and pickles are never opened or carried.
NAMES = (
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",  # a folder: not carried, and said so
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
_BEGINNINGS = ("LICENSE", "LICENCE", "NOTICE")
_TOKENIZERS = "tokenizer.model.v", ".tiktoken"  # Mistral's versions; Qwen's, under any name
# Ours or the training's: known, left behind, and no reason to refuse --force.
LEFT_BEHIND = (
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    ".gitattributes",
)
LIMIT = 256 << 20


def is_companion(name: str) -> bool:
    """Whether a file of this name travels along."""
    start, end = _TOKENIZERS
    known = name in NAMES or name.upper().startswith(_BEGINNINGS)
    return known or name.startswith(start) or name.endswith(end)


def find(folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    """Companions of a folder, and the names of those that are not carried, with why."""
    found, odd = [], []
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return (), []
    for path in entries:
        if not is_companion(path.name):
            continue
        why = why_not(path, folder)
        if why is None:
            found.append(path)
        else:
            odd.append(f"{path.name} is {why} and is not carried")
    return tuple(found), odd


def why_not(path: Path, folder: Path) -> str | None:
    """What keeps a file at or below ``folder`` from being carried, after "is"; None: nothing does.

    A link is followed only within the folder or into the ``blobs`` of a model cache that the
    folder is a snapshot of; anywhere else it could smuggle a private file into the output.
    """
    if not _harmless(path, folder):
        return "a link out of the folder"
    if not path.is_file():
        return "not a regular file"
    return "too large for a companion" if path.stat().st_size > LIMIT else None


def _harmless(path: Path, folder: Path) -> bool:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    home = folder.resolve()
    cache_blobs = home.parent.parent / "blobs"  # models--x--y/snapshots/REVISION -> blobs
    return target.is_relative_to(home) or (
        home.parent.name == "snapshots" and target.is_relative_to(cache_blobs)
    )
