"""A document of ``loraduct validate --json``, made by hand, and what a stranger may put into one."""

from __future__ import annotations

import math
from typing import Any

KINDS = {
    "self_attn.q_proj": 8,
    "self_attn.k_proj": 8,
    "self_attn.v_proj": 8,
    "self_attn.o_proj": 16,
    "mlp.gate_proj": 4,
    "mlp.up_proj": 4,
    "mlp.down_proj": 4,
}
LAYERS = 30
HOSTILE = (
    '<script>alert("1")</script>',
    "\"'><img src=x onerror=alert(1)>",
    "</style></svg><script>2</script>",
    "\x1b[31mred\x07\x00 \u202e backwards \ud800",
    "$\\frac{1}{0}$ #010203 url(#x)",
    "n" * 5000,
)


def modules() -> list[dict[str, Any]]:
    """Every adapted module of SmolLM2's size, with numbers that differ everywhere."""
    return [
        {
            "module": f"model.layers.{layer}.{kind}",
            "layer": layer,
            "kind": kind,
            "rank": rank,
            "norm": 0.3 + 0.01 * layer + 0.1 * n,
            "error": 1e-4 * (1 + n) * (1 + layer / 30),
            "gain": 1 + 1e-4 * math.sin(layer + n),
            "cosine": 1 - 1e-7 * (layer + 1),
            "bound": 1e-3,
            "gain_bound": 3e-3,
            "fits": True,
        }
        for layer in range(LAYERS)
        for n, (kind, rank) in enumerate(KINDS.items())
    ]


def check(name: str, status: str, detail: str, **more: str) -> dict[str, Any]:
    """One check."""
    return {"name": name, "status": status, "detail": detail, **more}


def document() -> dict[str, Any]:
    """All suites, one of them skipped."""
    return {
        "schema": 2,
        "tool": {"name": "loraduct", "version": "0.1.0"},
        "command": "loraduct validate examples/reply out/reply-mlx --base base --json",
        "created": "2026-01-02T03:04:05Z",
        "passed": True,
        "verdict": "passed; not run: swap",
        "inputs": {
            "a": {"path": "examples/reply", "format": "peft", "sha256": "ab" * 32},
            "b": {"path": "out/reply-mlx", "format": "mlx", "sha256": "cd" * 32},
            "base": {"path": "base", "format": "hf", "sha256": None},
        },
        "suites": [
            suite(
                "structure",
                [check("values", "passed", "420 tensors, F16, no NaN, no Inf", adapter="A")],
            ),
            suite("base", [check("base", "passed", "torch and mlx agree on the bare base")]),
            suite(
                "parity",
                [
                    check("dW", "passed", "210 modules, largest relative error 9.1e-04"),
                    check("logits", "passed", "torch / mlx: largest difference 1.41e-04"),
                    check("near", "warning", "close to the bound", module="model.layers.0.x"),
                ],
                {
                    "runtimes": ["torch", "mlx"],
                    "max_difference": 1.4138222e-4,
                    "mean_difference": 1.9195e-5,
                    "bound": 8.113491e-3,
                    "effect": 8.113491058,
                    "kl": 7.58e-11,
                    "top1_agreement": 1.0,
                    "per_position": [1e-5 * (1 + (7 * i) % 13) for i in range(60)],
                    "modules": modules(),
                },
            ),
            suite(
                "quality",
                [check("gain", "passed", "99.8 % of the gain kept")],
                {
                    "perplexities": {"base": 21.7, "source": 14.91, "result": 14.93},
                    "texts": [
                        {"text": n, "tokens": 31 + n, "base": 20.5 + n, "source": 14.5 + n,
                         "result": 14.625 + n}
                        for n in range(40)
                    ],
                    "gain_kept": {"value": 0.998, "low": 0.993, "high": 1.002},
                    "greedy_agreement": 0.97,
                },
            ),
            suite(
                "size",
                [check("bytes", "passed", "5.0 MB of 10 MB allowed")],
                {
                    "bytes": 5012349,
                    "a": {"bytes": 5012345, "by_kind": {"feed-forward": 3500000, "other": 12345}},
                    "b": {"bytes": 5012349, "by_kind": {"feed-forward": 3500001, "other": 12349}},
                    "curve": [
                        {"bits": b, "bytes": 620000 * b, "error": 2.0**-b} for b in (2, 3, 4, 6, 8)
                    ],
                    "account": [
                        {"tensor": f"s.{i}.lora_A.weight", "module": f"s.{i}", "kind": "other",
                         "dtype": "F16", "shape": [4, 576], "values": 2304, "bytes": 4608}
                        for i in range(420)
                    ],
                },
            ),
            suite(
                "latency",
                [check("tokens", "passed", "31.2 tokens per second forecast")],
                {
                    "targets": [
                        {"target": "torch", "ms_per_prompt_token": 2.31, "tokens_per_second": 17.1}
                    ],
                    "forecast": [
                        {
                            "target": "out/reply-mlx",
                            "device": name,
                            "engine": "gpu",
                            "context": 128,
                            "ms_per_prompt_token": 20 / v,
                            "prompt_low": 16 / v,
                            "prompt_high": 24 / v,
                            "tokens_per_second": v,
                            "low": v * 0.85,
                            "high": v * 1.2,
                            "memory_bytes": 300_000_000,
                            "fits": True,
                            "source": "fitted to published runs",
                            "assumed": [],
                        }
                        for name, v in (("iPhone 15 Pro", 120.5), ("MacBook Air M3", 250.0))
                    ],
                },
            ),
            suite("swap", [], status="skipped", reason="mlx is not installed"),
        ],
        "thresholds": {"min_gain_kept": 0.95, "max_size": 10_000_000, "min_tokens_per_second": 20.0},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "cpu": "two cores"},
    }  # fmt: skip


def suite(
    name: str,
    checks: list[dict[str, Any]],
    numbers: dict[str, Any] | None = None,
    status: str = "passed",
    reason: str | None = None,
) -> dict[str, Any]:
    """One suite."""
    return {
        "name": name,
        "status": status,
        "reason": reason,
        "seconds": 1.25,
        "checks": checks,
        "numbers": numbers or {},
    }


def small() -> dict[str, Any]:
    """A document with few modules, so that pages are quick."""
    doc = document()
    doc["suites"][2]["numbers"]["modules"] = modules()[:3]
    del doc["suites"][4]["numbers"]["account"][2:]
    doc["suites"][3]["numbers"]["texts"] = doc["suites"][3]["numbers"]["texts"][:2]
    return doc
