"""Sound files with the wrong tensors in them: refused by the tensor's name.

Most of these are accepted by today's loaders without a word and change what the model computes:
tensors are dropped, cast from integers, taken for the base's, or overwritten by a namesake.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

Change = Callable[["Folder"], Any]
MODULE = r"layers\.0\.self_attn\.q_proj"
OTHER = r"self_attn\.v_proj"


@dataclass(frozen=True)
class Case:
    """One change of a valid folder, the kinds it applies to, and what the error must name."""

    id: str
    change: Change
    names: tuple[str, ...] = (MODULE,)
    kinds: str = "peft mlx"
    dora: bool = False
    inspect: str = "refuse"


def put(part: str, *shape: int, layer: int = 0, proj: str = "q_proj") -> Change:
    """Give one tensor another shape."""
    return lambda f: f.set(f.name(part, layer, proj), np.full(shape, 0.25))


def drop(part: str, proj: str = "q_proj") -> Change:
    """Leave one tensor out."""
    return lambda f: f.tensors.pop(f.name(part, 0, proj))


def raw(dtype: str, size: int) -> Change:
    """Store the first A under another dtype with as many bytes as its shape needs."""

    def change(folder: Folder) -> None:
        _, shape, _ = folder.tensors[folder.name("A")]
        folder.tensors[folder.name("A")] = (dtype, shape, bytes(int(np.prod(shape)) * size))

    return change


def configure(**fields: Any) -> Change:
    """Set config fields."""
    return lambda f: f.config.update(fields)


def both(*changes: Change) -> Change:
    """One change after the other."""
    return lambda f: [change(f) for change in changes]


def rename(old: str, new: str) -> Change:
    """Replace a piece of every tensor name."""

    def change(folder: Folder) -> None:
        folder.tensors = {k.replace(old, new): v for k, v in folder.tensors.items()}

    return change


def add(name: str, *shape: int) -> Change:
    """Add a tensor by its full name."""
    return lambda f: f.set(name, np.full(shape, 0.25))


def other_format_names(folder: Folder) -> None:
    """The tensors of the other format under this format's file name."""
    for name in list(folder.tensors):
        entry = folder.tensors.pop(name)
        if folder.kind == "peft":
            new = name.removeprefix("base_model.model.").removesuffix(".weight")
            folder.tensors[new.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = entry
        else:
            new = name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
            folder.tensors["base_model.model." + new] = entry


def turned(folder: Folder) -> None:
    """Every factor in the other format's orientation under this format's names."""
    for name, (dtype, shape, data) in folder.tensors.items():
        array = np.frombuffer(data, "<f4").reshape(shape).T
        folder.tensors[name] = (dtype, array.shape, array.tobytes())


def zero_rank(folder: Folder) -> None:
    """One module of rank zero."""
    for part, shape in (("A", (0, 12)), ("B", (20, 0))):
        folder.set(folder.name(part), np.zeros(shape if folder.kind == "peft" else shape[::-1]))


def rank_5(folder: Folder) -> None:
    """One module of rank 5, which the config doesn't say."""
    for part, size in (("A", 12), ("B", 20)):
        folder.set(folder.name(part), folder.factor(part, 5, size))


def collision(folder: Folder) -> None:
    """`.lora_A.weight` and `.lora_A.default.weight`: PEFT loads both into one place."""
    name = folder.name("A")
    folder.set(name.replace("lora_A.", "lora_A.default."), np.full((4, 12), 9.0))


def prefix_collision(folder: Folder) -> None:
    """The same module with and without the prefix."""
    folder.set(folder.name("A").removeprefix("base_model.model."), np.full((4, 12), 9.0))


def two_adapters(folder: Folder) -> None:
    """Tensors of an adapter called "default" and of one called "other"."""
    for name, entry in list(folder.tensors.items()):
        del folder.tensors[name]
        for label in ("default", "other"):
            for part in ("lora_A", "lora_B"):
                if part in name:
                    folder.tensors[name.replace(f"{part}.", f"{part}.{label}.")] = entry


PEFT_Q = "base_model.model.model.layers.0.self_attn.q_proj"
MLX_Q = "model.layers.0.self_attn.q_proj"
INTEGERS = {"I8": 1, "U8": 1, "BOOL": 1, "I16": 2, "I32": 4, "I64": 8, "U64": 8, "F64": 8,
            "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip

CASES = [
    *(Case(f"dtype_{name}", raw(name, size), (MODULE, name)) for name, size in INTEGERS.items()),
    Case("no_tensors", lambda f: f.tensors.clear(), ()),
    Case("zero_rank", zero_rank),
    Case("rank_differs_from_config", rank_5),
    Case("ranks_disagree", lambda f: f.set(f.name("B"), f.factor("B", 3, 20))),
    Case("ranks_disagree_A", lambda f: f.set(f.name("A"), f.factor("A", 6, 12))),
    Case("A_without_B", drop("B")),
    Case("B_without_A", drop("A")),
    Case("A_one_axis", put("A", 48)),
    Case("A_scalar", put("A")),
    Case("A_four_axes", put("A", 4, 12, 1, 1)),
    Case("B_three_axes", put("B", 20, 4, 1)),
    Case("A_transposed", lambda f: f.set(f.name("A"), f.factor("A", 4, 12).T)),
    Case("all_transposed", turned, (r"layers\.\d\.self_attn",)),
    Case("empty_input", lambda f: f.set(f.name("A"), f.factor("A", 4, 12)[:, :0]), kinds="peft"),
    Case("other_names", other_format_names, (r"layers\.\d\.self_attn",)),
    Case("magnitude_not_said", both(put("m", 20)), kinds="peft mlx"),
    Case("magnitude_missing", drop("m"), dora=True),
    Case("magnitude_all_missing", lambda f: [drop("m", p)(f) for p in ("q_proj", "v_proj")]
         + [f.tensors.pop(f.name("m", 1, p)) for p in ("q_proj", "v_proj")],
         (r"magnitude|\bm\b|dora",), dora=True),
    Case("magnitude_too_long", put("m", 21), dora=True),
    Case("magnitude_of_input", put("m", 12), dora=True),
    Case("magnitude_two_axes", put("m", 1, 20), dora=True),
    Case("magnitude_scalar", put("m"), dora=True),
    Case("extra_suffix", lambda f: f.set(f.name("A") + ".extra", np.zeros((4, 12)))),
    Case("unknown_part", lambda f: f.set(f.name("A").replace("lora_A", "lora_C")
         .replace("lora_a", "lora_c"), np.zeros((4, 12)))),
    Case("unknown_tensor", add("something.else", 3), (r"something\.else",)),
    Case("empty_name", add("", 3), ()),
    Case("optimizer_state", add("optimizer.state.0.exp_avg", 4, 12), ("optimizer",)),
    # PEFT only
    Case("no_prefix", rename("base_model.model.", ""), (r"layers\.\d\.self_attn",), "peft"),
    Case("half_prefix", rename("base_model.model.model.", "base_model."), ("base_model",), "peft"),
    Case("prefix_collision", prefix_collision, kinds="peft"),
    Case("collision", collision, kinds="peft"),
    Case("two_adapters", two_adapters, ("default|other",), "peft"),
    Case("stray_weight", add("base_model.model.model.layers.0.mlp.up_proj.weight", 6, 12),
         (r"mlp\.up_proj",), "peft"),
    Case("stray_norm", add("base_model.model.model.norm.weight", 12), (r"model\.norm",), "peft"),
    Case("stray_base_layer", add(f"{PEFT_Q}.base_layer.weight", 20, 12), ("base_layer",), "peft"),
    Case("stray_bias", add(f"{PEFT_Q}.base_layer.bias", 20), ("base_layer",), "peft"),
    Case("lora_bias_not_said", add(f"{PEFT_Q}.lora_B.bias", 20), (r"lora_B\.bias",), "peft"),
    Case("lora_bias_shape", both(configure(lora_bias=True), add(f"{PEFT_Q}.lora_B.bias", 12)),
         (MODULE,), "peft"),
    Case("targets_narrower", configure(target_modules=["q_proj"]), (OTHER,), "peft"),
    Case("targets_empty", configure(target_modules=[]), ("target_modules|self_attn",), "peft"),
    Case("targets_other", configure(target_modules=["k_proj"]), ("self_attn",), "peft"),
    Case("targets_no_dot", configure(target_modules=["_proj"]), ("self_attn",), "peft"),
    Case("targets_regex_narrower", configure(target_modules=r".*\.q_proj"), (OTHER,), "peft"),
    Case("targets_excluded", configure(exclude_modules=["v_proj"]), (OTHER,), "peft"),
    Case("layers_narrower", configure(layers_to_transform=[0]), (r"layers\.1\.",), "peft"),
    Case("layers_out_of_range", configure(layers_to_transform=[5]), (r"layers\.\d\.",), "peft"),
    Case("layers_int_narrower", configure(layers_to_transform=1), (r"layers\.0\.",), "peft"),
    Case("rank_pattern_differs", configure(rank_pattern={"q_proj": 8}), ("q_proj",), "peft"),
    Case("rank_pattern_prefixed", both(rank_5, configure(rank_pattern={PEFT_Q: 5})), (MODULE,),
         "peft"),
    # MLX only
    Case("peft_prefix", rename("model.layers", "base_model.model.model.layers"), ("base_model",),
         "mlx", inspect="any"),
    Case("stray_weight", add(f"{MLX_Q}.weight", 20, 12), (r"q_proj\.weight",), "mlx"),
    Case("stray_bias", add(f"{MLX_Q}.bias", 20), (r"q_proj\.bias",), "mlx"),
    Case("keys_narrower", lambda f: f.config["lora_parameters"].update(keys=["self_attn.q_proj"]),
         (OTHER,), "mlx"),
    Case("keys_bare", lambda f: f.config["lora_parameters"].update(keys=["q_proj", "v_proj"]),
         ("self_attn|keys",), "mlx"),
    Case("keys_empty", lambda f: f.config["lora_parameters"].update(keys=[]), ("self_attn|keys",),
         "mlx"),
    Case("num_layers_narrower", configure(num_layers=1), ("num_layers|layers",), "mlx"),
]  # fmt: skip
TABLE = [(kind, case) for case in CASES for kind in case.kinds.split()]


@pytest.mark.parametrize(("kind", "case"), TABLE, ids=[f"{c.id}-{k}" for k, c in TABLE])
def test_refused(kind: str, case: Case, kit: Kit, tmp_path: Any) -> None:
    """Both verbs refuse the folder, by file and by tensor (or the field that disagrees)."""
    folder = kit.build(kind, tmp_path / "src", dora=case.dora)
    case.change(folder)
    folder.save()
    where = rf"{folder.weights.name}|{folder.config_path.name}"
    kit.refuse_everywhere(folder, where, *case.names, inspect=case.inspect)


BAD = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("part", ["A", "B", "m"])
@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_not_finite(kind: str, part: str, dtype: str, kit: Kit, tmp_path: Any) -> None:
    """A single NaN or Inf: plain inspect doesn't read values, --stats names it, convert refuses."""
    for label, value in BAD.items():
        folder = kit.build(kind, tmp_path / label / "src", dora=part == "m", dtype=dtype)
        name = folder.name(part, 1, "v_proj")
        array = np.full(folder.tensors[name][1], 0.5, np.float32)
        array.flat[-1] = value
        folder.set(name, array, dtype)
        folder.save()
        assert kit.run("inspect", folder.path).tidy().code == 0
        where = (folder.weights.name, r"layers\.1\.self_attn\.v_proj")
        stats = kit.run("inspect", folder.path, "--stats").tidy()
        assert re.search(rf"NaN.*{where[1]}|{where[1]}.*NaN", stats.stdout + stats.stderr)
        kit.run("inspect", folder.path, "--stats", "--json").tidy().one_document()
        kit.convert_refused(folder, *where)


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_rounding_to_infinity(kind: str, kit: Kit, tmp_path: Any) -> None:
    """A value float16 can't hold is not written as Inf."""
    folder = kit.build(kind, tmp_path / "src")
    folder.set(folder.name("B"), folder.factor("B", 4, 20) * 1e6)
    folder.save()
    kit.convert_refused(folder, MODULE, options=("--dtype", "f16"))


@pytest.mark.parametrize("kind", ["peft", "mlx"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_control_group(kind: str, dora: bool, dtype: str, kit: Kit, tmp_path: Any) -> None:
    """The untouched folders of this table are accepted."""
    folder = kit.build(kind, tmp_path / "src", dora=dora, dtype=dtype).save()
    assert kit.run("inspect", folder.path, "--stats").tidy().code == 0
    outcome = kit.run("convert", folder.path, "--to", folder.target, "-o", tmp_path / "out").tidy()
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_valid_for_the_library(kind: str, kit: Kit, tmp_path: Any) -> None:
    """What these tests call valid is valid for the safetensors library too."""
    library = pytest.importorskip("safetensors.numpy")
    folder = kit.build(kind, tmp_path / "src", dora=True).save()
    tensors = library.load_file(folder.weights)
    assert {name: array.shape for name, array in tensors.items()} == {
        name: shape for name, (_, shape, _) in folder.tensors.items()
    }
