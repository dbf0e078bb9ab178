"""Names and strings of strangers never reach the terminal raw, nor break a line in two.

An escape sequence in a tensor's name can rewrite what the screen shows; a newline can forge a
second error line for a log parser; a lone surrogate makes print() itself crash.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

TEXTS = {
    "ansi": "\x1b[31mred\x1b[0m", "title": "\x1b]0;title\x07", "newline": "x\nerror: forged",
    "return": "x\rerror: forged", "backspace": "x\b\b\b", "c1": "\x9b31mred", "nul": "x\x00y",
    "bidi": "\u202eabc", "separator": "x\u2028error: forged", "surrogate": "\ud800",
    "megabyte": "x" * (1 << 20), "megabyte_ansi": "\x1b[2J" * (1 << 18), "markup": "[bold red]x[/]",
}  # fmt: skip


def in_new_tensor(folder: Folder, text: str) -> None:
    """A module of that name, with both its factors."""
    for part, size in (("A", 12), ("B", 20)):
        folder.set(folder.name(part, proj=text), folder.factor(part, 4, size))


def in_stray_tensor(folder: Folder, text: str) -> None:
    """A tensor of that name which belongs to nothing."""
    folder.set(text, np.zeros(3))


def in_target_modules(folder: Folder, text: str) -> None:
    """The list of modules."""
    place = folder.config if folder.kind == "peft" else folder.config["lora_parameters"]
    key = "target_modules" if folder.kind == "peft" else "keys"
    place[key] = [*place[key], text]


def in_field(name: str) -> Callable[[Folder, str], None]:
    """A config field's value."""
    return lambda folder, text: folder.config.update({name: text})


def in_field_name(folder: Folder, text: str) -> None:
    """The name of a config field that nobody knows."""
    folder.config[text] = 1


def in_field_values(folder: Folder, text: str) -> None:
    """Several values whose type is right."""
    folder.config.update(base_model_name_or_path=text, model=text, task_type=text, revision=text)


PLACES: dict[str, Callable[[Folder, str], None]] = {
    "module": in_new_tensor, "stray": in_stray_tensor, "targets": in_target_modules,
    "peft_type": in_field("peft_type"), "fine_tune_type": in_field("fine_tune_type"),
    "bias": in_field("bias"), "r": in_field("r"), "field": in_field_name,
    "values": in_field_values, "pattern": lambda f, text: f.config.update(rank_pattern={text: 4}),
    "regex": lambda f, text: f.config.update(target_modules=text),
}  # fmt: skip


def check(kit: Kit, *args: str | Path, flood: bool = False) -> None:
    """Any exit code is fine, raw or endless output is not."""
    outcome = kit.run(*args).tidy()
    lines = (outcome.stderr + "\n" + outcome.stdout).splitlines()
    assert not [line for line in lines if line.startswith("error: forged")]
    if outcome.code:
        outcome.error_line()
    if "--json" in args:
        outcome.one_document()
    elif flood:
        assert len(outcome.stdout) + len(outcome.stderr) < 100_000


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("place", PLACES)
def test_text(place: str, text: str, kit: Kit, tmp_path: Path) -> None:
    """Each hostile text in each place, in both formats, through every listing."""
    for kind in ("peft", "mlx"):
        folder = kit.build(kind, tmp_path / kind)
        PLACES[place](folder, TEXTS[text])
        folder.save()
        flood = "megabyte" in text
        for options in ((), ("--json",), ("--tensors", "--stats")):
            check(kit, "inspect", folder.path, *options, flood=flood)
        out = tmp_path / f"{kind}-out"
        check(kit, "convert", folder.path, "--to", folder.target, "-o", out, flood=flood)


@pytest.mark.parametrize("text", TEXTS)
def test_header_metadata(text: str, kit: Kit, tmp_path: Path) -> None:
    """Keys and values of the safetensors metadata."""
    folder = kit.build("peft", tmp_path / "src").save()
    folder.weights.write_bytes(kit.pack(folder.tensors, {TEXTS[text]: TEXTS[text]}))
    for options in ((), ("--json",), ("--tensors", "--stats")):
        check(kit, "inspect", folder.path, *options, flood="megabyte" in text)
    check(kit, "convert", folder.path, "--to", "mlx", "-o", tmp_path / "out")


FILE_NAMES = [name for name in TEXTS if not name.startswith(("megabyte", "nul", "surrogate"))]


@pytest.mark.parametrize("text", FILE_NAMES)
def test_file_names(text: str, kit: Kit, tmp_path: Path) -> None:
    """Folder and companion names, in good output and in errors."""
    folder = kit.build("peft", tmp_path / TEXTS[text].replace("/", "|")).save()
    (folder.path / f"LICENSE-{TEXTS[text].replace('/', '|')}").write_text("Do as you please.")
    check(kit, "inspect", folder.path)
    check(kit, "convert", folder.path, "--to", "mlx", "-o", tmp_path / f"out-{TEXTS[text][:1]}")
    folder.weights.write_bytes(b"")
    kit.run("inspect", folder.path).refused()
    kit.run("inspect", tmp_path / "absent" / folder.path.name).tidy()


def test_undecodable_file_names(kit: Kit, peft: Folder, tmp_path: Path) -> None:
    """A folder's name that is no UTF-8, and a companion's."""
    strange = os.fsencode(tmp_path) + b"/str\xffange"
    os.rename(peft.path, strange)
    with open(strange + b"/LICENSE\xfe", "w") as file:
        file.write("Do as you please.")
    folder = Path(os.fsdecode(strange))
    outcome = kit.run_process("inspect", folder).tidy()
    assert outcome.code == 0, outcome.stderr
    assert kit.run_process("convert", folder, "--to", "mlx", "-o", tmp_path / "out").tidy().code < 2


def test_ascii_terminal(kit: Kit, tmp_path: Path) -> None:
    """Names beyond ASCII on a terminal that has only ASCII."""
    folder = kit.build("peft", tmp_path / "模型")
    folder.config["base_model_name_or_path"] = "例/テスト"
    in_new_tensor(folder, "注意")
    folder.save()
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for options in ((), ("--json",), ("--tensors",)):
        kit.run_process("inspect", folder.path, *options, env=env).tidy()


def inspect_into(path: Path, out: Any) -> subprocess.Popen[bytes]:
    """`inspect --tensors` with its stdout given."""
    words = [sys.executable, "-m", "loraduct", "inspect", str(path), "--tensors"]
    return subprocess.Popen(words, stdout=out, stderr=subprocess.PIPE)


@pytest.fixture
def many(kit: Kit, tmp_path: Path) -> Path:
    """An adapter whose listing is longer than a pipe's buffer."""
    folder = kit.build("peft", tmp_path / "src")
    for layer in range(2000):
        for part, size in (("A", 12), ("B", 20)):
            folder.set(folder.name(part, layer), folder.factor(part, 4, size))
    folder.config["target_modules"] = ["q_proj", "v_proj"]
    path: Path = folder.save().path
    return path


def test_reader_goes_away(many: Path) -> None:
    """`inspect | head`: no traceback when the pipe closes early."""
    process = inspect_into(many, subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    complaint = process.stderr.read()
    process.wait(30)
    assert b"Traceback" not in complaint, complaint[-2000:]
    assert b"Exception ignored" not in complaint, complaint[-2000:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_stdout(many: Path) -> None:
    """Output that can't be written is no success."""
    with open("/dev/full", "wb") as full:
        process = inspect_into(many, full)
        _, complaint = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"Traceback" not in complaint, complaint[-2000:]


def test_json_is_plain_ascii_or_utf8(kit: Kit, tmp_path: Path) -> None:
    """--json carries a hostile name faithfully, escaped as JSON escapes it."""
    folder = kit.build("peft", tmp_path / "src")
    folder.config["base_model_name_or_path"] = TEXTS["ansi"]
    folder.save()
    outcome = kit.run("inspect", folder.path, "--json").tidy()
    document = outcome.one_document()
    assert document is not None
    assert json.dumps(TEXTS["ansi"]) in json.dumps(document)
