"""A real model in a package: transformers' and PEFT's logits, text, sizes, readback, and a trap."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from loraduct.converters import coreml, coreml_graph, packaging
from loraduct.converters import package as editing
from loraduct.converters.package import Member
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package
from loraduct.validation import coreml as running
from loraduct.validation import mil

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
ADAPTERS = ("summary", "reply")
PREFILL, DECODE, CONTEXT = 64, 32, 128
ASKED = "Write a reply to this message.\n\nThe plumber comes on Friday at nine. Can you be at home?"


@pytest.fixture(scope="module")
def base():
    spec = importlib.util.spec_from_file_location("examples_base", ROOT / "examples" / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return base_folder.read(Path(module.prepare()))


@pytest.fixture(scope="module")
def built(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "x.mlpackage"
    wanted = {n: [Member(str(ROOT / "examples" / n))] for n in ADAPTERS}
    options = coreml.Options(context=CONTEXT)
    packaging.package(base, path, wanted, packaging.FUNCTIONS, options)
    return path


@pytest.fixture(scope="module")
def held(built):
    read = package.read(built)
    return read, mil.Weights(read)


@pytest.fixture(scope="module")
def pages(base):
    """A page of ordinary text, in windows of as many tokens as one test runs."""
    from transformers import AutoTokenizer

    text = (ROOT / "LICENSE").read_text()[1200:6000]
    ids = AutoTokenizer.from_pretrained(base.path)(text)["input_ids"]
    size = PREFILL + DECODE
    return [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)][:6]


@pytest.fixture(scope="module")
def wanted(base, pages):
    """Function -> transformers' (or PEFT's) logits in float32 of every window, and greedy text."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    chat = [{"role": "user", "content": ASKED}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    found = {}
    for name in ("base", *ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, ROOT / "examples" / name)
        model.eval()
        with torch.inference_mode():
            logits = [model(torch.tensor([p])).logits[0].numpy() for p in pages]
            ids = torch.tensor([asked])
            text = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
            )
        found[name] = logits, asked, text[0, len(asked) :].tolist()
    return found


def logits_of(held, name, ids, precision):
    session = running.session(held[0], name, weights=held[1], precision=precision)
    parts = [session.feed(ids[:PREFILL])]
    parts += [session.feed([t]) for t in ids[PREFILL:]]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_prefill_and_decode_are_transformers(held, pages, wanted, name):
    """64 tokens at once and 32 singly: the cache is part of what is tested."""
    exact = wanted[name][0][0]
    found = logits_of(held, name, pages[0], mil.STORAGE)
    error = np.abs(found - exact).max()
    assert error <= 0.25
    two = np.sort(exact, -1)[:, -2:]
    sure = two[:, 1] - two[:, 0] > 2 * error
    assert (found.argmax(-1) == exact.argmax(-1))[sure].all()
    strict = logits_of(held, name, pages[0], mil.STRICT)
    assert np.isfinite(strict).all()
    assert np.abs(strict - exact).max() <= 0.5
    full = logits_of(held, name, pages[0], mil.FULL)
    assert np.abs(full - exact).max() <= 0.02


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_a_page_of_text(held, pages, wanted, name):
    session = running.session(held[0], name, weights=held[1])
    equal = count = 0
    for ids, exact in zip(pages, wanted[name][0], strict=True):
        session.start()
        found = session.feed(ids)
        equal += int((found.argmax(-1) == exact.argmax(-1)).sum())
        count += len(ids)
    assert equal / count >= 0.97


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_text_is_pefts(held, wanted, name):
    _, asked, text = wanted[name]
    session = running.session(held[0], name, weights=held[1], precision=mil.FULL)
    assert running.greedy(session, asked, len(text)) == text


def test_eight_adapters_cost_their_bytes_and_a_megabyte_each(base, tmp_path):
    path = tmp_path / "x.mlpackage"
    coreml.build(base, path, coreml.Options(context=CONTEXT))
    before = editing.size_of(path)
    report = editing.add(
        path, {f"reply{i}": [Member(str(ROOT / "examples" / "reply"))] for i in range(8)}
    )
    tensors = sum(f.stat().st_size for f in (ROOT / "examples" / "reply").glob("*.safetensors"))
    assert report.after - before <= 8 * 1_000_000 + 8 * tensors


def test_one_adapter_comes_back_bit_for_bit(built, tmp_path, cli):
    from safetensors.numpy import load_file

    result = cli("package", "extract", built, "reply", "-o", tmp_path / "back")
    assert result.exit_code == 0, result.output
    one, two = (
        load_file(p / "adapter_model.safetensors")
        for p in (ROOT / "examples" / "reply", tmp_path / "back")
    )
    assert one.keys() == two.keys()
    assert all(one[k].tobytes() == two[k].tobytes() for k in one)


def test_validate_proves_a_packaged_adapter(built, base, tmp_path, cli):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The meeting has been moved to Thursday because\n")
    args = ("validate", ROOT / "examples" / "summary", f"{built}:summary", "--base", base.path)
    result = cli(*args, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert "passed   logits" in result.output
    assert "passed   strict half" in result.output
    other = cli(*args[:2], f"{built}:reply", *args[3:], "--prompts", prompts)
    assert other.exit_code == 3


def naive(g, d, w, module, name, x):
    """RMSNorm as it is usually written: x**2 overflows FLOAT16 beyond 255."""
    mean = g.reduce("reduce_mean", f"{name}_mean", g.binary("pow", f"{name}_sq", x, 2.0))
    total = g.binary("add", f"{name}_ms", mean, d.eps)
    unit = g.unary("rsqrt", f"{name}_r", total, epsilon=g.constant(0.0, "FLOAT16"))
    z = g.binary("mul", f"{name}_z", x, unit)
    return g.binary("mul", f"{name}_w", z, w[f"{module}.weight"])


def test_a_naive_norm_is_caught_by_name(base, pages, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(coreml_graph, "_norm", naive)
    path = tmp_path / "x.mlpackage"
    wanted = {"summary": [Member(str(ROOT / "examples" / "summary"))]}
    options = coreml.Options(context=CONTEXT)
    packaging.package(base, path, wanted, packaging.FUNCTIONS, options)
    ranges = mil.Ranges()
    session = running.session(package.read(path), "base", ranges=ranges)
    session.feed(pages[0])
    assert ranges.first is not None
    function, kind, name = ranges.first
    assert (function, kind) == ("base", "pow")
    assert name.endswith("_sq")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The meeting has been moved to Thursday because\n")
    args = ("validate", ROOT / "examples" / "summary", f"{path}:summary", "--base", base.path)
    result = cli(*args, "--prompts", prompts)
    assert result.exit_code == 3
    assert "overflows FLOAT16" in result.output
    assert "op pow" in result.output
