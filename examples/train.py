"""Train the two example adapters for real, on the CPU, with stock PEFT.

    python examples/train.py              both
    python examples/train.py summary      one of them

Every seventh pair of `examples/data/NAME.jsonl` is held out; its loss before and after goes into
the model card. The seed is fixed, so a run on the same machine gives the same adapter.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from base import ROOT, prepare, quiet

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 7
BATCH = 4
ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Example = tuple[list[int], list[int]]  # token ids, labels (-100 where no loss is taken)

# Two shapes people meet: attention only, and every linear layer.
ADAPTERS: dict[str, dict[str, Any]] = {
    "summary": {
        "does": "condenses a mail or a note into one terse headline",
        "style": "one line, no greeting, no full stop: `Dinner moved to Friday, 7 pm`",
        "rank": 8,
        "alpha": 16,
        "targets": ATTENTION,
        "lr": 1.5e-3,
        "epochs": 3,
    },
    "reply": {
        "does": "drafts a short, polite answer to a mail",
        "style": "greeting, one sentence, `Best, Robin`",
        "rank": 4,
        "alpha": 8,
        "targets": ALL_LINEAR,
        "lr": 1e-3,
        "epochs": 3,
    },
}


def read_pairs(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the pairs to train on and the held-out ones."""
    lines = (ROOT / "examples" / "data" / f"{name}.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    held = pairs[6::7]
    return [pair for pair in pairs if pair not in held], held


def encode(tokenizer: Any, pair: dict[str, str]) -> Example:
    """Tokens of the chat turn; the loss counts on the answer and the mark that ends it."""
    chat = [{"role": "user", "content": pair["prompt"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode(pair["completion"]), tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def answer_loss(model: Any, examples: list[Example], pad: int) -> tuple[Any, int]:
    """Summed cross-entropy over the answer tokens of one batch, and how many they are."""
    import torch

    longest = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, (tokens, wanted) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(wanted)
        mask[row, : len(tokens)] = 1
    hidden = model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
    shifted = labels[:, 1:]
    chosen = shifted != -100  # the head is wide: only run it where a loss is taken
    logits = model.get_base_model().lm_head(hidden[:, :-1][chosen])
    loss = torch.nn.functional.cross_entropy(logits, shifted[chosen], reduction="sum")
    return loss, int(chosen.sum())


def held_out_loss(model: Any, examples: list[Example], pad: int) -> float:
    """Mean loss per answer token on the held-out pairs."""
    import torch

    model.eval()
    with torch.no_grad():
        parts = [answer_loss(model, examples[i : i + 8], pad) for i in range(0, len(examples), 8)]
    model.train()
    return float(sum(loss for loss, _ in parts)) / sum(count for _, count in parts)


def train(name: str) -> dict[str, Any]:
    """Train one adapter, save it under examples/NAME, and return what the model card says."""
    quiet()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how, folder, start = ADAPTERS[name], prepare(), time.monotonic()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums whatever the machine, and two threads gain little
    shuffle = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=how["rank"],
        lora_alpha=how["alpha"],
        target_modules=how["targets"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    kept, held = read_pairs(name)
    examples = [encode(tokenizer, pair) for pair in kept]
    unseen = [encode(tokenizer, pair) for pair in held]
    pad = tokenizer.pad_token_id
    facts = {"pairs": len(kept), "held": len(held), "before": held_out_loss(model, unseen, pad)}

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how["lr"], weight_decay=0.0)
    steps = how["epochs"] * -(-len(examples) // BATCH)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(how["epochs"]):
        shuffle.shuffle(examples)
        for at in range(0, len(examples), BATCH):
            loss, count = answer_loss(model, examples[at : at + BATCH], pad)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            fall.step()
    for weight in weights:
        weight.data = weight.data.half().float()  # what the file will hold
    facts |= {"steps": steps, "after": held_out_loss(model, unseen, pad)}
    for weight in weights:
        weight.data = weight.data.half()
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    save(model, name)
    facts["seconds"] = time.monotonic() - start
    (ROOT / "examples" / name / "README.md").write_text(model_card(name, facts))
    return facts


def save(model: Any, name: str) -> None:
    """Save with PEFT, keeping only what an adapter consists of, with ordinary file modes."""
    target = ROOT / "examples" / name
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        config = json.loads((Path(scratch) / "adapter_config.json").read_text())
        config["target_modules"].sort()  # PEFT keeps a set: its order changes from run to run
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        weights = (Path(scratch) / "adapter_model.safetensors").read_bytes()
        (target / "adapter_model.safetensors").write_bytes(weights)


def model_card(name: str, facts: dict[str, Any]) -> str:
    """The README of one adapter: what it is, what it learned from, and how far to trust it."""
    how = ADAPTERS[name]
    return f"""---
base_model: {BASE_ID}
library_name: peft
license: apache-2.0
language: en
tags:
- lora
---

# {name}

A LoRA adapter for SmolLM2-135M-Instruct that {how["does"]}
({how["style"]}).

It is an example: small enough to live in a repository, and trained for real. It shows a style
well and gets facts wrong at times, as a model of this size does.

* **Shape**: rank {how["rank"]}, alpha {how["alpha"]}, on {", ".join(f"`{t}`" for t in how["targets"])};
  stored as float16.
* **Data**: {facts["pairs"]} pairs of `examples/data/{name}.jsonl`, written for this example;
  {facts["held"]} more were held out.
* **Training**: `python examples/train.py {name}`: {facts["steps"]} steps of AdamW, batch {BATCH},
  learning rate {how["lr"]:g} falling to zero, seed {SEED}, loss on the answer only, on a CPU.
* **Held-out loss** per answer token: {facts["before"]:.2f} before, {facts["after"]:.2f} after.
* **Base while training**: a float16 copy unpacked from a 4-bit GGUF (`examples/base.py`), because
  that one needs no model hub. On the original weights the numbers differ a little.

The prompt is one user turn: "{read_pairs(name)[0][0]["prompt"].splitlines()[0]}", an empty line,
the message.
"""


if __name__ == "__main__":
    for chosen in sys.argv[1:] or list(ADAPTERS):
        done = train(chosen)
        print(
            f"{chosen}: {done['steps']} steps in {done['seconds']:.0f} s, "
            f"held-out loss {done['before']:.2f} -> {done['after']:.2f}"
        )
