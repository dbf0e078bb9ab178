"""The forecast's constants: fitted to some published measurements, tested on the others.

Points are tokens per second of decoding (tg) and of prompts (pp). Sources:

  4167   https://github.com/ggml-org/llama.cpp/discussions/4167  LLaMA 2 7B Q4_0, pp512, tg128
  XD     https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference  README, pp512, tg512
  NB     https://github.com/brand-o/normiebench/issues/3 and /40
  LF     https://github.com/AlexsJones/llmfit/pull/1031
  GG     https://github.com/geerlingguy/ai-benchmarks/issues/48
  JR     https://github.com/john-rocky/apple-silicon-llm-bench  docs/litert-community-vs-mlx-coreai.md
  16634  https://github.com/ggml-org/llama.cpp/pull/16634  (M5 with the tensor API)
  1569   https://github.com/ml-explore/mlx-lm/pull/1569  pp2048
  ACL    https://machinelearning.apple.com/research/core-ml-on-device-llama  tables 3 and 4
  AFM    https://machinelearning.apple.com/research/introducing-apple-foundation-models
  FL     https://github.com/FluidInference/mobius/pull/77
  AF     https://huggingface.co/datasets/aneforge/ane-rooflines  (peak of half-precision products)

Left out: models above 70 % of the machine's memory (XD's M3 with 7B in F16, M3 Max with 70B Q4_0),
where paging is what is measured.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

from measure import Table, Target, show

from loraduct.validation import forecast as fc
from loraduct.validation.devices import built_in
from loraduct.validation.workload import Workload

KNOWN = built_in()
# name -> bytes read for a token, products, blocks, heads times dimension
MODELS = {
    "L2-7B Q4_0": (3.82e9, 6.74e9, 32, 4096),
    "L2-7B F16": (13.48e9, 6.74e9, 32, 4096),
    "L3-8B Q4_K_M": (4.92e9, 8.03e9, 32, 4096),
    "L3-8B Q8_0": (8.54e9, 8.03e9, 32, 4096),
    "L3-8B F16": (16.06e9, 8.03e9, 32, 4096),
    "L3-70B Q4_K_M": (42.51e9, 70.55e9, 80, 8192),
    "L2-70B Q4_0": (38.87e9, 68.98e9, 80, 8192),
    "TinyLlama Q4_K_M": (0.67e9, 1.1e9, 22, 2048),
    "TinyLlama Q4_0": (0.634e9, 1.1e9, 22, 2048),
    "Mistral 7B Q4_0": (4.11e9, 7.24e9, 32, 4096),
    "phi-2 Q4_0": (1.60e9, 2.78e9, 32, 2560),
    "L3.2-3B 4 bits": (1.81e9, 3.21e9, 28, 3072),
    "Qwen3-4B 4 bits": (2.26e9, 4.02e9, 36, 4096),
}
# chip, other TFLOPS or 0, model, tg, pp (0: none), tokens, source
FITTED = [
    ("M1", 0, "L2-7B Q4_0", 14.15, 118, 512, "4167"),
    ("M1 Max", 0, "L2-7B Q4_0", 61.19, 0, 512, "4167"),
    ("M2 Max", 0, "L2-7B Q4_0", 65.95, 0, 512, "4167"),
    ("M1 Ultra", 0, "L2-7B Q4_0", 83.73, 1030, 512, "4167"),
    ("M2 Ultra", 0, "L2-7B Q4_0", 94.27, 1238, 512, "4167"),
    ("M3 Ultra", 0, "L2-7B Q4_0", 92.1, 1471, 512, "4167"),
    ("M4", 0, "L2-7B Q4_0", 24, 221, 512, "4167"),
    ("M4 Pro", 0, "L2-7B Q4_0", 50.7, 440, 512, "4167"),
    ("M4 Max", 0, "L2-7B Q4_0", 83.1, 886, 512, "4167"),
    ("M5 Max", 18.4, "L2-7B Q4_0", 102.9, 987, 512, "4167"),  # without its matrix units
]
TESTED = [
    ("M1", 2.28, "L3-8B Q4_K_M", 10.20, 94.48, 512, "XD"),
    ("M1 Max", 0, "L3-8B Q4_K_M", 35.73, 408, 512, "XD"),
    ("M1 Max", 0, "L3-8B F16", 18.75, 517, 512, "XD"),
    ("M1 Max", 0, "L3-70B Q4_K_M", 4.34, 35, 512, "XD"),
    ("M1 Max", 7.8, "L2-7B Q4_0", 48.65, 200, 512, "XD"),
    ("M2 Ultra", 0, "L3-8B Q4_K_M", 78.81, 994, 512, "XD"),
    ("M2 Ultra", 0, "L2-7B Q4_0", 91.89, 1217, 512, "XD"),
    ("M2 Ultra", 0, "L2-7B F16", 40.68, 1380, 512, "XD"),
    ("M2 Ultra", 0, "L2-70B Q4_0", 14.37, 133, 512, "XD"),
    ("M3", 0, "L2-7B Q4_0", 20.79, 185, 512, "XD"),
    ("M3 Max", 0, "L2-7B Q4_0", 63.11, 741, 512, "XD"),
    ("M3 Max", 0, "L2-7B F16", 24.76, 761, 512, "XD"),
    ("M3 Max", 0, "L3-8B F16", 22.04, 770, 512, "XD"),
    ("M3 Max", 0, "L3-70B Q4_K_M", 7.65, 70, 512, "XD"),
    ("M4", 0, "L3-8B Q4_K_M", 20.87, 225, 512, "NB"),
    ("M1 Max", 0, "L3-8B Q4_K_M", 46.2, 500, 512, "NB"),
    ("M2 Pro", 0, "L3-8B Q4_K_M", 33.0, 0, 512, "LF"),
    ("M2 Pro", 0, "L3-8B Q8_0", 22.0, 0, 512, "LF"),
    ("M1 Ultra", 0, "TinyLlama Q4_K_M", 242.56, 5588, 512, "GG"),
    ("M4 Max", 0, "L3.2-3B 4 bits", 208.0, 0, 512, "JR"),
    ("M5", 0, "Mistral 7B Q4_0", 26.59, 0, 512, "16634"),  # its pp made the table's TFLOPS
    ("M5", 0, "phi-2 Q4_0", 64.11, 1481, 512, "16634"),
    ("M5", 0, "TinyLlama Q4_0", 149.69, 3959, 512, "16634"),
    ("M3 Pro", 5.0, "Qwen3-4B 4 bits", 44.62, 615, 2048, "1569"),
]
# Core ML on an M1 Max's GPU: Llama 3.1 8B, context of the buffer, tokens/s
ACL_FITTED = [
    (16.06e9, 128, 17.89),
    (16.06e9, 8192, 12.31),
    (4.47e9, 128, 39.44),
    (4.47e9, 8192, 21.46),
]
ACL_TESTED = [(16.06e9, 2048, 16.26), (4.47e9, 2048, 33.67)]
KV_8B = 2 * 2 * 32 * 1024  # bytes a token
AFM = Workload("AFM 3B", round(2.73e9 * 3.7 / 8), round(2.73e9), 35)
# Neural Engine, not fitted: chip, tera-operations a second reached in half precision
ANE_PEAKS = [("M1", 2.70, "AF"), ("M1 Max", 4.56, "AF"), ("M2 Pro", 3.26, "AF"), ("M5 Pro", 10.04, "AF"),
             ("M5 Pro", 2 * 0.6e9 * 128 / 12.5e-3 / 1e12, "FL")]  # fmt: skip


def point(row: tuple[str, float, str, float, float, int, str]) -> fc.Point:
    """A row of the tables; 128 tokens are generated, so 64 stand before the average one."""
    chip, tflops, model, tg, pp, tokens, _ = row
    device = KNOWN[chip]
    if tflops:
        device = replace(device, flops=tflops * 1e12)
    read, macs, layers, width = MODELS[model]
    load = Workload(model, round(read), round(macs), layers, width=width)
    return fc.Point(load, device, 64, tokens, tg, 1e3 / pp if pp else None)


def acl_point(row: tuple[float, int, float]) -> fc.Point:
    """A row of Apple's tables."""
    read, context, tg = row
    load = Workload("L3.1-8B", round(read), round(8.03e9), 32, buffer_bytes=KV_8B * context)
    return fc.Point(load, KNOWN["M1 Max"], context, context, tg, None)


def fitted() -> dict[str, fc.Engine]:
    """The engines, fitted anew."""
    gpu = fc.fit(fc.ENGINES[fc.GPU], [point(r) for r in FITTED], (0, 2))
    core = fc.fit(fc.ENGINES[fc.COREML_GPU], [acl_point(r) for r in ACL_FITTED])
    phone = KNOWN["iPhone 15 Pro"]
    share = AFM.weight_bytes * 30 / phone.bandwidth
    ane = replace(fc.ENGINES[fc.ANE], compute=2 * AFM.macs / 0.6e-3 / phone.ane_ops)
    return {
        fc.GPU: replace(gpu, cache=gpu.read),
        fc.COREML_GPU: core,
        fc.ANE: replace(ane, read=share),
    }


def rows_of(engine: fc.Engine, rows: list[tuple], which: str) -> list[list[str]]:  # type: ignore[type-arg]
    """Measured and forecast, a line each."""
    lines = []
    for row in rows:
        chip, _, model, measured, prompt, _, source = row
        p = point(row)
        tg = 1 / fc.decode_seconds(p.load, p.device, engine, p.context)
        pp = p.prompt / fc.prompt_seconds(p.load, p.device, engine, p.prompt)
        lines.append(
            [f"{chip}, {model} [{source}]", which, f"{measured:.1f}", f"{tg:.1f}", f"{tg / measured - 1:+.0%}",
             *([f"{prompt:.0f}", f"{pp:.0f}", f"{pp / prompt - 1:+.0%}"] if prompt else ["", "", ""])]
        )  # fmt: skip
    return lines


def measure_all() -> tuple[list[Table], list[Target]]:
    """Tables and targets, as the other benchmarks give them. Nothing is timed."""
    engines = fitted()
    gpu, core, ane = engines[fc.GPU], engines[fc.COREML_GPU], engines[fc.ANE]
    test = [point(r) for r in TESTED]
    decode, prompt = fc.errors(gpu, test)
    near = [fc.errors(gpu, [point(r) for r in FITTED])[i] for i in (0, 1)]
    header = ["chip, model", "set", "tg", "forecast", "", "pp", "forecast", ""]
    lines = rows_of(gpu, FITTED, "fitted") + rows_of(gpu, TESTED, "tested")
    gpu_table = ("Forecast on the GPU, tokens per second", header, lines)
    acl = []
    for rows, which in ((ACL_FITTED, "fitted"), (ACL_TESTED, "tested")):
        for row in rows:
            p = acl_point(row)
            t = 1 / fc.decode_seconds(p.load, p.device, core, p.context)
            acl.append([f"{row[0] / 1e9:.1f} GB, buffer of {row[1]}", which, f"{row[2]:.1f}", f"{t:.1f}",
                        f"{t / row[2] - 1:+.0%}"])  # fmt: skip
    core_table = ("Core ML on the GPU of an M1 Max, Llama 3.1 8B [ACL]",
                  ["weights", "set", "tg", "forecast", ""], acl)  # fmt: skip
    peaks = [
        [f"{c} [{s}]", f"{v:.1f}", f"{ane.compute * KNOWN[c].ane_ops / 1e12:.1f}",
         f"{ane.compute * KNOWN[c].ane_ops / 1e12 / v - 1:+.0%}"]
        for c, v, s in ANE_PEAKS
    ]  # fmt: skip
    ane_table = ("Neural Engine, tera-operations a second in half precision; not fitted",
                 ["chip", "measured", "forecast", ""], peaks)  # fmt: skip
    constants = [
        [e.name, f"{e.read:.4f}", f"{e.cache:.3f}", f"{e.block * 1e3:.4f}", f"{e.compute:.4f}"]
        for e in (gpu, core, ane)
    ]
    summary = (
        "Constants, and errors of decoding and of prompts",
        ["engine", "a", "c", "d (ms)", "e"],
        [*constants,
         ["median error, fitted", *(f"{statistics.median(map(abs, e)):.1%}" for e in near), "", ""],
         ["median error, tested", *(f"{statistics.median(map(abs, e)):.1%}" for e in (decode, prompt)), "", ""],
         ["worst, tested", *(f"{max(e, key=abs):+.0%}" for e in (decode, prompt)), "", ""],
         ["factor of 8 in 10", *(f"{fc.factor(e):.3f}" for e in (decode, prompt)), "", ""]],
    )  # fmt: skip
    core_off = [abs(e) for e in fc.errors(core, [acl_point(r) for r in ACL_TESTED])[0]]
    targets = [
        ("forecast: median error of decoding, %, points not fitted",
         100 * statistics.median(map(abs, decode)), "<=", 10.0),
        ("forecast: Core ML on the GPU, largest error, %, points not fitted",
         100 * max(core_off), "<=", 15.0),
    ]  # fmt: skip
    return [gpu_table, core_table, ane_table, summary], targets


def main() -> int:
    """Print, and name what was missed."""
    return show(*measure_all())


if __name__ == "__main__":
    sys.exit(main())
