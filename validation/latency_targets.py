"""What ``bench`` is pointed at: an adapter, a base, a package; refused with a way out where it can't run."""

from __future__ import annotations

import platform
from pathlib import Path

from loraduct.adapter import Adapter
from loraduct.architectures import table
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats import estimate
from loraduct.formats.base import Base
from loraduct.formats.experts import wrong_experts
from loraduct.modules import pattern_of
from loraduct.text import printable
from loraduct.validation.latency import Target

NO_WEIGHTS = "holds no weights to run; ask for --device NAME: a forecast needs none"


def package_at(path: Path) -> tuple[Path, str | None] | None:
    """(package, None) for a package, (package, NAME) for ``PACKAGE:NAME``, None for anything else."""
    from loraduct.formats.coreml.package import is_package

    if is_package(path):
        return path, None
    package, _, name = str(path).rpartition(":")
    named = package and not path.exists() and is_package(Path(package))
    return (Path(package), name) if named else None


def is_base(path: Path) -> bool:
    """Whether a folder is a base model's, not an adapter's."""
    from loraduct.formats import detect

    return (path / "config.json").exists() and detect(path) is None


def is_adapter(path: Path) -> bool:
    """Whether it is neither a package nor a base: what `adapter_at` reads."""
    return package_at(path) is None and path.name != "config.json" and not is_base(path)


def adapter_at(path: Path, base: Path | None) -> tuple[Adapter, Base]:
    """An adapter and its base, read. Raises Refused, also where ``base`` is not given, or another's."""
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions

    if base is None:
        read(path)  # what can't be read at all is said first
        raise Refused(path, "is an adapter: --base says which base it runs on")
    model = base_folder.read(base)
    adapter = read(path, ReadOptions(base=model, restore=False))
    for problem in misfits(adapter, model):
        raise problem
    return adapter, model


def misfits(adapter: Adapter, base: Base) -> list[Refused]:
    """Why an adapter can't be one of ``base``, whether that has weights or its config alone.

    Raises Refused where a config alone does not tell the shapes.
    """
    found = [*base_folder.differences(adapter, base), *wrong_experts(adapter, base)]
    known = table().get(base.architecture)
    held = {*known.by_hf, *known.by_mlx, *known.blocked, *base.linear_modules} if known else set()
    adapted = {_within(m): m for m in adapter.adapted}
    if held and adapted and not adapted.keys() & {_within(m) for m in held}:
        what = f"is no module of a {printable(base.model_type, 60)}: made for another base"
        found.append(Refused(adapter.weights, what, tensor=min(adapted.values())))
    if base.has_weights:
        return found
    told = {r["target"]: r["out_in"] for r in estimate.estimate(base.path, 1)["targets"]}
    for module, u in adapter.low_rank.items():
        shapes = told.get(_within(module))
        if u.layout == "linear" and shapes and list(u.shape) not in shapes:
            what = (
                f"updates a weight of shape {list(u.shape)}, the base {base.path} has {shapes[0]}"
            )
            found.append(Refused(adapter.weights, f"{what}: made for another base", tensor=module))
    return found


def _within(module: str) -> str:
    """The path within its block; outside of blocks the last name, as wholes are wrapped in others."""
    before, mark, after = pattern_of(module).partition(".{}.")
    return after if mark else before.rpartition(".")[2]


def target_of(
    path: Path,
    base: Path | None,
    runtime: str | None = None,
    dtype: str | None = None,
    units: str = "ALL",
) -> Target:
    """A base folder, an adapter on ``base``, or on a Mac a package (``PACKAGE:NAME``).

    Raises Refused, with a way out, for what can't be measured here.
    """
    if package := package_at(path):
        if runtime not in (None, "coreml"):
            raise Refused(path, f"is a package, which runs in coreml, not in {runtime}")
        return _package_target(str(path), *package, units)
    if runtime == "coreml":
        raise Refused(path, "is no package: Core ML runs packages; `loraduct package` builds one")
    if path.suffix == ".onnx" or (path.is_dir() and any(path.glob("*.onnx"))):
        raise Refused(
            path,
            "is an ONNX model: loraduct writes none and does not know how its inputs are called, so it"
            " does not measure it; onnxruntime-genai's benchmark does",
        )
    if is_base(path):
        return _base_target(path, runtime, dtype)
    adapter, model = adapter_at(path, base)
    return of_adapter(adapter, model, str(path), runtime, dtype)


def _package_target(shown: str, path: Path, name: str | None, units: str) -> Target:
    if platform.system() != "Darwin":
        raise Refused(
            Path(shown),
            "is a Core ML package, and Core ML runs on Apple's systems only: our interpreter here checks"
            " numbers and says nothing of a device's speed. Ask for --device NAME (a forecast), run this"
            " on a Mac, or measure on a phone with the program in docs/latency.md",
        )
    from loraduct.validation import workload

    load = workload.of_package(*workload.read_package(path, name))
    # any token is as good as another: the first hundred are in every vocabulary
    return Target(shown, "coreml", path, name, "stored", units, 100, load.buffer_tokens)


def _base_target(path: Path, runtime: str | None, dtype: str | None) -> Target:
    model = base_folder.read(path)
    if not model.has_weights:
        raise Refused(path, NO_WEIGHTS)
    kind = runtime or ("mlx" if model.quantization else "torch")
    if kind == "torch" and model.quantization:
        raise Refused(path, "is packed by mlx-lm, torch can't load it; use --runtime mlx")
    return _folder_target(str(path), kind, model, None, dtype)


def of_adapter(
    adapter: Adapter,
    base: Base,
    name: str,
    runtime: str | None = None,
    dtype: str | None = None,
) -> Target:
    """An adapter that was read, beside its base. Raises Refused, with a way out."""
    from loraduct.validation.runtimes import RUNTIME, usual_weights

    kind = RUNTIME[adapter.format]
    if kind == "coreml":
        return _package_target(f"{name}:{adapter.name}", adapter.path, adapter.name, "ALL")
    if runtime not in (None, kind):
        to = {"torch": "peft", "mlx": "mlx"}[str(runtime)]
        what = f"is an adapter of {kind}; `loraduct convert --to {to}` makes one of {runtime}"
        raise Refused(adapter.path, what)
    if not usual_weights(adapter):
        what = f"{kind} does not look for its weights in {adapter.weights.name}: convert it first"
        raise Refused(adapter.path, what)
    if not base.has_weights:
        raise Refused(base.path, NO_WEIGHTS)
    if kind == "torch" and base.quantization:
        what = "is packed by mlx-lm, torch can't load it; give the unpacked base, or an MLX adapter"
        raise Refused(base.path, what)
    return _folder_target(name, kind, base, str(adapter.path), dtype)


def _folder_target(
    name: str, runtime: str, model: Base, adapter: str | None, dtype: str | None
) -> Target:
    from loraduct.validation import workload

    vocabulary = model.text_config.get("vocab_size")
    if type(vocabulary) is not int or vocabulary <= 0:
        raise Refused(model.path / "config.json", "has no vocab_size")
    # torch is slow in half precision on a CPU, and that is no news of an adapter
    chosen = dtype or ("float32" if runtime == "torch" else "stored")
    most = workload.of_base(model).context
    return Target(name, runtime, model.path, adapter, chosen, "ALL", vocabulary, most)
