"""Our reading of PEFT's config against PEFT's own functions."""

from __future__ import annotations

import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.errors import Refused
from loraduct.formats import peft_config
from loraduct.patterns import first_matches, is_plain, plain_suffix

FILE = Path("adapter_config.json")
MODULES = [
    f"model.layers.{i}.{m}"
    for i in range(12)
    for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
] + ["lm_head", "model.layers.2.inner.layers.1.mlp.down_proj", "h.2.layers.0.q_proj"]
KEYS = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj",
     r".*\.k_proj", r"layers\.\d\..*", "^model.layers.1.*", "lm_head", "self_attn", "ayers.0.mlp.down_proj",
     "layers.1?.mlp.down_proj", "base_model.model.model.layers.0.self_attn.q_proj", "down.proj"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(KEYS, st.integers(1, 64), max_size=5),
    alphas=st.dictionaries(KEYS, st.integers(1, 64), max_size=5),
    rooted=st.booleans(),
)
def test_scales_are_pefts(ranks: dict[str, int], alphas: dict[str, int], rooted: bool) -> None:
    from peft.utils.other import get_pattern_key

    config = {
        "r": 8,
        "lora_alpha": 12,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rooted,
    }
    ours = peft_config.scales(config, MODULES, FILE)
    for module in MODULES:
        r = ranks.get(get_pattern_key(ranks.keys(), module), 8)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 12)
        assert ours[module] == (r, alpha / math.sqrt(r) if rooted else alpha / r)


TARGETS = st.one_of(
    st.lists(st.sampled_from(["q_proj", "mlp.down_proj", "proj", "lm_head", "model.layers.3.self_attn.k_proj"]),
             min_size=1, max_size=4, unique=True),
    st.sampled_from([r".*\.q_proj", "q_proj", r"model\.layers\.(1|2)\..*", "lm_head"]),
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    targets=TARGETS,
    exclude=st.sampled_from(
        [None, ["k_proj"], r".*layers\.2\..*", ["model.layers.0.mlp.down_proj"]]
    ),
    layers=st.sampled_from([None, 1, [0, 2], [], [40], [-1], -1]),
    pattern=st.sampled_from(
        [None, "layers", ["h", "layers"], "blocks", [], "", [""], "model.layers", "modelXlayers",
         r"model\.layers", "(h|layers)", "h|layers", "layers|h", ["x", "l.*s"], r"layers\.1", "m..el.layers"]
    ),
    saved=st.sampled_from([None, [], ["lm_head"], ["self_attn"], ["mlp.down_proj"], ["proj"]]),
)  # fmt: skip
def test_targets_are_pefts(
    targets: Any, exclude: Any, layers: Any, pattern: Any, saved: Any
) -> None:
    """Patterns of layers are regexes, and what lies in a module to save gets no adapter."""
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {"target_modules": targets, "exclude_modules": exclude, "layers_to_transform": layers,
              "layers_pattern": pattern, "modules_to_save": saved}  # fmt: skip
    ours = peft_config.targeted(fields, MODULES, FILE)
    config = SimpleNamespace(**fields, target_parameters=None)
    theirs = [bool(check_target_module_exists(config, m)) for m in MODULES]
    assert ours == theirs


NAMES = st.text("ab.0", min_size=1, max_size=8)


@settings(max_examples=300)
@given(key=NAMES, name=NAMES)
def test_plain_keys_need_no_regex(key: str, name: str) -> None:
    assert is_plain(key)
    assert plain_suffix(key, name) == (re.match(rf"(.*\.)?({key})$", name) is not None)


@pytest.mark.parametrize("off_main_thread", [False, True])
def test_regex_bombs_end(off_main_thread: bool) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            first_matches(["(a+)+$"], ["a" * 40 + "!"], full=False, file=FILE, what="rank_pattern")
        except Refused as e:
            caught.append(e)

    start = time.monotonic()
    if off_main_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert time.monotonic() - start < 10
    assert "rank_pattern" in str(caught[0])


def test_every_peft_kind_is_known_by_name() -> None:
    from peft import PeftType

    assert {t.value for t in PeftType} <= peft_config.KINDS


def test_every_lora_field_is_known() -> None:
    """A new PEFT with a field we never heard of must be looked at, not ignored."""
    from peft import LoraConfig

    assert set(LoraConfig().to_dict()) <= peft_config.KNOWN
