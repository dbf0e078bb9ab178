"""The main job, start to finish, on a real model: carry two adapters across and prove it.

    make demo        or        .venv/bin/python examples/demo.py

Runs loraduct as a user would (every command is printed before it runs), checks that
PEFT -> MLX -> PEFT comes back unchanged, and lets the stock runtimes answer: the source in PEFT
on torch, the converted one in mlx-lm. The exit code is not 0 if anything fails.
"""

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from base import MARKER, ROOT, prepare, quiet

MESSAGE = (
    "Hi Robin, my parents visit next weekend, so I can't play tennis on Saturday. "
    "Shall we play on Wednesday evening instead? Nina"
)  # in neither training file
PROMPTS = {
    "summary": f"Summarize this message in one line.\n\n{MESSAGE}",
    "reply": f"Write a reply to this message.\n\n{MESSAGE}",
}
MOST_TOKENS = 32
STACK = "both"  # the package's function that has both adapters
CONTEXT = 256  # positions that the package holds


def loraduct(*arguments: str | Path, capture: bool = False) -> str:
    """Print a command, run it from the repository's root, and stop the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['loraduct', *words])}", flush=True)
    script = Path(sys.executable).parent / "loraduct"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "loraduct"]
    pipe = subprocess.PIPE if capture else None
    run = subprocess.run([*command, *words], cwd=ROOT, stdout=pipe, text=True)
    if run.returncode:
        print(run.stdout or "", end="")
        print(f"error: the command ended with {run.returncode}", file=sys.stderr)
        raise SystemExit(run.returncode)
    return run.stdout or ""


def convert(source: Path, to: str, target: Path, base: Path) -> float:
    """Convert one adapter with the command line; return the seconds a user waits for it."""
    start = time.monotonic()
    loraduct("convert", source, "--to", to, "-o", target, "--base", base, "--force")
    return time.monotonic() - start


def compare(before: Path, after: Path) -> str:
    """Say that two PEFT folders hold the same tensors and the same config, or stop."""
    from safetensors.numpy import load_file

    one, two = (load_file(ROOT / at / "adapter_model.safetensors") for at in (before, after))
    names = sorted(one.keys() | two.keys())
    wrong = [f"tensor {name}" for name in names if not same(one.get(name), two.get(name))]
    first, second = (
        json.loads((ROOT / at / "adapter_config.json").read_text()) for at in (before, after)
    )
    fields = sorted(first.keys() | second.keys())
    missing = object()
    wrong += [
        f"config field {field}"
        for field in fields
        if first.get(field, missing) != second.get(field, missing)
    ]
    if wrong:
        print(f"error: {after} differs from {before}: {', '.join(wrong)}", file=sys.stderr)
        raise SystemExit(1)
    return f"{len(names)} tensors byte-equal, {len(fields)} config fields equal"


def same(one: Any, two: Any) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    if one is None or two is None:
        return False
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def validate(source: Path, target: Path, base: Path) -> dict[str, Any]:
    """Run the proof, print its checks, and return its document."""
    document = json.loads(
        loraduct("validate", source, target, "--base", base, "--json", capture=True)
    )
    print_checks(document)
    return document


def print_checks(document: dict[str, Any]) -> None:
    """The checks of a proof, each once."""
    seen = {}
    for check in document["checks"]:  # the checks of either adapter alone are often equal
        seen[check["name"], check["status"], check["detail"]] = None
    for name, status, detail in seen:
        print(f"  {status:<8} {name:<9} {detail}")


def answers_torch(base: Path, adapter: Path, prompt: str) -> tuple[str, str]:
    """What the base and the adapted model answer in stock PEFT, greedily, in float32."""
    quiet()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / base)
    model = AutoModelForCausalLM.from_pretrained(ROOT / base, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )

    def answer(model: Any) -> str:
        made = model.generate(**ids, max_new_tokens=MOST_TOKENS, do_sample=False)
        new = made[0, ids["input_ids"].shape[1] :]
        ended = new[-1] == tokenizer.eos_token_id
        return shown(tokenizer.decode(new, skip_special_tokens=True), bool(ended))

    plain = answer(model)
    return plain, answer(PeftModel.from_pretrained(model, str(ROOT / adapter)).eval())


def answers_mlx(base: Path, adapter: Path, prompt: str) -> tuple[str, str]:
    """The same in stock mlx-lm with the converted adapter."""
    quiet()
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.utils import load_adapters

    model, tokenizer = load(str(ROOT / base))
    model.set_dtype(mx.float32)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)

    def answer(model: Any) -> str:
        parts = list(stream_generate(model, tokenizer, ids, max_tokens=MOST_TOKENS))
        return shown("".join(part.text for part in parts), parts[-1].finish_reason == "stop")

    plain = answer(model)
    return plain, answer(load_adapters(model, str(ROOT / adapter)))


def answers_package(base: Path, package: Path) -> list[list[str]]:
    """What the package's functions answer, run by the reference interpreter.

    In float32, from the FLOAT16 weights: in half precision a token may differ where two are equally
    likely (at one place of the reply, two logits lie 0.004 apart).
    """
    from transformers import AutoTokenizer

    from loraduct.formats.coreml import package as packages
    from loraduct.validation import coreml, mil

    tokenizer = AutoTokenizer.from_pretrained(ROOT / base)
    held = packages.read(ROOT / package)
    weights = mil.Weights(held)
    rows = []
    for name, prompt in PROMPTS.items():
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for function in (name, STACK):
            session = coreml.session(held, function, weights=weights, precision=mil.FULL)
            new = coreml.greedy(session, ids, MOST_TOKENS, stop=tokenizer.eos_token_id)
            ended = new[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(new, skip_special_tokens=True)
            rows.append([name, function, shown(text, ended)])
    return rows


def shown(text: str, ended: bool) -> str:
    """One line of an answer; three dots where it was cut off."""
    return " ".join(text.split()) + ("" if ended else " ...")


def table(head: list[str], rows: list[list[str]], width: int = 38) -> None:
    """Print rows under a head, wrapping long cells."""
    wrapped = [[textwrap.wrap(cell, width) or [""] for cell in row] for row in [head, *rows]]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(head))]
    for number, row in enumerate(wrapped):
        for depth in range(max(len(cell) for cell in row)):
            cells = [cell[depth] if depth < len(cell) else "" for cell in row]
            print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))


def size(folder: Path) -> str:
    """Size of an adapter's weights on disk."""
    weights = sum(path.stat().st_size for path in (ROOT / folder).glob("*.safetensors"))
    return f"{weights / 1e6:.2f} MB"


def fingerprint(base: Path, folders: list[Path], package: Path) -> str:
    """A hash over everything that a run of the real runtimes depends on.

    The adapters' bytes on both sides, the package's program (its weights are the base's and the
    adapters'), the base, the peers' versions, and the code that runs them.
    """
    packages = ("torch", "transformers", "peft", "mlx", "mlx-lm")
    parts = [sys.version, *(version(p) for p in packages), (ROOT / base / MARKER).read_text()]
    code = [Path(__file__), *sorted((ROOT / "validation").glob("*.py"))]
    program = ROOT / package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    files = [f for folder in folders for f in sorted((ROOT / folder).iterdir())]
    for file in [*code, program, *files]:
        parts.append(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def prove(base: Path, there: dict[str, Path], package: Path) -> dict[str, Any]:
    """Let the real runtimes run: the proofs' documents, and what all models answer."""
    documents, spoken, waiting = {}, [], {}
    # mlx's matrix products on a CPU run on one core: let them use it while torch works.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as side:
        for name, target in there.items():
            waiting[name] = side.submit(answers_mlx, base, target, PROMPTS[name])
            documents[name] = validate(Path("examples") / name, target, base)
        print("\nThe stock runtimes answer ...", flush=True)
        for name, prompt in PROMPTS.items():
            torch_says = answers_torch(base, Path("examples") / name, prompt)
            spoken += [[name, "PEFT", *torch_says], [name, "mlx-lm", *waiting[name].result()]]
    print("The package answers, run by the reference interpreter ...", flush=True)
    packaged = answers_package(base, package)
    check_packaged(spoken, packaged)
    when = time.strftime("%Y-%m-%d %H:%M")
    return {"documents": documents, "spoken": spoken, "packaged": packaged, "when": when}


def check_packaged(spoken: list[list[str]], packaged: list[list[str]]) -> None:
    """Stop unless each adapter says in the package what it says in PEFT."""
    for name, runtime, _, wanted in spoken:
        found = next(text for n, function, text in packaged if n == function == name)
        if runtime == "PEFT" and found != wanted:
            print(f"error: {name} says {found!r} in the package, {wanted!r} in PEFT")
            raise SystemExit(1)


def proof_of(base: Path, there: dict[str, Path], package: Path) -> dict[str, Any]:
    """The proof of these very bytes: run now, or an earlier run's, which is said."""
    record = ROOT / ".cache" / "demo-proof.json"
    folders = [*(Path("examples") / name for name in there), *there.values()]
    key = fingerprint(base, folders, package)
    try:
        kept = json.loads(record.read_text())
    except (OSError, ValueError):
        kept = {}
    if kept.get("key") == key and not os.environ.get("FRESH"):
        print(
            f"\nNothing has changed since the real runtimes ran on {kept['when']}: same bytes on both"
            "\nsides, same base, same code, same versions. Their results then (make demo FRESH=1 runs"
            " them again):"
        )
        for name in there:
            print(f"\n{name}")
            print_checks(kept["documents"][name])
        return dict(kept)
    proof = prove(base, there, package)
    record.write_text(json.dumps({"key": key, **proof}, indent=1))
    return proof


def main() -> None:
    """Run the demo."""
    start = time.monotonic()
    quiet()
    work = Path(".cache") / "demo"
    base = prepare().relative_to(ROOT)
    shutil.rmtree(ROOT / work, ignore_errors=True)
    (ROOT / work).mkdir(parents=True)
    print(f"base model: {base} (ready after {time.monotonic() - start:.1f} s)")

    there = {name: work / f"{name}-mlx" for name in PROMPTS}
    seconds = {}
    for name, target in there.items():
        source, back = Path("examples") / name, work / f"{name}-peft"
        loraduct("inspect", source)
        seconds[name] = [convert(source, "mlx", target, base), convert(target, "peft", back, base)]
        print(f"\nround trip {source} -> {target} -> {back}: {compare(source, back)}")
    package = work / "demo.mlpackage"
    start_package = time.monotonic()
    one, two = (Path("examples") / name for name in PROMPTS)
    functions = [f"{path.name}={path}" for path in (one, two)] + [f"{STACK}={one}+{two}:0.5"]
    options = [word for function in functions for word in ("-a", function)]
    options += ["--context", str(CONTEXT), "-o", str(package)]
    loraduct("package", "--base", base, *options)
    package_seconds = time.monotonic() - start_package
    loraduct("package", "list", package)
    proof = proof_of(base, there, package)

    print(f"\nOne message that is in neither training file:\n  {MESSAGE}\n")
    table(["adapter", "runtime", "base answers", "with the adapter"], proof["spoken"])
    print(f"\nThe Core ML package (built in {package_seconds:.1f} s), run by the interpreter:\n")
    table(["prompt", "function", "answers"], proof["packaged"], 60)
    print()
    head = "adapter,PEFT size,MLX size,to MLX,back,dW error,logits,bare base,effect,top-1"
    rows = []
    for name, target in there.items():
        parity = proof["documents"][name]["parity"]
        rows.append(
            [
                name,
                size(Path("examples") / name),
                size(target),
                f"{seconds[name][0]:.1f} s",
                f"{seconds[name][1]:.1f} s",
                f"{parity['dw_worst_relative_error']:.0e}",
                f"{parity['max_difference']:.0e}",
                f"{parity['base_max_difference']:.0e}",
                f"{parity['effect']:.1f}",
                f"{parity['top1_agreement']:.0%}",
            ]
        )
    table(head.split(","), rows)
    print(
        "\ndW error: largest relative difference of a module's update, PEFT against MLX"
        "\nlogits: largest difference between PEFT on torch and mlx-lm, with the adapter"
        "\nbare base: the same without any adapter; effect: what the adapter itself changes"
        f"\n\nAll checks passed in {time.monotonic() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
