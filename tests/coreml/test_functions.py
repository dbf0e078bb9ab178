"""Adapters as functions of packages of every family, all kinds of modules adapted, against PEFT."""

import families
import numpy as np
import pytest
import stock

from loraduct.converters import coreml, packaging
from loraduct.converters.package import Member
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package
from loraduct.validation import coreml as running

TOLERANCE = 2e-3  # of the logits' scale
PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def case(request, tmp_path_factory):
    """A package with lora, dora and their sum, and what PEFT computes with each."""
    work = tmp_path_factory.mktemp("functions")
    model, folder = families.saved(request.param, work / "base")
    targets = FUSED if request.param.startswith("phi3") else PLAIN
    one = stock.trained(model, work / "lora", 1, target_modules=targets)
    two = stock.trained(model, work / "dora", 2, target_modules=targets, use_dora=True, r=3)
    path = work / "x.mlpackage"
    wanted = {
        "lora": [Member(str(one))],
        "dora": [Member(str(two))],
        "half": [Member("lora", 0.5)],
        "both": [Member("lora", 0.7), Member("dora")],
    }
    packaging.package(
        base_folder.read(folder), path, wanted, packaging.FUNCTIONS,
        coreml.Options(context=families.CONTEXT),
    )  # fmt: skip
    ids = families.tokens(24)
    peft = {
        "base": stock.logits(folder, [], ids),
        "lora": stock.logits(folder, [(one, 1.0)], ids),
        "dora": stock.logits(folder, [(two, 1.0)], ids),
        "half": stock.logits(folder, [(one, 0.5)], ids),
        "both": stock.logits(folder, [(one, 0.7), (two, 1.0)], ids),
    }
    return package.read(path), ids, peft


@pytest.mark.parametrize("name", ["base", "lora", "dora", "half", "both"])
def test_functions_are_pefts(case, name):
    held, ids, peft = case
    session = running.session(held, name)
    found = np.concatenate([session.feed(ids[0, :18]), *(session.feed([t]) for t in ids[0, 18:])])
    assert families.off(found, peft[name]) <= TOLERANCE
    if name != "base":
        effect = np.abs(peft[name] - peft["base"]).max()
        assert effect > 10 * np.abs(found - peft[name]).max()
