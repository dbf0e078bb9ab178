"""PEFT's methods other than LoRA: what each one is, by its ``peft_type`` (peft 0.21.2).

A method is read as what it does to the weights: an exact
low-rank update, a replaced parameter, or a dense update, which only an approximation brings into a
LoRA's form. Methods without a fixed update are refused with the reason. The arithmetic is NumPy's,
in float64; where PEFT draws numbers by a seed, `peft_tuners_dense` draws the same ones without
torch, or the file must hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraduct.adapter import Replacement, Update
from loraduct.formats import peft_tuners_base as of_base
from loraduct.formats import peft_tuners_dense as full
from loraduct.formats import peft_tuners_low as low
from loraduct.formats import peft_tuners_turn as turn
from loraduct.formats.peft_given import Given


@dataclass(frozen=True)
class Tuner:
    """One method. ``name``: for people. ``marks``: how its words in keys begin.

    ``form``: ``low-rank`` (exact), ``dense`` (full rank), ``replacement``, ``rows`` (of the
    embedding, replaced) or ``refused``. ``base``:
    what of the base is needed, ``shapes`` or ``weights``. ``why``: the reason of a refusal.
    ``make`` gives the update (None: it does nothing), ``bias`` the base's bias as it leaves it.
    ``integers``: leaves that hold indices. ``aside``: leaves that may be left over, without effect.
    """

    name: str
    marks: tuple[str, ...] = ()
    form: str = "refused"
    base: str = ""
    make: Callable[[Given], Update | None] | None = None
    bias: Callable[[Given], Replacement | None] | None = None
    why: str = ""
    integers: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


def _prompt(name: str) -> Tuner:
    return Tuner(name, why="adds vectors to the input or to the attention's cache, not to weights")


def _miss(g: Given) -> Update:
    return turn.bat(g) if g.config.get("init_weights") == "bat" else low.miss(g)


TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner("AdaLoRA", ("lora_",), "low-rank", make=low.adalora),
    "LOHA": Tuner("LoHa", ("hada_",), "low-rank", make=low.loha),
    "LOKR": Tuner("LoKr", ("lokr_",), "low-rank", make=low.lokr),
    "VERA": Tuner("VeRA", ("vera_",), "low-rank", "shapes", low.vera),
    "PVERA": Tuner("PVeRA", ("pvera_",), "low-rank", "shapes", low.pvera),
    "VBLORA": Tuner(
        "VB-LoRA", ("vblora_",), "low-rank", make=low.vblora, integers=("_topk_indices",)
    ),
    "DELORA": Tuner("DeLoRA", ("delora_",), "low-rank", make=low.delora),
    "GRALORA": Tuner("GraLoRA", ("gralora_",), "low-rank", make=low.gralora),
    "TINYLORA": Tuner("TinyLoRA", ("tinylora_",), "low-rank", make=low.tinylora),
    "UNILORA": Tuner(
        "Uni-LoRA",
        ("unilora_",),
        "low-rank",
        make=low.unilora,
        integers=("unilora_indices_",),
    ),
    "MISS": Tuner("MiSS", ("miss_",), "low-rank", "shapes", _miss),
    "BEFT": Tuner("BEFT", ("beft_",), "low-rank", "shapes", low.beft),
    "HRA": Tuner("HRA", ("hra_",), "low-rank", "weights", turn.hra),
    "DEFT": Tuner("DEFT", ("deft_",), "low-rank", "weights", of_base.deft),
    "PEANUT": Tuner("PEANuT", ("peanut_",), "low-rank", "weights", of_base.peanut),
    "FOURIERFT": Tuner("FourierFT", ("fourierft_",), "dense", "shapes", full.fourierft),
    "WAVEFT": Tuner("WaveFT", ("waveft_",), "dense", "shapes", full.waveft),
    "C3A": Tuner("C3A", ("c3a_",), "dense", make=full.c3a),
    "SHIRA": Tuner(
        "SHiRA", ("shira_",), "dense", "shapes", full.shira, integers=("shira_indices",)
    ),
    "SUPERTUNING": Tuner(
        "Super-Tuning",
        ("supertuning_",),
        "dense",
        "shapes",
        full.supertuning,
        integers=("supertuning_indices",),
    ),
    "RANDLORA": Tuner(
        "RandLoRA",
        ("randlora_",),
        "dense",
        "shapes",
        full.randlora,
        aside=("randlora_A", "randlora_B"),  # PEFT writes the shared ones into every module as well
    ),
    "IA3": Tuner("IA3", ("ia3_",), "dense", "weights", of_base.ia3, of_base.ia3_bias),
    "OFT": Tuner("OFT", ("oft_",), "dense", "weights", turn.oft),
    "BOFT": Tuner("BOFT", ("boft_",), "dense", "weights", turn.boft),
    "ROAD": Tuner("RoAd", ("road_",), "dense", "weights", turn.road, turn.road_bias),
    "HIRA": Tuner("HiRA", ("hira_",), "dense", "weights", of_base.hira),
    "GLORA": Tuner(
        "GLoRA",
        ("glora_",),
        "dense",
        "weights",
        of_base.glora,
        of_base.glora_bias,
        aside=("glora_C", "glora_D", "glora_E"),  # of the bias: nothing where the base has none
    ),
    "OSF": Tuner("OSF", ("osf_",), "dense", "weights", of_base.osf),
    "FROD": Tuner("FRoD", ("frod_",), "dense", "weights", of_base.frod, integers=("frod_s_",)),
    "LN_TUNING": Tuner("LN tuning", ("ln_tuning_",), "replacement"),
    "PSOFT": Tuner(
        "PSOFT",
        why="turns singular vectors of the base's weight among themselves: their signs are not in"
        " the file, and another machine's decomposition may choose others",
    ),
    "ADAMSS": Tuner(
        "AdaMSS",
        why="changes rows that scikit-learn's clustering of the base's weight chooses, and the file"
        " does not say which",
    ),
    "TRAINABLE_TOKENS": Tuner("trainable tokens", ("trainable_tokens_",), "rows"),
    "BONE": Tuner(
        "Bone",
        why="is not in PEFT 0.21 any more; MiSS took its place",
    ),
    "XLORA": Tuner("X-LoRA", why="mixes several LoRAs by a router that reads the input"),
    "POLY": Tuner("Polytropon", why="mixes modules by a router that reads the task's number"),
    "LILY": Tuner("Lily", why="mixes factors by a router that reads the input"),
    "SHADOW": Tuner("Shadow", why="runs a second network beside the model, which reads the input"),
    "ADAPTION_PROMPT": Tuner(
        "adaption prompt (LLaMA-Adapter)", why="adds attention to learned vectors, not to weights"
    ),
    "PROMPT_TUNING": _prompt("prompt tuning"),
    "MULTITASK_PROMPT_TUNING": _prompt("multitask prompt tuning"),
    "P_TUNING": _prompt("P-tuning"),
    "PREFIX_TUNING": _prompt("prefix tuning"),
    "CPT": _prompt("context-aware prompt tuning (CPT)"),
    "CARTRIDGE": _prompt("cartridge (a learned cache)"),
}
