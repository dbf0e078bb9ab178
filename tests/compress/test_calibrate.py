"""What calibration measures, against torch's own hooks, norms and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import families  # noqa: E402

from loraduct.converters import coreml as builder  # noqa: E402
from loraduct.errors import Refused  # noqa: E402
from loraduct.formats import base as base_folder  # noqa: E402
from loraduct.formats.coreml import package as packages  # noqa: E402
from loraduct.validation import calibrate, calibrate_base  # noqa: E402

ROWS = [families.tokens(n)[0].tolist() for n in (11, 7)]
FORMS = {
    "any length": {},
    "fixed": {"shapes": (1, 4)},
    "stateless": {"stateless": True, "target": "iOS17", "shapes": (16,)},
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, its folder): untied with biases, and tied."""
    return families.saved(request.param, tmp_path_factory.mktemp(request.param))


def package_of(folder: Path, path: Path, **options: Any) -> calibrate.Runner:
    base = base_folder.read(folder)
    builder.build(base, path, builder.Options(context=48, **options))
    return calibrate.Runner(packages.read(path))


def hooked(model: Any) -> dict[str, np.ndarray]:
    """E[x_j^2] at every linear layer, by torch."""
    seen: dict[str, list[Any]] = {}
    hooks = [
        m.register_forward_hook(lambda _, given, __, n=n: seen.setdefault(n, []).append(given[0]))
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {
        n: (torch.cat([x[0] for x in xs]).double() ** 2).mean(0).numpy() for n, xs in seen.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_moments_of_a_package_are_those_that_torch_sees(
    world: Any, form: str, tmp_path: Path
) -> None:
    model, folder = world
    runner = package_of(folder, tmp_path / "x.mlpackage", **FORMS[form])
    found = calibrate.second_moments(runner, ROWS)
    wanted = hooked(model)
    tied = model.config.tie_word_embeddings
    names = {
        n: "model_embed_tokens_weight"
        if n == "lm_head" and tied
        else n.replace(".", "_") + "_weight"
        for n in wanted
    }
    assert set(names.values()) == set(found)
    for n, value in wanted.items():
        assert np.allclose(found[names[n]], value, rtol=2e-3, atol=1e-6 * value.max()), n


def test_moments_of_a_base_are_those_of_its_norms_results(world: Any) -> None:
    model, folder = world
    found = calibrate_base.Runner(base_folder.read(folder)).second_moments(ROWS)
    sums: dict[str, Any] = {}
    with torch.no_grad():
        for row in ROWS:
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
            given = {
                f"model.layers.{i}.self_attn.{p}_proj.weight": layer.input_layernorm(states[i])
                for i, layer in enumerate(model.model.layers)
                for p in "qkv"
            }
            head = "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
            given[f"{head}.weight"] = states[-1]
            for name, x in given.items():
                sums[name] = sums.get(name, 0) + (x[0].double() ** 2).sum(0)
    count = sum(map(len, ROWS))
    for name, total in sums.items():
        assert np.allclose(found[name], total.numpy() / count, rtol=1e-4), name


@pytest.mark.parametrize("kind", ["package", "base"])
def test_a_probe_is_the_loss_that_torch_finds_and_leaves_no_trace(
    world: Any, tmp_path: Path, kind: str
) -> None:
    model, folder = world
    runner: Any = calibrate_base.Runner(base_folder.read(folder))
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "package":
        runner = package_of(folder, tmp_path / "x.mlpackage")
        name = "model_layers_1_mlp_up_proj_weight"
    loss = calibrate.probe(runner, ROWS)
    before = runner.logits(ROWS)
    layer = model.model.layers[1].mlp.up_proj
    kept = layer.weight.detach().clone()
    changed = (kept * 16).round() / 16

    def logs() -> Any:
        with torch.no_grad():
            rows = [model(torch.tensor([r])).logits[0].double() for r in ROWS]
        return torch.log_softmax(torch.cat(rows), -1)

    try:
        p = logs()
        with torch.no_grad():
            layer.weight.copy_(changed)
        q = logs()
    finally:
        with torch.no_grad():
            layer.weight.copy_(kept)
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert wanted > 1e-4
    got = loss({name: changed.numpy()})
    assert got == pytest.approx(wanted, rel=0.02)
    assert loss({"no_such_weight": changed.numpy()}) is None
    assert loss({name: kept.numpy()}) == pytest.approx(0, abs=1e-9)
    assert all(np.array_equal(x, y) for x, y in zip(before, runner.logits(ROWS), strict=True))


def test_quality_is_torchs_cross_entropy_and_divergence() -> None:
    rng = np.random.default_rng(3)
    before = [rng.normal(size=(len(r), 96)).astype(np.float32) for r in ROWS]
    after = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in before]
    found = calibrate.quality("base", ROWS, before, after)
    xs, ys = (torch.from_numpy(np.concatenate(z)).double() for z in (before, after))
    p, q = torch.log_softmax(xs, -1), torch.log_softmax(ys, -1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert found.top1 == (xs.argmax(-1) == ys.argmax(-1)).double().mean().item()
    for logits, value in ((before, found.before), (after, found.after)):
        losses = [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(x[:-1]).double(), torch.tensor(r[1:]), reduction="sum"
            )
            for x, r in zip(logits, ROWS, strict=True)
        ]
        count = sum(len(r) - 1 for r in ROWS)
        assert value == pytest.approx(np.exp(sum(losses).item() / count))


def test_what_is_checked_was_not_calibrated_with() -> None:
    one = calibrate.parted([list(range(90))], 1000, 96, Path("t"))
    assert (one.calibration, one.held_out) == ([list(range(60))], [list(range(60, 90))])
    assert not one.note
    rows = [[i] * 10 for i in range(6)]
    several = calibrate.parted(rows, 1000, 96, Path("t"))
    assert several.calibration == [rows[i] for i in (0, 1, 3, 4)]
    assert several.held_out == [rows[2], rows[5]]
    pair = calibrate.parted(rows[:2], 1000, 96, Path("t"))
    assert (pair.calibration, pair.held_out) == ([rows[0]], [rows[1]])


def test_a_text_beyond_the_context_is_cut_and_that_is_said() -> None:
    made = calibrate.parted([[1] * 500], 20, 96, Path("t"))
    assert [len(r) for r in made.calibration + made.held_out] == [20, 20]
    assert made.note.startswith("40 of the text's 500 tokens are used")
    many = calibrate.parted([[1] * 100] * 9, 1000, 96, Path("t"))
    assert sum(map(len, many.calibration)) == calibrate.MOMENTS
    assert sum(map(len, many.held_out)) == calibrate.HELD_OUT


@pytest.mark.parametrize(
    ("rows", "what"), [([[1, 2]], "holds 2 tokens"), ([], "0 tokens"), ([[96] * 20], "token 96")]
)
def test_what_is_no_text_for_the_model_is_refused(rows: Any, what: str) -> None:
    with pytest.raises(Refused, match=what):
        calibrate.parted(rows, 1000, 96, Path("t"))
