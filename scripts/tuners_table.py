"""Write docs/tuners.md: every method of PEFT, what it is read as, and what a low rank costs it.

Run from anywhere, with the development environment: .venv/bin/python scripts/tuners_table.py
Needs torch and PEFT; everything is random and tiny, and takes half a minute.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RANK = 8
HEAD = """# PEFT's methods other than LoRA

Made by `scripts/tuners_table.py` from the table that `loraduct convert` reads by
(`formats/peft_tuners.py`), for peft {peft}. Every row but the refused ones is tested against what
stock PEFT merges into the weights (`tests/conformance/test_tuners.py`).

- **exact**: the update is low-rank; the LoRA written is the same update.
- **full rank**: a LoRA can only approximate it: `--rank N` or `--energy 0.99` with
  `--allow-approximate`. The account names what each module loses of its norm. The last column is
  that loss at rank {rank}, the median over the modules of a tiny model (widths 48 to 112) whose
  adapter holds random numbers; a trained one may lose less.
- **replaced**: whole parameters; they go to MLX's full form, where all names are the same.
- **kept**: rows of the embedding; from PEFT to PEFT they stay what they are, and neither a LoRA nor
  mlx-lm's adapters have a place for them.
- **base**: whether `--base` is needed: for the shapes of its weights, or for the weights.

| method | peft_type | form | base | loss at rank {rank} |
|---|---|---|---|---|
"""
REFUSED = """
## Refused

| method | peft_type | because it |
|---|---|---|
"""
NOTES = """
## What else a file may lack

- VeRA, PVeRA, RandLoRA, FRoD and TinyLoRA with `save_projection=False`, Uni-LoRA with
  `save_indices=False` and Super-Tuning with `save_precomputed_indices=False` are refused: PEFT
  makes anew what is missing, by a seed or from the base, and not the same everywhere.
- TinyLoRA with several shared vectors: which module has which follows from its place in the model,
  which is told by the numbers that PEFT drew for that place.
- FourierFT and WaveFT draw places by a seed from torch's generator; loraduct draws the same ones
  without torch. Of WaveFT's wavelets, db1 (the default) is carried.
- LoHa and LoKr have a low rank that can exceed the weight's own: then they are of full rank.
- MiSS with `init_weights="bat"` depends on the base's weights and has full rank.
- IA3, RoAd and GLoRA scale the output, and with it the base's bias: PEFT's form holds the new bias,
  MLX's does not.
- BOFT has more than one butterfly factor only where PEFT's CUDA extension was built; such files are
  read as PEFT reads them there.
- PVeRA with `sample_at_inference`, convolutions and
  embeddings of these methods are refused.
"""
FORMS = {"low-rank": "exact", "dense": "full rank", "replacement": "replaced", "rows": "kept"}


def load(name: str) -> ModuleType:
    """A module of the conformance tests, which are no package."""
    file = ROOT / "tests" / "conformance" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def loss_of(kind: str, tests: ModuleType, base: Path, folder: Path) -> float:
    """The median residual of the method's first case at rank `RANK`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from loraduct.converters.approximate import Wanted, approximate
    from loraduct.formats import base as bases
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, tests.config_of(kind, 0))
    tests.randomise(tuned)
    tuned.save_pretrained(folder)
    adapter = read(folder, ReadOptions(base=bases.read(base)))
    _, residuals = approximate(adapter, adapter.updates, Wanted(RANK, allowed=True))
    return statistics.median(residuals.values())


def main() -> None:
    """Measure and write."""
    warnings.simplefilter("ignore")
    import peft

    from loraduct.formats.peft_tuners import TUNERS

    zoo, tests = load("zoo"), load("tuners")
    rows, refused = [], []
    with tempfile.TemporaryDirectory() as scratch:
        base = zoo.build("llama", Path(scratch) / "base").path
        for kind, tuner in TUNERS.items():
            if tuner.form == "refused":
                refused.append(f"| {tuner.name} | {kind} | {tuner.why} |")
                continue
            loss = "none"
            if tuner.form == "dense":
                loss = f"{loss_of(kind, tests, base, Path(scratch) / kind):.0%}"
            row = (tuner.name, kind, FORMS[tuner.form], tuner.base or "no", loss)
            rows.append(f"| {' | '.join(row)} |")
    text = HEAD.format(peft=peft.__version__, rank=RANK) + "\n".join(rows) + "\n"
    text += REFUSED + "\n".join(refused) + "\n" + NOTES
    (ROOT / "docs" / "tuners.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
