"""The pool with the trained adapters on SmolLM2, both runtimes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loraduct import AdapterPool

pytestmark = pytest.mark.heavy
IDS = [504, 4398, 314, 260, 2240, 1833, 282, 198]


@pytest.fixture(scope="module")
def base(repo):
    folder = repo / ".cache" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        pytest.skip("make demo makes the base")
    return folder


def test_torch_fused_and_not(repo, base):
    """Stock PEFT's logits of each adapter and of a stack, in float32; half precision restored."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def fresh(dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()

    def logits(model):
        with torch.inference_mode():
            return model(torch.tensor([IDS])).logits[0].float().numpy()

    names = ("reply", "summary")
    stock = PeftModel.from_pretrained(fresh(), repo / "examples" / "reply", adapter_name="reply")
    stock.load_adapter(repo / "examples" / "summary", adapter_name="summary")
    wanted = {}
    for stack in (("reply",), ("summary",), names):
        stock.base_model.set_adapter(list(stack))
        wanted[stack] = logits(stock.eval())
    del stock
    model = fresh()
    plain = logits(model)
    for fused in (False, True):
        with AdapterPool(model, base, fused=fused) as pool:
            for name in names:
                pool.load(name, repo / "examples" / name)
            for stack in wanted:
                with pool.using(*stack):
                    assert np.abs(logits(model) - wanted[stack]).max() < 2e-4
        assert np.array_equal(logits(model), plain)
    model = fresh(torch.float16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with AdapterPool(model, fused=True) as pool:  # it knows its folder
        pool.load("reply", repo / "examples" / "reply")
        pool.activate("reply")
        q = "model.layers.3.self_attn.q_proj.weight"
        assert not torch.equal(model.get_parameter(q), before[q])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_suite_on_mlx(cli, repo, base, tmp_path):
    pytest.importorskip("mlx_lm")
    done = cli(
        "convert", repo / "examples" / "reply", "--to", "mlx", "--base", base, "-o", tmp_path / "m"
    )
    assert done.exit_code == 0, done.stderr
    words = ["--beside", repo / "examples" / "summary", "--suite", "swap", "--json"]
    done = cli("validate", tmp_path / "m", "--base", base, *words)
    assert done.exit_code == 0, done.output
    (found,) = [s for s in json.loads(done.stdout)["suites"] if s["name"] == "swap"]
    assert found["numbers"]["backend"] == "mlx"
    assert found["numbers"]["errors"] == 0
