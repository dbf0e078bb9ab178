"""`validate`, whole: suites, gates, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import edited, failed, read

Cli = Callable[..., Any]


def weaker(world: Any, to: Path, factor: float) -> Path:
    """B with the update of every module scaled."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] * (factor if "lora_b" in name else 1)

    return edited(world.mlx, to, edit)


def losses(base: Path, adapter: Path | None, ids: list[list[int]]) -> list[Any]:
    """Each token's loss after the first, by torch's own cross entropy on the stock models."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    found = []
    with torch.no_grad():
        for one in ids:
            row = torch.tensor([one])
            logits = model(row).logits[0, :-1]
            found.append(
                torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").numpy()
            )
    return found


def test_every_suite_is_named_and_what_did_not_run_has_a_reason(world: Any, cli: Cli) -> None:
    d = read(cli("validate", world.peft, world.mlx, "--base", world.base, "--json"))
    assert d["schema"] == 2
    assert d["passed"]
    ran = {"structure", "base", "parity", "size"}
    assert {s["name"] for s in d["suites"] if s["status"] == "passed"} == ran
    left = [s for s in d["suites"] if s["status"] == "skipped"]
    assert [s["name"] for s in left] == ["quality", "latency", "swap"]
    assert all(s["reason"] for s in left)
    assert d["verdict"] == "passed; not run: quality, latency, swap"
    assert d["inputs"]["a"]["format"] == "peft"
    assert len(d["inputs"]["b"]["sha256"]) == 64
    wanted = {"tool", "command", "created", "thresholds", "environment"}
    assert wanted <= d.keys()
    modules = d["by"]["parity"]["numbers"]["modules"]
    assert len(modules) == 6
    assert {m["kind"] for m in modules} == {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}
    assert all(m["rank"] == 4 and m["cosine"] == pytest.approx(1) for m in modules)
    n = d["by"]["parity"]["numbers"]
    assert max(n["per_position"]) == n["max_difference"]
    assert max(max(row) for row in n["per_prompt"]) == n["max_difference"]


def test_only_what_is_asked_for_runs(world: Any, cli: Cli) -> None:
    d = read(cli("validate", world.peft, "--base", world.base, "--suite", "size", "--json"))
    assert [s["name"] for s in d["suites"] if s["status"] == "passed"] == ["size"]
    files = [world.peft / n for n in ("adapter_model.safetensors", "adapter_config.json")]
    assert d["by"]["size"]["numbers"]["bytes"] == sum(f.stat().st_size for f in files)
    account = d["by"]["size"]["numbers"]["account"]
    assert sum(r["values"] for r in account) == 2 * 4 * ((64 + 64) + (64 + 32) + (96 + 64))


@pytest.mark.parametrize("suite", ["quality", "parity"])
def test_a_suite_asked_for_by_name_that_cant_run_has_failed(
    world: Any, cli: Cli, suite: str
) -> None:
    result = cli("validate", world.peft, "--base", world.base, "--suite", suite, "--json")
    assert result.exit_code == 3
    assert read(result)["verdict"] == f"FAILED: {suite}"
    unasked = read(cli("validate", world.peft, "--base", world.base, "--json"))
    assert unasked["passed"]
    assert unasked["by"][suite]["status"] == "skipped"


def test_quality_is_what_torch_says(world: Any, cli: Cli) -> None:
    words = ("validate", world.peft, world.mlx, "--base", world.base)
    more = ("--text", world.text, "--text-tokens", 4096)
    d = read(cli(*words, "--suite", "quality", *more, "--json"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    ids = [tokenizer(json.loads(r)["text"])["input_ids"] for r in world.text.open()]
    bare, tuned = (np.concatenate(losses(world.base, a, ids)) for a in (None, world.peft))
    n = d["by"]["quality"]["numbers"]
    assert n["tokens"] == len(bare)
    assert n["perplexities"]["base"] == pytest.approx(np.exp(bare.mean()), rel=1e-4)
    assert n["perplexities"]["source"] == pytest.approx(np.exp(tuned.mean()), rel=1e-4)
    assert n["gain"]["value"] == pytest.approx((bare - tuned).mean(), rel=1e-4)
    assert n["gain_kept"]["value"] == pytest.approx(1, abs=1e-4)
    assert n["gain_kept"]["low"] <= n["gain_kept"]["value"] <= n["gain_kept"]["high"]
    assert n["greedy_agreement"] == 1.0


def test_a_weaker_result_fails_the_gate(world: Any, cli: Cli, tmp_path: Path) -> None:
    half = weaker(world, tmp_path / "half", 0.5)
    words = ("validate", world.peft, half, "--base", world.base, "--suite", "quality")
    result = cli(*words, "--text", world.text, "--json")
    assert result.exit_code == 3
    d = read(result)
    assert d["by"]["quality"]["numbers"]["gain_kept"]["value"] < 0.9
    assert any("min-gain-kept 0.95" in c["detail"] for c in failed(d))
    low = d["by"]["quality"]["numbers"]["gain_kept"]["low"] - 0.01
    gates = ("--min-gain-kept", low, "--min-greedy-agreement", 0.1)
    assert cli(*words, "--text", world.text, *gates).exit_code == 0


def test_a_gain_that_is_none_is_no_gain_kept(world: Any, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "t.jsonl"
    rng = np.random.default_rng(0)
    rows = ["".join(map(chr, rng.integers(33, 126, 40))) for _ in range(8)]
    text.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--text", text, "--json")
    d = read(cli(*words, "--suite", "quality"))
    assert "can't be told" in d["verdict"]
    assert "gain_kept" not in d["by"]["quality"]["numbers"]
    strict = cli(*words, "--suite", "quality", "--min-gain-kept", "0.5")
    assert strict.exit_code == 3


def test_no_seed_flips_the_verdict() -> None:
    """Texts of very different gains: the ends of the interval move by less than a hundredth."""
    from loraduct.validation.quality import intervals

    rng = np.random.default_rng(5)
    base = rng.uniform(50, 150, 24)
    source = base - rng.gamma(2.0, 8.0, 24)
    result = base - (base - source) * rng.normal(0.97, 0.08, 24)
    ends = []
    for seed in range(12):
        _, kept = intervals(base, source, result, seed)
        assert kept is not None
        ends.append((kept["low"], kept["high"]))
    low, high = np.array(ends).T
    assert np.ptp(low) < 0.01
    assert np.ptp(high) < 0.01
    gain, kept = intervals(base, source, base - 0.5 * (base - source))
    assert kept is not None
    assert [kept[k] for k in ("value", "low", "high")] == pytest.approx([0.5] * 3)
    assert gain["value"] == pytest.approx((base - source).sum())


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of many samples of texts, about 95 % of the intervals hold the true share."""
    from loraduct.validation.quality import intervals

    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        gains = rng.gamma(4.0, 5.0, 60)
        kept = gains * 0.9 + rng.normal(0, 2, 60)
        _, found = intervals(gains, np.zeros(60), gains - kept)
        assert found is not None
        hits += found["low"] <= 0.9 <= found["high"]
    assert 0.88 <= hits / 120 <= 1.0


def test_loss_counts_on_answers_alone(world: Any, cli: Cli, tmp_path: Path) -> None:
    """Chat through the template, and prompt with completion, which is the same chat."""
    text = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "the tall"}, {"role": "assistant", "content": "trees"}]
    text.write_text(
        json.dumps({"messages": turns}) + "\n"
        + json.dumps({"prompt": "the tall", "completion": "trees"}) + "\n"
    )  # fmt: skip
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--suite", "quality")
    n = read(cli(*words, "--text", text, "--json"))["by"]["quality"]["numbers"]
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(world.base)("<u>the tall\n<a>trees\n")["input_ids"]
    scored = losses(world.base, None, [ids])[0][-6:]  # "trees" and the newline, a byte each
    assert n["tokens"] == 12
    for row in n["texts"]:
        assert row["base"] == pytest.approx(np.exp(scored.mean()), rel=1e-4)


def test_long_texts_are_cut_and_said(world: Any, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(["the old river by the trees " * 6, "short one here", "x" * 20]))
    words = ("validate", world.peft, "--base", world.base, "--suite", "quality", "--text", text)
    d = read(cli(*words, "--json"))
    said = [c["detail"] for c in d["by"]["quality"]["checks"] if c["name"] == "text"]
    assert said == ["1 of 3 texts were cut to 96 tokens, the most that is run"]
    assert d["by"]["quality"]["numbers"]["tokens"] == 95 + 13 + 19
    d = read(cli(*words, "--text-tokens", 100, "--json"))
    said = [c["detail"] for c in d["by"]["quality"]["checks"] if c["name"] == "text"]
    assert said[-1] == "the first 2 of 3 texts were used (--text-tokens 100)"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", "", "holds no text"),
        ("t.txt", "\n\n \n", "holds no text"),
        ("t.jsonl", '{"text": ""}', "line 1 has an empty text"),
        ("t.jsonl", '{"prompt": "a"}', "line 1 is not an object with text"),
        ("t.jsonl", '{"text": "fine"}\n[1]', "line 2 is not a JSON object"),
        ("t.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "the last one the assistant's"),
        ("t.jsonl", '{"prompt": "' + "x" * 200 + '", "completion": "y"}', "none is left to score"),
        ("t.txt", "x", "none is left to score"),
    ],
)  # fmt: skip
def test_bad_texts_are_refused(
    world: Any, cli: Cli, tmp_path: Path, name: str, content: str, said: str
) -> None:
    text = tmp_path / name
    text.write_text(content)
    result = cli("validate", world.peft, "--base", world.base, "--text", text)
    assert result.exit_code == 1, result.output
    assert f"{text}: " in result.stderr
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_prompts_beyond_the_context_are_refused(world: Any, cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("short\n" + "x" * 90 + "\n")
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--prompts", prompts)
    result = cli(*words)
    assert result.exit_code == 1
    assert f"{prompts}: prompt 2 has 90 tokens, and the context is 96" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tolerance", "5%"], "tolerance says how far behind regress-from"),
        (["--suite", "size", "--min-gain-kept", "0.9"], "needs the suite quality"),
        (["--max-size", "10MB", "--max-memory", "1MB"], "contradict each other"),
        (["--max-size", "much"], "--max-size is 'much'"),
        (["--min-gain-kept", "1.5"], "--min-gain-kept is '1.5'"),
        (["--max-ms-per-prompt-token", "-1"], "expected a number above 0"),
        (["--regress-from", "nosuch.json"], "nosuch.json"),
        (["--suite", "size", "--beside", "x"], "--beside is for the suite swap"),
        (["--junit", "no/such/folder/r.xml"], "--junit can't be written"),
    ],
)
def test_contradictory_and_odd_gates_are_refused(
    world: Any, cli: Cli, words: list[str], said: str
) -> None:
    result = cli("validate", world.peft, "--base", world.base, *words)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_gates_from_a_file(
    world: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("validate", world.peft, "--base", world.base, "--suite", "size")
    config = tmp_path / "loraduct.toml"
    config.write_text('[validate]\nmax-size = "100B"\n')
    assert cli(*words).exit_code == 0
    result = cli(*words, "--config", config)
    assert result.exit_code == 3
    assert "max-size 100 B: bytes is" in result.stdout
    assert cli(*words, "--config", config, "--max-size", "1GB").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert cli(*words).exit_code == 3
    for text, said in (
        ("[validate]\nmax-sise = 1\n", "unknown max_sise"),
        ("[validate]\nmax-size = true\n", "max-size is True"),
        ("validate = 3\n", "validate is not a table"),
        ("[validate\n", "is not TOML"),
        ("[validat]\nmax-size = '1MB'\n", "has unknown validat; thresholds stand under [validate]"),
        ("[tool.validate]\nmax-size = '1MB'\n", "has unknown tool"),
        ("max-size = '1B'\n[validate]\n", "has unknown max-size"),
        ("[validate]\nmax-size = '1B'\nmax_size = '1GB'\n", "has max-size twice"),
    ):
        config.write_text(text)
        result = cli(*words)
        assert result.exit_code == 1, text
        assert said in result.stderr
    config.write_text("# nothing\n")
    assert cli(*words).exit_code == 0
    assert "has no [validate]" in cli(*words, "--config", config).stderr
    config.write_text("[validate]\nmax-size = '100B'\n", "utf-8-sig")
    assert cli(*words).exit_code == 3


def test_a_gate_that_was_not_measured_fails(world: Any, cli: Cli) -> None:
    words = ("validate", world.peft, "--base", world.base, "--min-gain-kept", "0.5", "--json")
    result = cli(*words)
    assert result.exit_code == 3
    assert "was not measured: no text" in failed(read(result))[0]["detail"]
    for gate, why in (
        ("--min-greedy-agreement", "one adapter: give B"),
        ("--min-gain-kept", "one adapter"),
    ):
        result = cli(*words[:-3], gate, "0.5", "--text", world.text, "--suite", "quality", "--json")
        assert why in failed(read(result))[0]["detail"]


def test_regressions(world: Any, cli: Cli, tmp_path: Path) -> None:
    words = ("validate", world.peft, "--base", world.base, "--suite", "size", "--json")
    old = json.loads(cli(*words).stdout)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    assert cli(*words, "--regress-from", file).exit_code == 0
    (size,) = (s for s in old["suites"] if s["name"] == "size")
    size["numbers"]["bytes"] = int(size["numbers"]["bytes"] / 1.1)
    file.write_text(json.dumps(old))
    result = cli(*words, "--regress-from", file)
    assert result.exit_code == 3
    assert failed(read(result))[0]["name"] == "regression"
    assert cli(*words, "--regress-from", file, "--tolerance", "12%").exit_code == 0
    for content, said in (
        (json.dumps(old | {"schema": 1}), "has schema 1, expected 2; run validate --json again"),
        ("{}", "is no document of loraduct validate --json"),
        ("no", "is not JSON"),
        (json.dumps(old | {"suites": []}), "no number that was measured now"),
        (json.dumps(old | {"suites": [{"name": []}]}), "no number that was measured now"),
        (
            json.dumps(old | {"suites": [{"name": "size", "numbers": {"bytes": 10**400}}]}),
            "no number",
        ),
    ):
        file.write_text(content)
        result = cli(*words, "--regress-from", file)
        assert result.exit_code == 1, said
        assert said in result.stderr


def test_regressions_of_quality(world: Any, cli: Cli, tmp_path: Path) -> None:
    """Of what ships: of A alone, too, and against a document that had B."""
    file = tmp_path / "old.json"
    more = ("--base", world.base, "--suite", "quality", "--text", world.text, "--json")
    half = weaker(world, tmp_path / "half", 0.5)
    for old in ((world.mlx,), (world.peft, world.mlx)):
        before = cli("validate", *old, *more)
        assert before.exit_code == 0
        file.write_text(before.stdout)
        assert cli("validate", world.mlx, *more, "--regress-from", file).exit_code == 0
        result = cli("validate", half, *more, "--regress-from", file)
        assert result.exit_code == 3
        (check,) = failed(read(result))
        assert check["name"] == "regression"
        assert check["detail"].startswith("perplexity: ")


def test_perplexities_of_another_text_are_no_yardstick(
    world: Any, cli: Cli, tmp_path: Path
) -> None:
    words = ("validate", world.peft, "--base", world.base, "--suite", "quality", "--json")
    file, other = tmp_path / "old.json", tmp_path / "other.jsonl"
    file.write_text(cli(*words, "--text", world.text).stdout)
    other.write_text("".join(world.text.read_text().splitlines(keepends=True)[::-1]))
    for more in (("--text", other), ("--text", world.text, "--text-tokens", 100)):
        d = read(cli(*words, *more, "--regress-from", file))
        (check,) = (c for c in d["by"]["quality"]["checks"] if c["name"] == "regression")
        assert check["status"] == "skipped"
        assert "of another text" in check["detail"]
        assert "of another text" in d["verdict"]


def test_a_suite_that_failed_has_a_failed_check(
    world: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name, it could decide nothing: JUnit is as red as the verdict, and says why."""
    from loraduct.validation import parity, suites
    from loraduct.validation.checks import Check

    left = suites.suite("parity", [Check("logits", "skipped", "the base is packed")])
    monkeypatch.setattr(parity, "run", lambda _: left)
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--suite", "parity")
    files = ("--junit", tmp_path / "r.xml", "--html", tmp_path / "r.html")
    result = cli(*words, *files, "--json")
    assert result.exit_code == 3
    assert [c["detail"] for c in failed(read(result))] == ["the base is packed"]
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert root.get("failures") == "1"
    page = (tmp_path / "r.html").read_text()
    assert "the base is packed" in page.split('class="verdict')[1].split("</div>")[0]


def test_few_texts_are_drawn_by_blocks() -> None:
    """One long text has an interval of some width; of a short one nothing is said."""
    from loraduct.validation.quality import BLOCK, LEAST, intervals, units
    from loraduct.validation.runs import Scored

    rng = np.random.default_rng(0)
    sides = {
        k: rng.gamma(2.0, v, 40 * BLOCK)
        for k, v in (("base", 1.5), ("source", 1.0), ("result", 1.02))
    }
    base, source, result = (units([Scored(v, v)]) for v in sides.values())
    assert len(base) == 40
    assert sum(base) == pytest.approx(sides["base"].sum())
    gain, kept = intervals(base, source, result)
    assert kept is not None
    assert kept["low"] < kept["value"] < kept["high"]
    assert gain["low"] < gain["value"] < gain["high"]
    gain, kept = intervals([100.0], [80.0], [80.9])
    assert kept is None
    assert (gain["value"], gain["low"], gain["high"]) == (20, -np.inf, np.inf)
    short = [Scored(np.ones(3), np.ones(3)) for _ in range(LEAST)]
    assert units(short) == [3.0] * LEAST


def test_a_text_too_short_for_an_interval(world: Any, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the a tall trees stand by the old river")
    words = (
        "validate",
        world.peft,
        world.mlx,
        "--base",
        world.base,
        "--suite",
        "quality",
        "--text",
        text,
    )
    page = tmp_path / "r.html"
    result = cli(*words, "--json", "--html", page)
    assert result.exit_code == 0
    d = read(result)
    assert "too short for an interval" in d["verdict"]
    numbers = d["by"]["quality"]["numbers"]
    assert numbers["gain"]["low"] is None
    assert "gain_kept" not in numbers
    assert "too short for an interval" in page.read_text()
    result = cli(*words, "--json", "--min-gain-kept", "0.5")
    assert result.exit_code == 3
    assert "too short" in failed(read(result))[0]["detail"]


def test_an_adapter_that_makes_the_text_worse(world: Any, cli: Cli, tmp_path: Path) -> None:
    wrong = weaker(world, tmp_path / "wrong", -2)
    words = ("validate", wrong, "--base", world.base, "--suite", "quality", "--text", world.text)
    result = cli(*words, "--json")
    assert result.exit_code == 3
    (check,) = failed(read(result))
    assert check["name"] == "gain"
    assert check["detail"].startswith("A makes this text worse: it gains -")


def test_files_for_other_tools(world: Any, cli: Cli, tmp_path: Path) -> None:
    wrong = weaker(world, tmp_path / "a_`|<b>", 0.5)
    files = ("--junit", tmp_path / "r.xml", "--markdown", tmp_path / "r.md")
    result = cli("validate", world.peft, wrong, "--base", world.base, *files, "--json")
    assert result.exit_code == 3
    d = read(result)
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert [s.get("name") for s in root] == [s["name"] for s in d["suites"]]
    assert int(root.get("failures", 0)) == len(failed(d)) > 0
    assert len(list(root.iter("failure"))) == len(failed(d))
    assert int(root.get("skipped", 0)) == len(list(root.iter("skipped"))) > 0
    text = (tmp_path / "r.md").read_text()
    assert "FAILED: parity" in text
    assert "<b>" not in text.replace("`" + printable_path(wrong) + "`", "")
    assert failed(d)[0]["module"] in text


def printable_path(path: Path) -> str:
    """As it stands in code."""
    return str(path).replace("`", "'")


def test_models_are_loaded_once(world: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraduct.validation import runtimes

    calls = []
    for name in ("_torch", "_mlx"):
        kept = getattr(runtimes, name)
        monkeypatch.setattr(
            runtimes,
            name,
            lambda b, a, kept=kept, name=name: (calls.append((name, a)), kept(b, a))[1],
        )
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--text", world.text)
    assert cli(*words).exit_code == 0
    assert sorted((n, a is None) for n, a in calls) == [
        ("_mlx", False), ("_mlx", True), ("_torch", False), ("_torch", True),
    ]  # fmt: skip


def test_mlx_queue_alternates_between_rows(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before MLX first computes, or two rows wait for each other; what the user set stays."""
    pytest.importorskip("mlx_lm")
    from loraduct.formats import base
    from loraduct.validation import loaded, runtimes

    name = "MLX_BFS_MAX_WIDTH"
    monkeypatch.setattr(loaded.platform, "system", lambda: "Linux")
    for given, wanted in ((None, str(loaded.WIDTH)), ("7", "7")):
        monkeypatch.delenv(name, raising=False) if given is None else monkeypatch.setenv(
            name, given
        )
        runtimes.mlx_model(base.read(world.base))
        assert os.environ[name] == wanted
