"""The proof must fail when it should: every check is shown a wrong adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose rope_theta matters, a PEFT adapter on it, and its MLX conversion."""
    import torch
    from click.testing import CliRunner
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from loraduct.cli import main

    here = tmp_path_factory.mktemp("validate")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(here / "base")
    peft = get_peft_model(
        model,
        LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    peft.save_pretrained(here / "peft")
    args = ["convert", here / "peft", "--to", "mlx", "-o", here / "mlx", "--base", here / "base"]
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.stderr
    return here


@pytest.fixture
def fixed(workshop: Path, cli: Cli, tmp_path: Path) -> Path:
    """The base with rope settings in both forms."""
    base = tmp_path / "base"
    shutil.copytree(workshop / "base", base)
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = 500.0
    (base / "config.json").write_text(json.dumps(config))
    return base


def document(result: Any) -> dict[str, Any]:
    """The JSON of a validation, its checks by name (the last of a name wins)."""
    value: dict[str, Any] = json.loads(result.stdout)
    return value | {"by": {c["name"]: c for c in value["checks"]}}


def changed(folder: Path, to: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an MLX folder with its tensors edited; other tools keep no record of ours."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapters.safetensors")
    edit(tensors)
    save_file(tensors, to / "adapters.safetensors", {"format": "mlx"})
    return to


def test_parity_of_a_conversion(workshop: Path, fixed: Path, cli: Cli) -> None:
    result = cli("validate", workshop / "peft", workshop / "mlx", "--base", fixed, "--json")
    assert result.exit_code == 0, result.stdout
    d = document(result)
    assert d["passed"]
    assert d["parity"]["max_difference"] < 1e-4 * d["parity"]["effect"]
    assert d["parity"]["effect"] > 0.05
    assert d["by"]["identity"]["status"] == "passed"
    assert {m["fits"] for m in d["parity"]["modules"]} == {True}
    assert len(d["parity"]["modules"]) == 6


def test_misread_base_is_named_and_fixed(workshop: Path, cli: Cli, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters only; mlx-lm's llama then runs with theta 10000."""
    base = tmp_path / "base"
    shutil.copytree(workshop / "base", base)
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_theta", None)
    (base / "config.json").write_text(json.dumps(config))
    args = ["validate", workshop / "peft", workshop / "mlx", "--base", base, "--json"]
    result = cli(*args)
    assert result.exit_code == 3
    failed = [c for c in json.loads(result.stdout)["checks"] if c["status"] == "failed"]
    assert [c["name"] for c in failed] == ["base"]
    assert "rope_theta=500.0" in failed[0]["detail"]
    assert cli(*args, "--fix-base-config").exit_code == 0
    fixed = json.loads((base / "config.json").read_text())
    assert fixed["rope_theta"] == 500.0
    assert fixed["rope_parameters"]["rope_theta"] == 500.0


@pytest.mark.parametrize("factor", [1.01, 0.5, -1.0])
def test_wrong_scale_names_the_guilty_module(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path, factor: float
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.lora_b"] *= factor

    wrong = changed(workshop / "mlx", tmp_path / "wrong", edit)
    result = cli("validate", workshop / "peft", wrong, "--base", fixed, "--json")
    assert result.exit_code == 3
    d = document(result)
    assert d["by"]["dW"]["status"] == "failed"
    assert d["by"]["dW"]["module"] == "model.layers.1.mlp.down_proj"
    off = next(m for m in d["parity"]["modules"] if not m["fits"])
    assert off["gain"] == pytest.approx(factor, rel=1e-6)
    assert off["error"] == pytest.approx(abs(factor - 1), rel=1e-5)


def test_wrong_layer_fails_in_the_logits_too(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        a, b = "model.layers.0.self_attn.q_proj.lora_a", "model.layers.2.self_attn.q_proj.lora_a"
        tensors[a], tensors[b] = tensors[b].copy(), tensors[a].copy()

    wrong = changed(workshop / "mlx", tmp_path / "wrong", edit)
    d = document(cli("validate", workshop / "peft", wrong, "--base", fixed, "--json"))
    assert d["by"]["logits"]["status"] == "failed"
    assert d["by"]["dW"]["module"] == "model.layers.0.self_attn.q_proj"


def test_a_proof_takes_the_file_as_it_is(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    """A fold that is wrong in the file must not be undone by the record that came with it."""
    wrong = tmp_path / "wrong"
    shutil.copytree(workshop / "mlx", wrong)
    weights = wrong / "adapters.safetensors"
    raw = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    values = np.frombuffer(raw, np.float32, offset=begin)
    values *= 2  # every tensor, header and record untouched
    weights.write_bytes(raw)
    result = cli("validate", workshop / "peft", wrong, "--base", fixed, "--json")
    assert result.exit_code == 3
    gains = [m["gain"] for m in document(result)["parity"]["modules"]]
    assert gains == pytest.approx([4.0] * 6, rel=1e-5)


def test_structure_against_another_base(
    workshop: Path, fixed: Path, cli: Cli, peft_folder: Callable[..., Path]
) -> None:
    assert cli("validate", workshop / "peft", "--base", fixed).exit_code == 0
    result = cli("validate", peft_folder(), "--base", fixed, "--json")
    assert result.exit_code == 3
    assert document(result)["by"]["shapes"]["status"] == "failed"


def test_recorded_base_is_recognised_in_another_dtype(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    """kin: a copy of the base in fewer bits is the base; random weights of the same shape are not, nor
    are weights that were moved a little.
    """
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    weights = load(fixed / "model.safetensors")
    for name, change, status in (
        ("copy", lambda t: t.to(torch.bfloat16), "passed"),
        ("half", lambda t: t.to(torch.float16), "passed"),
        ("twice", lambda t: t.to(torch.float16).to(torch.bfloat16), "passed"),
        (
            "moved",
            lambda t: t + torch.randn_like(t) * 0.03 * t.std() if t.ndim > 1 else t,
            "failed",
        ),
        ("stranger", lambda t: torch.randn_like(t) * 0.1, "failed"),
    ):
        base = tmp_path / name
        shutil.copytree(fixed, base)
        save(
            {k: change(v) for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"}
        )
        d = document(cli("validate", workshop / "mlx", "--base", base, "--json"))
        assert d["by"]["identity"]["status"] == status
        if name == "moved":
            assert "correlate 0.99" in d["by"]["identity"]["detail"]
            assert "another dtype explains" in d["by"]["identity"]["detail"]
    result = cli(
        "convert",
        workshop / "mlx",
        "--to",
        "peft",
        "-o",
        tmp_path / "o",
        "--base",
        tmp_path / "stranger",
    )
    assert result.exit_code == 1
    assert "not the base" in result.stderr
    again = ["convert", workshop / "mlx", "--to", "peft", "-o", tmp_path / "p"]
    assert cli(*again, "--base", tmp_path / "moved").exit_code == 0
    d = document(cli("validate", tmp_path / "p", "--base", tmp_path / "moved", "--json"))
    assert d["by"]["identity"]["status"] == "failed"  # the base it was recorded with first counts


def test_nan_is_named(workshop: Path, fixed: Path, cli: Cli, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.self_attn.q_proj.lora_b"][1, 3] = np.nan

    wrong = changed(workshop / "mlx", tmp_path / "wrong", edit)
    d = document(cli("validate", wrong, "--base", fixed, "--json"))
    assert not d["passed"]
    assert d["by"]["values"]["module"] == "model.layers.2.self_attn.q_proj.lora_b"


def test_prompts_file(workshop: Path, fixed: Path, cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\nplain two\n')
    d = document(
        cli(
            "validate",
            workshop / "peft",
            workshop / "mlx",
            "--base",
            fixed,
            "--prompts",
            prompts,
            "--json",
        )
    )
    assert d["parity"]["prompts"] == 2
    for text in ("", '{"text": "x"}\n', '{"prompt": 3}\n'):
        prompts.write_text(text)
        result = cli("validate", workshop / "peft", "--base", fixed, "--prompts", prompts)
        assert result.exit_code == 1
        assert "prompts.jsonl" in result.stderr


def edited(base: Path, to: Path, **fields: Any) -> Path:
    """A copy of the base with fields of its config changed."""
    shutil.copytree(base, to)
    config = json.loads((to / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_prompts_line_by_line(tmp_path: Path) -> None:
    """Lines are counted as an editor counts them; a brace alone doesn't make JSON of a text."""
    from loraduct.cli.prompts import prompts_of
    from loraduct.errors import Refused

    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("{name}, hello\n\nsecond\u2028half\r\n")
    assert prompts_of(plain) == ["{name}, hello", "second\u2028half"]
    plain.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert prompts_of(plain) == ["one", "two"]
    for bad in ("{broken", '{"text": "x"}', '{"prompt": 3}'):
        lines.write_text(f'{{"prompt": "one"}}\n\n\n{bad}\n')
        with pytest.raises(Refused, match="line 4 "):
            prompts_of(lines)


def test_calibration_texts_line_by_line(tmp_path: Path) -> None:
    """As prompts: JSON's texts may hold U+2028, which ends no line."""
    from loraduct.cli.calibration import pieces
    from loraduct.errors import Refused

    file = tmp_path / "t.jsonl"
    rows = [{"text": "first\u2028half"}, {"ids": [1, 2]}, {"prompt": "a", "completion": "b"}]
    file.write_text("\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    assert pieces(file) == (["first\u2028half", "a\nb"], [[1, 2]])
    file.write_text('{"text": "x"}\n\n{"text": 3}\n')
    with pytest.raises(Refused, match="line 3 "):
        pieces(file)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a positive integer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_odd_values_in_the_base_config_are_refused(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    base = edited(fixed, tmp_path / "odd", **fields)
    result = cli("validate", workshop / "mlx", workshop / "mlx", "--base", base)
    assert result.exit_code == 1, result.output
    assert f"{base / 'config.json'}: {said}" in result.stderr


def test_odd_bits_of_a_packed_base_are_refused(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    base = edited(fixed, tmp_path / "odd", quantization={"bits": "four", "group_size": 32})
    tensors = {
        n: t.astype(np.uint32) if t.ndim == 2 else t
        for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors")
    result = cli("validate", workshop / "mlx", "--base", base)
    assert result.exit_code == 1, result.output
    assert "config.json: quantization.bits is 'four', expected an integer" in result.stderr


def test_checks_say_whose_they_are_and_the_verdict_comes_last(
    workshop: Path, fixed: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraduct.validation.parity.lines", lambda parity: ["  greedy text"])
    words = ("validate", workshop / "peft", workshop / "mlx", "--base", fixed)
    result = cli(*words)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-1] == "passed; not run: quality, latency, swap"
    assert "  greedy text" in lines
    values = [line.split("values", 1)[1].split()[0] for line in lines if " values " in line]
    assert values == ["A:", "B:"]
    checks = json.loads(cli(*words, "--json").stdout)["checks"]
    owners = [(c["name"], c.get("adapter")) for c in checks]
    assert {o for o in owners if o[0] == "shapes"} == {("shapes", "A"), ("shapes", "B")}
    assert {o[1] for o in owners if o[0] in ("config", "base", "dW", "logits")} == {None}
    alone = document(cli("validate", workshop / "peft", "--base", fixed, "--json"))
    assert "adapter" not in alone["by"]["shapes"]


def test_a_base_without_weights(workshop: Path, fixed: Path, cli: Cli, tmp_path: Path) -> None:
    base = tmp_path / "bare"
    base.mkdir()
    shutil.copy(fixed / "config.json", base)
    result = cli("validate", workshop / "peft", "--base", base)
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-1]
    assert last.startswith("passed, but names and shapes were not compared: the base has no")
    result = cli("validate", workshop / "peft", workshop / "mlx", "--base", base)
    assert result.exit_code == 1
    assert f"{base}: holds no weights" in result.stderr


def test_rope_settings_that_contradict_each_other(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    base = edited(fixed, tmp_path / "torn", rope_theta=10000)
    before = (base / "config.json").read_bytes()
    args = ["validate", workshop / "peft", workshop / "mlx", "--base", base, "--json"]
    by = document(cli(*args))["by"]
    for name in ("config", "base"):
        assert "rope_theta=10000 and, in rope_parameters, 500.0" in by[name]["detail"]
    result = cli(*args, "--fix-base-config")
    assert result.exit_code == 1
    assert "rope_theta=10000 and, in rope_parameters, 500.0" in result.stderr
    assert (base / "config.json").read_bytes() == before


def test_both_forms_of_rope_scaling_are_no_contradiction() -> None:
    from loraduct.formats.base import misread_fields, rope_conflicts

    new = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
    old = {"type": "llama3", "factor": 8, "rope_type": "llama3"}
    config = {"rope_parameters": new, "rope_theta": 500000, "rope_scaling": old}
    assert not misread_fields(config)
    assert not rope_conflicts(config)
    for wrong in (old | {"factor": 4}, {"type": "linear", "factor": 8}):
        assert set(rope_conflicts(config | {"rope_scaling": wrong})) == {"rope_scaling"}
    assert set(misread_fields(config | {"rope_scaling": None})) == {"rope_scaling"}


def test_the_base_is_left_alone_when_the_adapter_is_refused(
    workshop: Path, cli: Cli, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(workshop / "base", base)
    before = (base / "config.json").read_bytes()
    result = cli("validate", tmp_path / "nosuch", "--base", base, "--fix-base-config")
    assert result.exit_code == 1
    assert (base / "config.json").read_bytes() == before


def test_an_error_of_the_name_map_names_its_file(
    workshop: Path, fixed: Path, cli: Cli, tmp_path: Path
) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"model.layers.{}.other": "model.layers.{}.other"}')
    result = cli("validate", workshop / "mlx", "--base", fixed, "--name-map", names, "--json")
    assert result.exit_code == 3
    assert document(result)["by"]["names"]["detail"].startswith(f"{names}: ")
