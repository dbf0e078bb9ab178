"""What the stock libraries do with an adapter: our oracles.

Nothing here imports loraduct. PEFT and mlx-lm build, save, load and run adapters as their users
do; numbers leave as float32 or float64 NumPy arrays.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file as _load_numpy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import TOKENS

Arrays = dict[str, np.ndarray]
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set these fields; a value of `...` removes the field."""
    document = {**read_json(path), **changes}
    kept = {key: value for key, value in document.items() if value is not ...}
    path.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def raw_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes), read from the file's own header: no library in between."""
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            blob[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def float64_tensors(path: Path) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in load_file(path).items()}


def rewrite_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def copy_adapter(source: Path, target: Path) -> Path:
    """A copy a test may change."""
    return Path(shutil.copytree(source, target))


def cast_tensors(path: Path, dtype: torch.dtype) -> None:
    """What people do to halve a file: cast every tensor of it."""
    rewrite_tensors(path, {name: tensor.to(dtype) for name, tensor in load_file(path).items()})


# --- PEFT -----------------------------------------------------------------------------------


@cache
def _pristine(base: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval()


def hf_base(base: Path) -> torch.nn.Module:
    """The base by transformers; a copy, as PEFT changes the model it is given."""
    return copy.deepcopy(_pristine(base))


@torch.no_grad()
def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


@torch.no_grad()
def exact_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """The same in float64, to tell the libraries' float32 noise by. Changes the model."""
    for module in model.modules():
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation("eager")  # torch's grouped product lacks float64
    return model.double().eval()(torch.from_numpy(tokens)).logits.numpy()


@torch.no_grad()
def randomise_peft(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every trained tensor a value as if training had moved it a good way."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_A" in name:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        elif "lora_B" in name:
            parameter.copy_(0.05 * noise)
        elif "lora_magnitude" in name:
            parameter.mul_(1 + 0.1 * noise)
        elif parameter.requires_grad:  # biases, modules to save, token rows
            parameter.add_(0.1 * noise)


def save_peft(
    base: Path, folder: Path, config: PeftConfig, tokens: np.ndarray, name: str = "default"
) -> np.ndarray:
    """Build an adapter with stock PEFT, randomise it, save it, return its logits."""
    torch.manual_seed(0)
    model = get_peft_model(hf_base(base), config, adapter_name=name)
    randomise_peft(model)
    model.save_pretrained(folder)
    return torch_logits(model, tokens)


@contextmanager
def no_complaints() -> Iterator[None]:
    """PEFT only warns when tensors are missing or a pattern hits nothing: make that an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(item.message) for item in caught]
    telling = [text for text in texts if re.search(r"adapter|lora|key|pattern|config", text, re.I)]
    # PEFT looks for a pattern's modules only; it applies those of parameters all the same
    of_parameters = re.compile(r"_pattern keys did not match.*(mlp\.|experts\.|\.weight')", re.S)
    telling = [text for text in telling if not of_parameters.search(text)]
    # advice for merging; what is computed is what the tests compare
    telling = [text for text in telling if "`ensure_weight_tying` is not set" not in text]
    assert not telling, telling


def load_peft(base: Path, folder: Path, **options: Any) -> PeftModel:
    """Load with stock PEFT; a tensor PEFT passes over in silence is an error here."""
    with no_complaints():
        model = PeftModel.from_pretrained(hf_base(base), folder, **options).eval()
    used = get_peft_model_state_dict(model, save_embedding_layers=False)
    unused = {name for name in raw_tensors(folder / PEFT_WEIGHTS) if name not in used}
    assert not unused, f"PEFT ignores {sorted(unused)}"
    return model


def peft_logits(base: Path, folder: Path, tokens: np.ndarray) -> np.ndarray:
    return torch_logits(load_peft(base, folder), tokens)


def peft_modules(model: PeftModel) -> dict[str, torch.nn.Module]:
    """Every adapted module by its path in the base model."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if getattr(module, "lora_A", None) is not None and hasattr(module, "get_delta_weight")
    }


@torch.no_grad()
def peft_deltas(base: Path, folder: Path, strict: bool = True) -> Arrays:
    """Merged weight minus base weight of every module PEFT adapts (exact for DoRA as well)."""
    context = no_complaints() if strict else warnings.catch_warnings()
    with context:
        if not strict:
            warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(hf_base(base).double(), folder).eval().double()
    deltas = {}
    for name, module in peft_modules(model).items():
        before = module.get_base_layer().weight.detach().clone()
        module.merge()
        deltas[name] = (module.get_base_layer().weight - before).numpy()
    return deltas


# --- mlx-lm ---------------------------------------------------------------------------------


def mlx_base(base: Path) -> Any:
    model = load_model(base)[0]
    model.set_dtype(mx.float32)
    return model


def mlx_model(base: Path, folder: Path) -> Any:
    """Base and adapter, loaded with the stock loader, which refuses a tensor that doesn't fit."""
    model = load_adapters(mlx_base(base), str(folder))
    model.eval()
    return model


def mlx_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "lora_a" in module}


def mlx_run(model: Any, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def mlx_logits(base: Path, folder: Path | None, tokens: np.ndarray) -> np.ndarray:
    return mlx_run(mlx_model(base, folder) if folder else mlx_base(base), tokens)


def mlx_deltas(base: Path, folder: Path) -> Arrays:
    """Fused weight minus base weight of every module mlx-lm adapts, by mlx-lm's own fuse."""
    return {
        name: np.array(module.fuse().weight.astype(mx.float32), dtype=np.float64)
        - np.array(module.linear.weight.astype(mx.float32), dtype=np.float64)
        for name, module in mlx_modules(mlx_model(base, folder)).items()
    }


def mlx_name(peft_name: str) -> tuple[str, str]:
    """base_model.model.X.lora_A.weight -> (X, lora_a), and so on."""
    path, leaf = peft_name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rsplit(".", 1)
    return path, {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}[leaf]


def randomise_mlx(model: Any, seed: int = 5) -> None:
    generator = np.random.default_rng(seed)
    new = []
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = generator.standard_normal(value.shape).astype(np.float32)
        leaf = re.sub(r"\.\d+$", "", name).rsplit(".", 1)[-1]  # lists have an index behind
        if leaf == "lora_a":
            noise = noise / value.shape[0] ** 0.5
        elif leaf == "lora_b":
            noise = 0.05 * noise
        else:
            noise = np.array(value) * (1 + 0.1 * noise)
        new.append((name, mx.array(noise.astype(np.float32))))
    model.update(tree_unflatten(new))


def save_mlx(
    base: Path,
    folder: Path,
    tokens: np.ndarray,
    *,
    kind: str = "lora",
    num_layers: int = 16,
    keys: Sequence[str] | None = None,
    rank: int = 4,
    scale: float = 2.5,
) -> np.ndarray:
    """Train-and-save as `mlx_lm.lora` does, with random numbers in the place of training."""
    model = mlx_base(base)
    model.freeze()
    parameters: dict[str, Any] = {"rank": rank, "dropout": 0.0, "scale": scale}
    if keys is not None:
        parameters["keys"] = list(keys)
    linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    randomise_mlx(model)
    model.eval()
    folder.mkdir(parents=True)
    trained = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / MLX_WEIGHTS), trained)
    arguments = CONFIG_DEFAULTS | {
        "model": str(base),
        "train": True,
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "adapter_path": str(folder),
    }
    save_config(vars(types.SimpleNamespace(**arguments)), folder / CONFIG)
    return mlx_run(model, tokens)


def cast_mlx(folder: Path, dtype: Any) -> None:
    """Rewrite the folder's adapter tensors in this dtype."""
    path = str(folder / MLX_WEIGHTS)
    trained = {name: value.astype(dtype) for name, value in mx.load(path).items()}
    mx.save_safetensors(path, trained)


# --- comparisons ----------------------------------------------------------------------------


def assert_same_logits(
    found: np.ndarray,
    expected: np.ndarray,
    base: np.ndarray,
    model: Callable[[], torch.nn.Module] | None = None,
) -> None:
    """Equal to 1e-5 of the logits' size, and by far closer than the adapter moves them.

    Some architectures amplify float32's rounding beyond that, on some processors: ``model`` gives
    torch's adapted model, and then what it is itself off from float64 counts, four times.
    """
    difference = float(np.abs(found - expected).max())
    effect = float(np.abs(expected - base).max())
    size = max(1.0, float(np.abs(expected).max()))
    assert np.isfinite(found).all()
    bound = 1e-5 * size
    if difference > bound and model is not None:
        adapted = model()
        torchs = torch_logits(adapted, TOKENS)
        bound = 4 * float(np.abs(torchs - exact_logits(adapted, TOKENS)).max())
        assert bound <= 1e-3 * size
    assert difference <= bound, f"logits differ by {difference:.2e} (size {size:.1f})"
    assert effect >= 1000 * difference, f"effect {effect:.2e} against difference {difference:.2e}"
    assert effect > 0.02, f"the adapter does next to nothing: {effect:.2e}"


def assert_same_deltas(found: Arrays, expected: Arrays, tolerance: float = 2e-6) -> None:
    """The same modules, each moved by the same matrix; modules that don't move may be absent."""
    moved = {name for name, delta in expected.items() if np.abs(delta).max() > 0}
    assert moved, "the expected adapter moves nothing"
    assert {name for name, delta in found.items() if np.abs(delta).max() > 0} == moved
    for name in sorted(moved):
        size = float(np.abs(expected[name]).max())
        difference = float(np.abs(found[name] - expected[name]).max())
        assert difference <= tolerance * max(1.0, size), f"{name}: {difference:.2e} of {size:.2e}"


def changed_tensors(before: Path, after: Path) -> dict[str, str]:
    """Tensors that aren't the same bytes, dtype and shape in both files, and how they differ."""
    old, new = raw_tensors(before), raw_tensors(after)
    changed = dict.fromkeys(new.keys() - old.keys(), "added")
    changed |= dict.fromkeys(old.keys() - new.keys(), "gone")
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            changed[name] = f"{old[name][:2]} -> {new[name][:2]}"
    return changed


def ulps_apart(before: Path, after: Path, names: Iterable[str]) -> int:
    """The largest distance in float32 steps over these tensors."""
    old, new = _load_numpy(before), _load_numpy(after)
    worst = 0
    for name in names:
        assert old[name].dtype == new[name].dtype == np.float32, name
        steps = np.abs(_ordered(old[name]) - _ordered(new[name]))
        worst = max(worst, int(steps.max()))
    return worst


def _ordered(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the floats, one apart where the floats are neighbours."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def lora(targets: Sequence[str] | str, **options: Any) -> LoraConfig:
    """A LoraConfig for a causal model whose numbers differ from every default."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.05} | options
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
        **values,
    )


def variant(name: str, targets: Sequence[str]) -> LoraConfig:
    """One of the adapters every architecture is tried with.

    The patterns are full of traps: the first match wins although a later one is more specific,
    one key is an anchored regex, ranks and alphas match different sets of modules. The keys are
    in sorted order because PEFT sorts them when it saves: in any other order it would itself
    compute something else after loading.
    """
    first, last = targets[0], targets[-1]
    patterns = {
        "rank_pattern": {
            rf".*self_attn\.{first}": 5,
            rf"^model\.layers\.[12]\..*{last}": 7,
            f"layers.0.self_attn.{first}": 16,
        },
        "alpha_pattern": {
            rf".*layers.[01].*{last}": 3,
            rf".*self_attn.{first}": 13.5,
            last: 21,
            f"model.layers.1.self_attn.{first}": 80,
        },
    }
    options: dict[str, Any] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "patterns": patterns,
        "rslora-patterns": patterns | {"use_rslora": True},
        "dora-patterns": patterns | {"use_dora": True},
    }[name]
    return lora(targets, **options)
