"""Bytes <-> Adapter: one module per format, each with read and layout."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from loraduct.adapter import Adapter, Note
from loraduct.errors import NotRecognised, Refused
from loraduct.files import check_regular, is_file
from loraduct.formats.options import ReadOptions
from loraduct.text import several

CONFIG = "adapter_config.json"
# name -> (files by which a folder is recognised, what it is); a module is imported when needed
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "peft": (
        ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.safetensors.index.json"),
        "PEFT folder: adapter_config.json + adapter_model.safetensors (.bin: read only)",
    ),
    "mlx": (
        ("adapters.safetensors", "adapters.npz"),
        "MLX folder: adapter_config.json + adapters.safetensors (.npz: read only)",
    ),
    "packed": (
        ("adapter_packed.safetensors",),
        "packed folder: adapter_config.json + adapter_packed.safetensors, from compress",
    ),
    "coreml": (
        ("Data/com.apple.CoreML",),
        "Core ML package (.mlpackage): a base, and the adapters put into it",
    ),
}


_MODULES = {"packed": "packed_adapter"}  # named otherwise than the format


def module_of(name: str) -> ModuleType:
    """The module of a format."""
    return import_module(f"loraduct.formats.{_MODULES.get(name, name)}")


def detect(folder: Path) -> str | None:
    """The format of the adapter in a folder by its files' names, or None."""
    found = [
        name
        for name, (files, _) in FORMATS.items()
        if any((folder / f).exists() or (folder / f).is_symlink() for f in files)
    ]
    if len(found) > 1:
        raise Refused(folder, f"holds weights of several formats ({', '.join(found)}); keep one")
    return found[0] if found else None


def adapters_in(folder: Path) -> dict[str, Path]:
    """Adapters in a folder: itself (``default``) and its direct subfolders, as PEFT saves them."""
    found = {"default": folder} if detect(folder) else {}
    try:
        inner = sorted(p for p in folder.iterdir() if p.is_dir())
    except OSError:
        inner = []
    return found | {p.name: p for p in inner[:1000] if detect(p)}


def locate(path: Path, options: ReadOptions) -> tuple[Path, ReadOptions]:
    """The adapter's folder for what a user may point at: the folder, a file in it, a parent."""
    if not path.exists() and not path.is_symlink():
        package, _, name = str(path).rpartition(":")
        if package and detect(Path(package)) == "coreml":
            return Path(package), replace(options, adapter=name)
        raise NotRecognised(path, "does not exist")
    if is_file(path):
        check_regular(path)
        usual = [CONFIG, *(name for names, _ in FORMATS.values() for name in names)]
        weights = path.suffix in (".safetensors", ".npz")
        if not weights and path.name not in usual:
            raise NotRecognised(
                path, f"is neither an adapter folder nor one of its files ({several(usual, 5)})"
            )
        if path.name not in usual:  # a checkpoint such as 0000100_adapters.safetensors
            options = replace(options, weights=path)
        return path.parent, options
    found = adapters_in(path)
    if options.adapter and options.adapter in found:
        return found[options.adapter], replace(options, adapter=None)
    if "default" in found:
        return path, options
    if len(found) == 1:
        return next(iter(found.values())), options
    if found:
        raise Refused(
            path,
            f"holds several adapters ({several(list(found), 8)}); name one folder, or use --adapter NAME",
        )
    return path, options


def read(path: Path, options: ReadOptions | None = None) -> Adapter:
    """The adapter at ``path``, whichever format it has. Raises Refused, NotRecognised."""
    folder, options = locate(path, options or ReadOptions())
    name = detect(folder)
    if name is None and options.weights:
        name = "mlx" if "adapters" in options.weights.name else "peft"
    if name is None:
        if (folder / CONFIG).exists():
            raise NotRecognised(
                folder,
                "has an adapter_config.json but no weights beside it (adapter_model.safetensors"
                " or adapters.safetensors)",
            )
        hint = (
            "is a base model, not an adapter"
            if (folder / "config.json").exists()
            else "holds no adapter that loraduct reads (PEFT or MLX folder)"
        )
        raise NotRecognised(folder, hint)
    if name == "mlx" and options.adapter not in (None, "default"):
        raise Refused(
            folder, f"is an MLX folder, which holds one adapter; there is no {options.adapter!r}"
        )
    adapter: Adapter = module_of(name).read(folder, options)
    return replace(adapter, notes=(*adapter.notes, *_untrained(adapter)))


def _untrained(adapter: Adapter) -> list[Note]:
    """A note on an adapter that moves nothing; of one that does, a piece of one factor is read."""
    plain = len(adapter.low_rank) == len(adapter.updates) > 0
    if plain and all(
        u.magnitude is None and u.bias is None and (u.b.is_zero() or u.a.is_zero())
        for u in adapter.low_rank.values()
    ):
        what = "every b is zero, as before training: the adapter changes nothing"
        return [Note("zero", what)]
    return []
