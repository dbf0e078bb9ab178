"""The verb: what it prints, its gates and exit codes, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraduct.validation import latency
from loraduct.validation.latency import Measured

Cli = Callable[..., Any]
PHONE = "iPhone 15 Pro"


def document(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def one_line(result: Any, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if "rror: " in line]
    assert len(lines) == 1, result.stderr
    assert not result.stdout.strip()
    for word in words:
        assert word in lines[0]


def test_a_forecast(cli: Cli, tied: Path, adapter: Path) -> None:
    args = (
        "bench",
        adapter,
        "--base",
        tied,
        "--against",
        tied,
        "--device",
        PHONE,
        "--context",
        "16,64",
    )
    d = document(cli(*args, "--json"))
    assert (d["schema"], d["command"], d["passed"]) == (1, "bench", True)
    assert [(r["engine"], r["context"]) for r in d["forecast"]] == [("gpu", 16), ("gpu", 64)] * 2
    first, last = d["forecast"][0], d["forecast"][2]
    assert first["tokens_per_second"] < last["tokens_per_second"]  # an adapter beside, none
    assert {"low", "high", "source", "device", "ms_per_prompt_token"} <= first.keys()
    assert set(d["devices"]) == {PHONE}
    assert d["loads"][0]["adapter_ops"] > 0
    fused = document(cli(*args[:4], "--device", PHONE, "--fused", "--context", 16, "--json"))
    assert fused["forecast"][0]["tokens_per_second"] == last["tokens_per_second"]
    text = cli(*args).stdout
    assert PHONE in text
    assert "assumed" in text
    assert " to " in text  # an interval


def test_a_forecast_of_a_package(cli: Cli, package: Path) -> None:
    d = document(
        cli("bench", f"{package}:a", "--device", "all", "--context", 16, "--generate", 8, "--json")
    )
    engines = {r["engine"] for r in d["forecast"]}
    assert engines == {"coreml-ane", "coreml-gpu"}
    assert len(d["forecast"]) == 2 * len({r["device"] for r in d["forecast"]}) > 50
    ane = next(r for r in d["forecast"] if r["device"] == PHONE and r["engine"] == "coreml-ane")
    assert "calibrated by Apple's" in ane["source"]


def test_own_devices_and_calibration(cli: Cli, package: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[device."Board"]\nbandwidth_gb_s = 10\ngpu_tflops = 1\nane_tops = 2\n')
    mine = tmp_path / "measured.json"
    point = {
        "context": 16,
        "prompt_tokens": 16,
        "tokens_per_second": 11.0,
        "ms_per_prompt_token": 30.0,
    }
    mine.write_text(
        json.dumps({"schema": 1, "device": "Board", "engine": "coreml-ane", "points": [point]})
    )
    args = (
        "bench",
        package,
        "--devices",
        file,
        "--device",
        "Board",
        "--context",
        16,
        "--generate",
        8,
    )
    rows = document(cli(*args, "--calibrate", mine, "--json"))["forecast"]
    ane, gpu = rows
    assert ane["tokens_per_second"] == pytest.approx(11.0)
    assert ane["ms_per_prompt_token"] == pytest.approx(30.0)
    assert "measured.json" in ane["source"]
    assert "measured.json" not in gpu["source"]  # of this engine nothing was measured


def test_lint(cli: Cli, package: Path) -> None:
    d = document(cli("bench", package, "--lint", "--json"))
    assert any("state" in c["detail"] for c in d["lint"])
    assert d["passed"]
    text = cli("bench", package, "--lint")
    assert text.exit_code == 0
    assert "github.com" in text.stdout
    both = document(
        cli(
            "bench", package, "--lint", "--device", PHONE, "--context", 8, "--generate", 8, "--json"
        )
    )
    assert both["lint"]
    assert both["forecast"]


@pytest.mark.parametrize(
    ("gate", "code", "words"),
    [
        (("--max-ms-per-prompt-token", "1000"), 0, "passed"),
        (("--max-ms-per-prompt-token", "0.000001"), 3, "failed"),
        (("--min-tokens-per-second", "1"), 0, "passed"),
        (("--min-tokens-per-second", "1e12"), 3, "failed"),
        (("--max-size", "100MB"), 0, "passed"),
        (("--max-size", "1KB"), 3, "failed"),
        (("--max-memory", "1GB"), 0, "passed"),
        (("--max-memory", "1KB"), 3, "failed"),
    ],
)
def test_gates(cli: Cli, tied: Path, gate: tuple[str, str], code: int, words: str) -> None:
    done = cli("bench", tied, "--device", PHONE, "--context", 16, *gate)
    assert done.exit_code == code, done.output
    assert f"  {words:<8} gate" in done.stdout
    assert gate[0].removeprefix("--") in done.stdout


def test_gates_hold_for_the_worst_row(cli: Cli, tied: Path) -> None:
    """Of all contexts and devices of the target; not of what it is compared with."""
    args = ("bench", tied, "--device", "M4 Max", "--device", PHONE, "--context", "16,64", "--json")
    rows = document(cli(*args))["forecast"]
    speeds = sorted(r["tokens_per_second"] for r in rows)
    between = (speeds[0] + speeds[-1]) / 2
    d = document(cli(*args, "--min-tokens-per-second", between), 3)
    assert not d["passed"]
    (check,) = d["checks"]
    assert check["status"] == "failed"


def test_regressions(cli: Cli, tied: Path, tmp_path: Path) -> None:
    args = ("bench", tied, "--device", PHONE, "--context", 16, "--json")
    now = document(cli(*args))
    file = tmp_path / "before.json"

    def against(factor: float, *more: str, code: int) -> dict[str, Any]:
        before = json.loads(json.dumps(now))
        before["forecast"][0]["tokens_per_second"] *= factor
        file.write_text(json.dumps(before))
        return document(cli(*args, "--regress-from", file, *more), code)

    assert against(1.0, code=0)["passed"]
    assert against(1.04, code=0)["passed"]  # 5 % are allowed unless said
    d = against(1.10, code=3)
    failed = [c for c in d["checks"] if c["status"] == "failed"]
    assert len(failed) == 1
    assert "tokens_per_second" in failed[0]["detail"]
    assert PHONE in failed[0]["detail"]
    assert against(1.10, "--tolerance", "20%", code=0)["passed"]
    against(1.04, "--tolerance", "1%", code=3)
    other = document(
        cli("bench", tied, "--device", "M1", "--context", 16, "--regress-from", file, "--json"), 3
    )
    assert "no row" in other["checks"][0]["detail"]


def bases(folder: Path) -> tuple[Path, Path]:
    """Two configs in folders of one name: a small llama, and one that reads 64 times as much."""
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 1000,
        "tie_word_embeddings": True, "dtype": "float16", "max_position_embeddings": 4096,
    }  # fmt: skip
    for name, hidden in (("v1", 512), ("v2", 4096)):
        (folder / name / "model").mkdir(parents=True)
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
        (folder / name / "model/config.json").write_text(json.dumps(config | sizes))
    return folder / "v1/model", folder / "v2/model"


def test_targets_of_one_name_are_kept_apart(cli: Cli, tmp_path: Path) -> None:
    """Gates and regressions are TARGET's, whatever OTHER is called."""
    small, large = bases(tmp_path)
    args = ("bench", small, "--against", large, "--device", "M4")
    d = document(cli(*args, "--json"))
    assert [r["side"] for r in d["forecast"]] == ["target", "against"]
    fast, slow = (r["tokens_per_second"] for r in d["forecast"])
    between = (fast + slow) / 2
    document(cli(*args, "--min-tokens-per-second", between, "--json"))
    swapped = ("bench", large, "--against", small, "--device", "M4", "--json")
    document(cli(*swapped, "--min-tokens-per-second", between), 3)
    file = tmp_path / "both.json"
    file.write_text(json.dumps(d))
    later = ("--device", "M4", "--regress-from", file, "--json")
    assert document(cli("bench", small, *later))["passed"]
    assert not document(cli("bench", large, *later), 3)["passed"]
    text = cli(*args).stdout
    assert str(small) in text  # by their names alone nobody could tell them apart
    assert str(large) in text
    for row in d["forecast"]:
        del row["side"]
    file.write_text(json.dumps(d))
    one_line(cli("bench", small, *later[:-1]), 1, "both.json", "which rows are TARGET's")


def test_a_regression_of_memory(cli: Cli, tied: Path, tmp_path: Path) -> None:
    args = ("bench", tied, "--device", PHONE, "--context", 16, "--json")
    before = document(cli(*args))
    before["forecast"][0]["memory_bytes"] *= 0.9
    file = tmp_path / "before.json"
    file.write_text(json.dumps(before))
    d = document(cli(*args, "--regress-from", file), 3)
    (failed,) = [c for c in d["checks"] if c["status"] == "failed"]
    assert "memory_bytes" in failed["detail"]


def test_rows_without_a_counterpart_are_named(cli: Cli, tied: Path, tmp_path: Path) -> None:
    args = ("bench", tied, "--device", PHONE, "--json")
    file = tmp_path / "before.json"
    before = document(cli(*args, "--context", "16,32"))
    del before["forecast"][0]["memory_bytes"]
    file.write_text(json.dumps(before))
    d = document(cli(*args, "--context", "16,64", "--regress-from", file))
    skipped = [c["detail"] for c in d["checks"] if c["status"] == "skipped"]
    assert len(skipped) == 2
    assert "not in the earlier document" in skipped[0]
    assert f"{PHONE} gpu 64" in skipped[0]
    assert f"{PHONE} gpu 16: memory_bytes" in skipped[0]
    assert "not among what was run now" in skipped[1]
    assert f"{PHONE} gpu 32" in skipped[1]
    assert d["passed"]
    # a number that the earlier one has is not let go
    before["forecast"][0]["peak_bytes"] = 10.0
    file.write_text(json.dumps(before))
    d = document(cli(*args, "--context", "16", "--regress-from", file), 3)
    (failed,) = [c["detail"] for c in d["checks"] if c["status"] == "failed"]
    assert "peak_bytes not measured, before 10" in failed


def test_a_measured_target_against_itself(
    cli: Cli, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rows have one name; the gate is about the first."""

    def measure(targets: list[Any], contexts: Any, *_: Any) -> Any:
        return [
            Measured(t.name, t.runtime, c, 2, 1.0, 0.1, speed, 1.0, None, 9, 2,
                     {"tokens_per_second": (speed, speed)})
            for t, speed in zip(targets, (50.0, 5.0), strict=True)
            for c in contexts
        ], []  # fmt: skip

    monkeypatch.setattr(latency, "measure", measure)
    args = ("bench", tied, "--against", tied, "--context", "4,8", "--json")
    d = document(cli(*args, "--min-tokens-per-second", 20))
    assert [r["side"] for r in d["targets"]] == ["target"] * 2 + ["against"] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "iPhone16,1"}, ("measured on iPhone 15 Pro with gpu", "forecast for M4")),
        ({"engine": "coreml-ane"}, ("with coreml-ane", "M4 with gpu")),
        # a prompt that took less than one token behind it
        ({}, ("64 tokens took 19.2 ms", "by tokens_per_second, 49.5 ms", "measure again")),
    ],
)
def test_a_calibration_that_changes_nothing(
    cli: Cli, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    small, _ = bases(tmp_path)
    point = {"context": 128, "prompt_tokens": 64, "ms_per_prompt_token": 0.3}
    value = {"schema": 1, "device": "M4", "engine": "gpu"} | changes
    file = tmp_path / "m.json"
    file.write_text(json.dumps(value | {"points": [point | {"tokens_per_second": 20.0}]}))
    args = ("bench", small, "--device", "M4", "--calibrate", file)
    one_line(cli(*args), 1, "m.json", *words)
    if not changes:  # each of its numbers alone is met
        for key, number in (("ms_per_prompt_token", 0.3), ("tokens_per_second", 20.0)):
            alone = {k: v for k, v in point.items() if k.endswith(("context", "prompt_tokens"))}
            file.write_text(json.dumps(value | {"points": [alone | {key: number}]}))
            context = 64 if key == "ms_per_prompt_token" else 128
            (row,) = document(cli(*args, "--context", context, "--json"))["forecast"]
            assert row[key] == pytest.approx(number)


def test_one_function_is_linted_by_its_name(
    cli: Cli, tied: Path, adapter: Path, package: Path, tmp_path: Path
) -> None:
    every = document(cli("bench", package, "--lint", "--json"))["lint"]
    one = document(cli("bench", f"{package}:a", "--lint", "--json"))["lint"]
    assert len(one) == len(every)
    assert all("; in a [" in c["detail"] for c in one)
    assert not any("; in a [" in c["detail"] for c in every)
    one_line(cli("bench", f"{package}:b", "--lint"), 1, "no function or adapter 'b'")
    # of fixed shapes an adapter has a function for each
    out = tmp_path / "fixed.mlpackage"
    done = cli(
        "package",
        "--base",
        tied,
        "-a",
        f"a={adapter}",
        "--context",
        40,
        "--shapes",
        "1,8",
        "-o",
        out,
    )
    assert done.exit_code == 0, done.output
    for name, functions in (("a", "; in a_q1, a_q8 ["), ("a_q8", "; in a_q8 [")):
        found = document(cli("bench", f"{out}:{name}", "--lint", "--json"))["lint"]
        assert all(functions in c["detail"] for c in found)


def test_what_has_nothing_to_do_with_the_target(
    cli: Cli, tied: Path, adapter: Path, package: Path, tmp_path: Path
) -> None:
    fit = ("--device", PHONE, "--context", 8, "--generate", 8)
    for target in (tied, tied / "config.json", package, f"{package}:a"):
        one_line(cli("bench", target, *fit, "--base", "/nope"), 1, "is no adapter: --base")
        one_line(cli("bench", target, *fit, "--fused"), 1, "is no adapter: --fused")
    one_line(cli("bench", tied, "--base", tied), 1, "is no adapter: --base")
    one_line(cli("bench", tied, "--units", "CPU_ONLY"), 1, "--units is for Core ML", "torch")
    document(cli("bench", package, "--against", adapter, "--base", tied, *fit, "--json"))
    one_line(cli("bench", package, "--lint", "--base", tied), 2, "--base changes nothing")


def test_a_config_has_no_size(cli: Cli, tied: Path, tmp_path: Path) -> None:
    small, _ = bases(tmp_path)
    for target in (small, small / "config.json"):
        done = cli("bench", target, "--device", "M4", "--max-size", "1GB")
        one_line(done, 1, "holds no weights", "--max-size")
    # of a base that is named by its config, the weights count
    whole = sum(f.stat().st_size for f in tied.iterdir())
    args = ("bench", tied / "config.json", "--device", PHONE, "--context", 16, "--json")
    assert document(cli(*args, "--max-size", whole))["size_bytes"] == whole
    document(cli(*args, "--max-size", whole - 1), 3)


def test_an_adapter_of_another_base(
    cli: Cli, tied: Path, adapter: Path, tmp_path: Path, repo: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small, _ = bases(tmp_path)
    fit = ("--device", "M4", "--context", 16)
    one_line(cli("bench", adapter, "--base", small, *fit), 1, "made for another base", "[64, 64]")
    reply = repo / "examples/reply"
    one_line(cli("bench", reply, "--base", small, *fit), 1, "has 2: made for another base")
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=160)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    other = ("bench", adapter, "--base", tmp_path / "gpt2")
    one_line(cli(*other, *fit), 1, "no module of a gpt2: made for another base")
    one_line(cli(*other), 1, "no module of a gpt2: made for another base")  # measured neither
    config = json.loads((tied / "config.json").read_text())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_text(json.dumps(config))
    document(cli("bench", adapter, "--base", tmp_path / "alone", *fit, "--json"))


def test_what_was_measured(cli: Cli, tied: Path, tmp_path: Path) -> None:
    """Against a document in which everything took an age, so that no time decides."""
    slow = {
        "name": str(tied), "runtime": "torch", "dtype": "float32", "context": 4,
        "ms_per_prompt_token": 1e9, "tokens_per_second": 1e-9, "peak_bytes": 10**15,
    }  # fmt: skip
    file = tmp_path / "before.json"
    file.write_text(json.dumps({"command": "bench", "schema": 1, "targets": [slow]}))
    args = ("bench", tied, "--context", 4, "--generate", 2, "--rounds", 1)
    d = document(cli(*args, "--json", "--regress-from", file, "--max-memory", "90GB"))
    assert [(t["name"], t["context"]) for t in d["targets"]] == [(str(tied), 4)]
    assert d["ratios"] == []
    assert d["machine"]["cores"] >= 1
    assert [c["name"] for c in d["checks"]] == ["gate"] + ["regression"] * 3
    assert d["size_bytes"] == sum(f.stat().st_size for f in tied.iterdir())
    one_line(cli(*args[:4], "--device", PHONE, "--regress-from", file), 1, "holds no forecast")


BAD = [
    (("--device", "iPhone 99"), 1, ("unknown device", "did you mean")),
    (("--device", PHONE, "--context", "0"), 2, ("1 token or more",)),
    (("--device", PHONE, "--context", "12,x"), 2, ("no list of numbers",)),
    (("--device", PHONE, "--context", "8,8"), 2, ("once",)),
    (("--device", PHONE, "--generate", "0"), 2, ("generate",)),
    (("--device", PHONE, "--context", "4096"), 1, ("made for 128",)),
    (("--context", "4096"), 1, ("made for 128",)),
    (("--device", PHONE, "--max-size", "big"), 1, ("'big' is no size",)),
    (("--device", PHONE, "--max-ms-per-prompt-token", "-1"), 1, ("no number above 0",)),
    (("--device", PHONE, "--max-ms-per-prompt-token", "nan"), 1,
     ("--max-ms-per-prompt-token: 'nan' is no number above 0",)),
    (("--device", PHONE, "--tolerance", "5%"), 1, ("--regress-from",)),
    (("--device", PHONE, "--max-size", "2GB", "--max-memory", "1GB"), 1, ("contradict",)),
    (("--lint", "--max-memory", "1GB"), 1, ("--lint alone runs nothing",)),
    (("--fused",), 2, ("--fused needs --device",)),
    (("--calibrate", "x.json"), 2, ("--calibrate needs --device",)),
    (("--device", PHONE, "--regress-from", "nothing.json"), 1, ("nothing.json",)),
    (("--device", PHONE, "--devices", "nothing.toml"), 1, ("nothing.toml",)),
    (("--runtime", "coreml"), 1, ("is no package",)),
    (("--devices", "x.toml"), 2, ("--devices needs --device",)),
    (("--device", PHONE, "--dtype", "float16"), 2, ("--dtype changes nothing here",)),
    (("--device", PHONE, "--runtime", "torch"), 2, ("--runtime changes nothing here",)),
    (("--device", PHONE, "--units", "ALL"), 2, ("--units changes nothing here",)),
    (("--device", PHONE, "--rounds", "5"), 2, ("--rounds changes nothing here",)),
    (("--lint", "--context", "8"), 2, ("--context changes nothing here",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_bad_input(
    cli: Cli, tied: Path, args: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    one_line(cli("bench", tied, *args), code, *words)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what"),
        ('{"schema": 2, "suites": []}', "is not what"),
        ('{"command": "bench", "schema": 0, "forecast": []}', "schema 0, expected 1"),
        ('{"command": "bench", "forecast": []}', "schema None, expected 1"),
        ('{"command": "bench", "schema": true, "forecast": []}', "schema True, expected 1"),
        ('{"command": "bench", "schema": 1, "forecast": [3]}', "holds no forecast"),
        ('{"command": "bench", "schema": 1, "targets": []}', "holds no forecast"),
    ],
)
def test_old_and_foreign_documents(
    cli: Cli, tied: Path, tmp_path: Path, text: str, word: str
) -> None:
    file = tmp_path / "before.json"
    file.write_text(text)
    one_line(cli("bench", tied, "--device", PHONE, "--regress-from", file), 1, "before.json", word)
