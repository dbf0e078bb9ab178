"""Broken adapter_config.json files: bad JSON, and every known field with a wrong type or value.

A config decides the scale of every number in the adapter: `true` for 1, a duplicate key of which
the last one wins, NaN, or a field of the wrong type must not be read as something plausible.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

CONFIG = r"adapter_config\.json"
MISSING: Any = ...


def edit(old: str, new: str) -> Any:
    """Replace the first occurrence of some config text."""
    return lambda text: text.replace(old.encode(), new.encode(), 1)


def constant(data: bytes) -> Any:
    """Something else altogether as the config."""
    return lambda _: data


def unknown(value: str) -> Any:
    """A field nobody knows, with this JSON text as its value."""
    return lambda text: b'{"surprise": ' + value.encode() + b"," + text.strip()[1:]


BYTES: list[tuple[str, Any]] = [
    ("empty", constant(b"")),
    ("blank", constant(b" \n ")),
    ("list", lambda text: b"[" + text + b"]"),
    ("empty_list", constant(b"[]")),
    ("empty_object", constant(b"{}")),
    ("string", constant(b'"lora"')),
    ("number", constant(b"8")),
    ("null", constant(b"null")),
    ("bom", lambda text: b"\xef\xbb\xbf" + text),
    ("utf16", lambda text: text.decode().encode("utf-16")),
    ("utf32", lambda text: text.decode().encode("utf-32-le")),
    ("latin1", lambda text: text.replace(b"tiny", b"t\xefny")),
    ("cut", lambda text: text[: len(text) // 2]),
    ("cut_last", lambda text: text.rstrip()[:-1]),
    ("text_behind", lambda text: text + b"x"),
    ("second_object", lambda text: text + text),
    ("trailing_comma", lambda text: text.rstrip()[:-1] + b",}"),
    ("comment", lambda text: b"// adapter\n" + text),
    ("single_quotes", lambda text: text.replace(b'"', b"'")),
    ("python_literal", lambda text: text.replace(b"true", b"True").replace(b"2", b"False")),
    ("control_character", edit("example/tiny", "example/\x01tiny")),
    ("bad_escape", edit("example/tiny", r"example\xtiny")),
    ("yaml", constant(b"r: 4\nlora_alpha: 8\n")),
    ("html", constant(b"<!DOCTYPE html><html></html>")),
    ("lfs", constant(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")),
    ("zeros", constant(bytes(512))),
    ("deep_arrays", unknown("[" * 5000 + "]" * 5000)),
    ("deep_objects", unknown('{"a":' * 5000 + "1" + "}" * 5000)),
    ("open_brackets", constant(b"[" * 200_000)),
    ("unknown_nan", unknown("NaN")),
    ("unknown_infinity", unknown("-Infinity")),
    ("unknown_1e999", unknown("1e999")),
    ("unknown_nested_nan", unknown('{"a": [1, {"b": NaN}]}')),
    ("unknown_6000_digits", unknown("9" * 6000)),
    ("duplicate_unknown", unknown('1, "surprise": 2')),
    ("duplicate_nested", unknown('{"a": {"b": 1, "b": 1}}')),
]  # fmt: skip

PEFT_BYTES: list[tuple[str, Any]] = [
    ("duplicate_alpha", edit('"lora_alpha": 8', '"lora_alpha": 8, "lora_alpha": 800')),
    ("duplicate_r", edit('"r": 4', '"r": 8, "r": 4')),
    ("duplicate_escaped", edit('"lora_alpha": 8', '"lora_alpha": 8, "lora_\\u0061lpha": 800')),
    ("duplicate_in_pattern", edit('"alpha_pattern": {}',
                                  '"alpha_pattern": {"q_proj": 8, "q_proj": 80}')),
    ("alpha_nan", edit('"lora_alpha": 8', '"lora_alpha": NaN')),
    ("alpha_infinity", edit('"lora_alpha": 8', '"lora_alpha": Infinity')),
    ("alpha_1e999", edit('"lora_alpha": 8', '"lora_alpha": 1e999')),
    ("mlx_config", constant(b'{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": '
                            b'{"rank": 4, "scale": 2.0, "dropout": 0.0}}')),
]  # fmt: skip

MLX_BYTES: list[tuple[str, Any]] = [
    ("duplicate_parameters", unknown('1, "lora_parameters": {"rank": 8, "scale": 9.0}')),
    ("duplicate_num_layers", edit('"num_layers": 2', '"num_layers": 2, "num_layers": 1')),
    ("duplicate_scale", edit('"scale": 2.0', '"scale": 2.0, "scale": 20.0')),
    ("scale_nan", edit('"scale": 2.0', '"scale": NaN')),
    ("scale_infinity", edit('"scale": 2.0', '"scale": Infinity')),
    ("scale_1e999", edit('"scale": 2.0', '"scale": 1e999')),
    ("peft_config", constant(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, '
                             b'"target_modules": ["q_proj", "v_proj"]}')),
]  # fmt: skip

PEFT_VALUES: dict[str, list[Any]] = {
    "r": ["4", True, 4.0, 4.5, 0, -1, 2**40, 2**70, None, [4], {}],
    "lora_alpha": ["x", "8", None, [8], True, {}, 1e308],
    "rank_pattern": [[], "x", 5, {"q_proj": "4"}, {"q_proj": 0}, {"q_proj": True},
                     {"q_proj": 4.0}, {"q_proj": -4}, {"q_proj": None}, {"q_proj": [4]}],
    "alpha_pattern": [[], "x", 5, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": True},
                      {"q_proj": [8]}],
    "target_modules": [5, {}, {"q_proj": 1}, True, [1], [None], [["q_proj"]]],
    "exclude_modules": [5, {}, True, [1], [None]],
    "use_rslora": ["yes", "false", 1, [], {}],
    "use_dora": ["yes", "false", 1, [], {}],
    "fan_in_fan_out": ["no", 1, []],
    "bias": ["frob", 5, [], True],
    "modules_to_save": ["norm", 5, [1], {}, True],
    "init_lora_weights": [5, [], {}],
    "layers_to_transform": ["0", 1.5, [True, False], [0.0, 1.0], ["0", "1"], {}, True],
    "layers_pattern": [5, {}, [1]],
    "layer_replication": ["x", 5, [[0]], [["0", "1"]]],
    "target_parameters": [5, "x", [1]],
    "trainable_token_indices": ["x", 1.5, ["0"], {"a": 1}],
    "lora_bias": ["yes", 1, []],
    "lora_dropout": ["x", [], {}, True],
    "peft_type": [MISSING, None, 5, [], {}, "lora", "Lora", "FROB", ""],
    "base_model_name_or_path": [5, [], {}, True],
}  # fmt: skip

MLX_VALUES: dict[str, list[Any]] = {
    "num_layers": [MISSING, "2", 2.0, 2.5, True, None, [2], {}],
    "lora_parameters": [MISSING, None, [], "x", 5, {}],
    "lora_parameters.rank": [MISSING, "4", True, 4.0, 4.5, 0, -1, 2**40, None, [4]],
    "lora_parameters.scale": [MISSING, "2", "x", True, None, [2.0], {}, 1e308],
    "lora_parameters.dropout": ["x", [], {}, True],
    "lora_parameters.keys": ["self_attn.q_proj", 5, {}, True, [1], [None], [["self_attn.q_proj"]]],
    "fine_tune_type": ["frob", "LORA", 5, None, [], {}, ""],
}  # fmt: skip

# Understood, and what it does to the numbers can't be said in the other format (or not from these
# files alone): the conversion is refused; inspect may describe such an adapter.
UNCARRIED: dict[str, list[Any]] = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "frob"],
    "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{"a": 1}],
    "layer_replication": [[[0, 2], [1, 2]]],
}

OTHER_KINDS = [
    "IA3", "LOHA", "LOKR", "VERA", "ADALORA", "OFT", "BOFT", "HRA", "VBLORA", "FOURIERFT", "XLORA",
    "POLY", "RANDLORA", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING",
    "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "CPT", "SHIRA", "ROAD", "MISS", "C3A",
]  # fmt: skip

REGEXES: dict[str, list[Any]] = {
    "target_modules": ["(", "[", "*", "(?P<a>x)(?P<a>y)", "(?<=a+)b", "(" * 3000 + ")" * 3000],
    "exclude_modules": ["(", "(" * 3000 + ")" * 3000],
    "rank_pattern": [{"(": 4}, {"q_proj)": 4}, {"[": 4}, {"(" * 3000 + ")" * 3000: 4}],
    "alpha_pattern": [{"(": 4}, {"a{99999999999}": 4}, {"\\": 4}],
}


def rows(table: dict[str, list[Any]]) -> list[Any]:
    """One pytest parameter per field and value."""
    return [
        pytest.param(field, value, id=f"{field}-{'missing' if value is ... else repr(value)[:24]}")
        for field, values in table.items()
        for value in values
    ]


def put(folder: Folder, field: str, value: Any) -> None:
    """Set (or remove) a field, which may be given as PARENT.CHILD, and save."""
    *parents, leaf = field.split(".")
    place = folder.config[parents[0]] if parents else folder.config
    if value is MISSING:
        place.pop(leaf)
    else:
        place[leaf] = value
    folder.save()


def check_bytes(folder: Folder, kit: Kit, rewrite: Any) -> None:
    """Rewrite the config file's bytes; both verbs refuse it by its name."""
    before = folder.config_path.read_bytes()
    after = rewrite(before)
    assert after != before, "the case changes nothing"
    folder.config_path.write_bytes(after)
    kit.refuse_everywhere(folder, CONFIG)


@pytest.mark.parametrize("rewrite", [pytest.param(row[1], id=row[0]) for row in BYTES])
def test_bad_json(rewrite: Any, adapter: Folder, kit: Kit) -> None:
    """What is not one strict JSON object in UTF-8 is refused, whatever stands in it."""
    check_bytes(adapter, kit, rewrite)


@pytest.mark.parametrize("rewrite", [pytest.param(row[1], id=row[0]) for row in PEFT_BYTES])
def test_bad_peft_json(rewrite: Any, peft: Folder, kit: Kit) -> None:
    """Duplicates and non-finite numbers in the fields that scale a PEFT adapter."""
    check_bytes(peft, kit, rewrite)


@pytest.mark.parametrize("rewrite", [pytest.param(row[1], id=row[0]) for row in MLX_BYTES])
def test_bad_mlx_json(rewrite: Any, mlx: Folder, kit: Kit) -> None:
    """Duplicates and non-finite numbers in the fields that scale an MLX adapter."""
    check_bytes(mlx, kit, rewrite)


@pytest.mark.parametrize(("field", "value"), rows(PEFT_VALUES))
def test_peft_field(field: str, value: Any, peft: Folder, kit: Kit) -> None:
    """A known PEFT field with a wrong value is refused by its name."""
    put(peft, field, value)
    kit.refuse_everywhere(peft, CONFIG, rf"\b{field}\b")


@pytest.mark.parametrize(("field", "value"), rows(MLX_VALUES))
def test_mlx_field(field: str, value: Any, mlx: Folder, kit: Kit) -> None:
    """A known MLX field with a wrong value is refused by its name."""
    put(mlx, field, value)
    kit.refuse_everywhere(mlx, CONFIG, rf"\b{field.rsplit('.')[-1]}\b")


@pytest.mark.parametrize(("field", "value"), rows(UNCARRIED))
def test_uncarried_peft_field(field: str, value: Any, peft: Folder, kit: Kit) -> None:
    """A variant that the other format can't say is never converted as if it were plain LoRA."""
    put(peft, field, value)
    kit.refuse_everywhere(peft, rf"\b{field}\b", inspect="any")


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_peft_kind(name: str, peft: Folder, kit: Kit) -> None:
    """Another tuner's folder is refused naming the kind, though its tensors look like LoRA."""
    put(peft, "peft_type", name)
    kit.refuse_everywhere(peft, rf"\b{name}\b", inspect="any")


def test_full_fine_tune(mlx: Folder, kit: Kit) -> None:
    """fine_tune_type "full" over LoRA tensors is no adapter."""
    put(mlx, "fine_tune_type", "full")
    kit.refuse_everywhere(mlx, "full", inspect="any")


@pytest.mark.parametrize("value", [MISSING, 8])
def test_rank_differs(value: Any, adapter: Folder, kit: Kit) -> None:
    """A rank (PEFT's default is 8) that the tensors don't have: both numbers are told."""
    if adapter.kind == "mlx" and value is MISSING:
        pytest.skip("covered by the fields' table")
    put(adapter, "r" if adapter.kind == "peft" else "lora_parameters.rank", value)
    kit.refuse_everywhere(
        adapter, r"safetensors|adapter_config\.json", r"\b8\b", r"\b4\b", "config"
    )


def test_mlx_alpha_hint(mlx: Folder, kit: Kit) -> None:
    """Files that say alpha and not scale: the message points out that scale is what counts."""
    mlx.config["lora_parameters"]["alpha"] = 8
    put(mlx, "lora_parameters.scale", MISSING)
    kit.refuse_everywhere(mlx, CONFIG, "scale", "alpha")


@pytest.mark.parametrize(("field", "value"), rows(REGEXES))
def test_invalid_regex(field: str, value: Any, peft: Folder, kit: Kit) -> None:
    """Patterns that are no regular expressions, or too deep for Python's compiler."""
    put(peft, field, value)
    kit.refuse_everywhere(peft, CONFIG, rf"\b{field}\b")


BOMB = r"(a+)+b"
BOMBS = {
    "target_modules": [rf"model\.layers\.\d\.self_attn\.{BOMB}", r"(.*.*.*.*)*x", r"(\w|\w|\.)*!"],
    "exclude_modules": [rf".*\.{BOMB}", r"(.*.*.*.*)*x"],
    "rank_pattern": [{BOMB: 4}, {r"(.*.*.*.*)*x": 4}, {r"(\w|\w|\.)*!": 4}],
    "alpha_pattern": [{BOMB: 8}],
    "layers_pattern": [[BOMB], BOMB],
}


@pytest.mark.parametrize(("field", "value"), rows(BOMBS))
def test_regex_bomb(
    field: str, value: Any, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern that backtracks for ever over long names ends in time, with a clear line."""
    folder = kit.build("peft", tmp_path / "src")
    monkeypatch.setattr("loraduct.patterns.SECONDS", 0.3)  # else each case waits the full time
    folder.tensors = {k.replace("q_proj", "a" * 60): v for k, v in folder.tensors.items()}
    folder.config.update(target_modules=["a" * 60, "v_proj"], layers_to_transform=[0, 1])
    put(folder, field, value)
    for args in (("inspect",), ("convert", "--to", "peft", "-o", tmp_path / "out")):
        outcome = kit.run(args[0], folder.path, *args[1:]).tidy()
        if outcome.code:
            outcome.refused(CONFIG, rf"\b{field}\b")
        assert outcome.code == 1 or field != "target_modules"
        assert (tmp_path / "out").exists() == (outcome.code == 0 and args[0] == "convert")


def test_regex_bomb_as_a_process(kit: Kit, peft: Folder) -> None:
    """The same where the product is a process of its own."""
    folder = peft
    folder.tensors = {k.replace("q_proj", "a" * 60): v for k, v in folder.tensors.items()}
    put(folder, "target_modules", rf".*\.{BOMB}")
    kit.run_process("inspect", folder.path, limit=20).refused(CONFIG, "target_modules")


def test_many_patterns(kit: Kit, peft: Folder) -> None:
    """Twenty thousand patterns: matched or refused, but in time."""
    patterns = {f"layers.{n}.self_attn.k_pro[jk]{n}": 4 for n in range(20_000)}
    put(peft, "rank_pattern", patterns)
    outcome = kit.run("inspect", peft.path).tidy()
    assert outcome.code in (0, 1)


HARMLESS_PEFT: dict[str, Any] = {
    "lora_alpha": 8.0, "surprise": [1, {"a": None}], "rank_pattern": {"nothing": 9},
    "target_modules": r".*\.(q|v)_proj", "base_model_name_or_path": None, "task_type": None,
    "exclude_modules": ["k_proj"], "layers_to_transform": [0, 1, 5], "init_lora_weights": "gaussian",
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), HARMLESS_PEFT.items(), ids=HARMLESS_PEFT)
def test_accepted(field: str, value: Any, peft: Folder, kit: Kit, tmp_path: Path) -> None:
    """The control group: odd but meaningful values are read and converted."""
    put(peft, field, value)
    assert kit.run("inspect", peft.path).tidy().code == 0
    outcome = kit.run("convert", peft.path, "--to", "mlx", "-o", tmp_path / "out").tidy()
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("layers", [2, 0, -1, 16])
def test_accepted_num_layers(layers: int, mlx: Folder, kit: Kit, tmp_path: Path) -> None:
    """mlx-lm takes 0, negative and large numbers as all blocks."""
    put(mlx, "num_layers", layers)
    outcome = kit.run("convert", mlx.path, "--to", "peft", "-o", tmp_path / "out").tidy()
    assert outcome.code == 0, outcome.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2.0
