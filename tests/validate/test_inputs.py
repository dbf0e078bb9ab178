"""What is refused before anything runs: odd prompts and texts, and outputs that would overwrite inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import read

Cli = Callable[..., Any]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No suite may begin."""

    def run(*_: Any) -> None:
        raise AssertionError("suites were run")

    monkeypatch.setattr("loraduct.validation.suites.run", run)


def refused(result: Any) -> str:
    """The one line."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beside", "nosuch"], "nosuch"),
        (["--markdown", "{tmp}/link"], "--markdown can't be written: it is a link"),
        (["--junit", "/dev/full"], "--junit can't be written: it is a folder or a device"),
        (["--junit", "{tmp}/x", "--markdown", "{tmp}/x"], "--markdown can't be written: --junit goes there"),
        (["--html", "{tmp}/y/../x", "--junit", "{tmp}/x"], "goes there, too"),
        (["--markdown", "{a}/adapter_config.json"], "--markdown can't be written: it is a file in"),
        (["--markdown", "{a}/new.md"], "which is read"),
        (["--html", "{base}/config.json"], "which is read"),
        (["--text", "{tmp}/t.jsonl", "--junit", "{tmp}/t.jsonl"], "it is a file that is read"),
        (["--prompts", "{tmp}/p", "--junit", "{tmp}/p"], "it is a file that is read"),
        (["--config", "{tmp}/c.toml", "--junit", "{tmp}/c.toml"], "it is a file that is read"),
        (["--text", "{tmp}/short.txt"], "none is left to score"),
        (["--prompts", "{tmp}/long"], "prompt 1 has 90 tokens"),
    ],
)  # fmt: skip
def test_before_anything_runs(
    world: Any, cli: Cli, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "y").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "t.jsonl").write_text('{"text": "the old river"}\n')
    (tmp_path / "p").write_text("the old\n")
    (tmp_path / "long").write_text("x" * 90)
    (tmp_path / "c.toml").write_text("[validate]\n")
    (tmp_path / "short.txt").write_text("x")
    adapter = shutil.copytree(world.peft, tmp_path / "a")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    filled = [w.format(tmp=tmp_path, a=adapter, base=world.base) for w in words]
    assert said in refused(cli("validate", adapter, "--base", world.base, *filled))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_beside_an_adapter_that_is_one_file(world: Any, cli: Cli, tmp_path: Path) -> None:
    """The folder of A's folder is nobody's; of a file, the config beside it is read, too."""
    adapter = shutil.copytree(world.peft, tmp_path / "a")
    words = ("--base", world.base, "--suite", "size")
    assert cli("validate", adapter, *words, "--markdown", tmp_path / "r.md").exit_code == 0
    assert (tmp_path / "r.md").read_text().startswith("### ")
    file = adapter / "adapter_model.safetensors"
    assert cli("validate", file, *words, "--markdown", adapter / "r.md").exit_code == 0
    refused(cli("validate", file, *words, "--markdown", adapter / "adapter_config.json"))


def test_the_verdict_stands_before_anything_is_written(
    world: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loraduct.files.write_file", full)
    words = ("validate", world.peft, "--base", world.base, "--suite", "size")
    result = cli(*words, "--junit", tmp_path / "r.xml")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("passed; not run: ")
    assert "can't be written" in result.stderr


@pytest.mark.parametrize("row", ['{"prompt": ""}', '{"prompt": " \\n"}'])
def test_an_empty_prompt(world: Any, cli: Cli, tmp_path: Path, row: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "one"}}\n{row}\n')
    said = refused(cli("validate", world.peft, "--base", world.base, "--prompts", file))
    assert f"{file}: line 2 has an empty prompt" in said


def test_a_prompt_of_no_tokens(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 is not the user's; our own prompts need not suit every tokenizer."""
    from loraduct.errors import Refused
    from loraduct.formats import base
    from loraduct.validation import runtimes

    monkeypatch.setattr(runtimes, "tokenized", lambda _, texts: ([[] for _ in texts], None))
    folder = base.read(world.base)
    with pytest.raises(Refused, match="no token of the prompt '☃'"):
        runtimes.tokenize(folder, ["☃"])
    assert runtimes.tokenize(folder, runtimes.PROMPTS[:2])[0] == [[0], [0]]


def test_half_a_character(world: Any, cli: Cli, tmp_path: Path) -> None:
    for option, key in (("--text", "text"), ("--prompts", "prompt")):
        file = tmp_path / f"{key}.jsonl"
        file.write_text(f'{{"{key}": "fine \\ud83d\\ude00"}}\n{{"{key}": "\\ud800 x"}}\n')
        said = refused(cli("validate", world.peft, "--base", world.base, option, file))
        assert f"{file}: line 2 has half of a character" in said


def test_files_are_told_by_their_ending_in_any_case(tmp_path: Path) -> None:
    from loraduct.cli.prompts import prompts_of
    from loraduct.errors import Refused
    from loraduct.validation import texts

    rows = '{"text": "one"}\n{"text": "two"}\n'
    for name in ("t.JSONL", "t.json", "bom.jsonl"):
        file = tmp_path / name
        file.write_text(rows, "utf-8-sig" if name == "bom.jsonl" else "utf-8")
        assert [r["text"] for r in texts.objects(file)] == ["one", "two"]
    for content in (json.dumps([{"text": "one"}]), json.dumps({"text": "one"}, indent=1)):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(Refused, match=r"expected \.jsonl, an object a line"):
            texts.objects(tmp_path / "t.json")
    plain = tmp_path / "t.txt"
    plain.write_text('{"a": 1}\n', "utf-8-sig")
    assert texts.objects(plain) == [{"text": '{"a": 1}'}]
    prompts = tmp_path / "p.JSONL"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n', "utf-8-sig")
    assert prompts_of(prompts) == ["one", "two"]


def test_a_blank_line_may_hold_blanks(tmp_path: Path) -> None:
    from loraduct.validation import texts

    file = tmp_path / "t.txt"
    file.write_text("one\nstill\n  \t\ntwo\r\n \r\n\r\nthree\n\n\n")
    assert [r["text"] for r in texts.objects(file)] == ["one\nstill", "two", "three"]


def test_texts_and_prompts_stand_in_the_document(world: Any, cli: Cli, tmp_path: Path) -> None:
    """With the hashes that sha256sum prints."""
    from hashlib import sha256

    prompts = tmp_path / "p.txt"
    prompts.write_text("the old\n")
    words = (
        "validate",
        world.peft,
        "--base",
        world.base,
        "--text",
        world.text,
        "--prompts",
        prompts,
    )
    inputs = read(cli(*words, "--json"))["inputs"]
    for key, file in (("text", world.text), ("prompts", prompts)):
        assert inputs[key] == {"path": str(file), "sha256": sha256(file.read_bytes()).hexdigest()}
    words = ("validate", world.peft, "--base", world.base, "--suite", "size", "--json")
    inputs = read(cli(*words))["inputs"]
    assert inputs["text"] is inputs["prompts"] is None


def test_a_page_in_no_folder(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "no" / "x.html"
    said = refused(cli("report", tmp_path / "x.json", "-o", page))
    assert f"{page}: the page can't be written: its folder does not exist" in said
