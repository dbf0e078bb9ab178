"""The verb: what it prints, its gates and exit codes, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    one_line(cli(*args, "--device", PHONE, "--regress-from", file), 1, "holds no forecast")


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
