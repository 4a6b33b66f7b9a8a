#!/usr/bin/env python3
"""Compares steps of LoRA on a real model with transformers and PEFT: the same rows in the same order, the same first
adapter; f32 on the CPU, or bf16 on a GPU.

    cargo build --release
    python3 tests/curve.py MODEL_FOLDER [--steps 200] [--data FILE] [--gpu]      (with torch, transformers, peft, safetensors)

FILE has conversations (JSON lines with messages) or is a JSON list in Alpaca's form; else the quick start's are taken.
Prints the losses' differences: in f32 they have to stay below 1e-3 of the loss on average and below 1e-2 at most, in bf16
below 1e-2 on average. Before that, both sides have to see the same tokens: transformers' rendering of every row equals
ours, and the log counts as many as the steps' rows have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

ROOT = Path(__file__).resolve().parent.parent
BATCH, RATE = 2, 5e-4


def conversations(path, most):
    """Lines with messages."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return text.splitlines()[:most]

    def messages(row):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]

    return [json.dumps({"messages": messages(row)}) for row in json.loads(text)[:most]]


def rows(program, model, lines, steps):
    """Ids and marks of conversations, as often as the steps need them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    seen = []
    for line in lines:
        rendered = subprocess.run(
            [program, "debug", "render", "--model", model], input=line, capture_output=True, text=True, check=True
        )
        it = json.loads(rendered.stdout)
        theirs = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        theirs = tokenizer(theirs, add_special_tokens=False).input_ids
        assert it["ids"] == theirs, f"transformers has other tokens for {line}"
        seen.append((it["ids"], it["trained_tokens"]))
    steps_of_an_epoch = -(-len(seen) // BATCH)
    return [seen[BATCH * (step % steps_of_an_epoch):][:BATCH] for step in range(steps)]


def ferrotune(program, model, data, folder, *words):
    keys = [f"model_name_or_path={model}", f"dataset={data}", f"output_dir={folder}", "seed=1",
            "disable_shuffling=true", f"per_device_train_batch_size={BATCH}", "lora_rank=8", "logging_steps=1",
            "save_strategy=no", "overwrite_output_dir=true", "warmup_steps=10", *words]
    config = Path(folder).parent / "empty.yaml"
    config.write_text("")
    subprocess.run([program, "train", "--quiet", config, *keys], check=True, stdout=subprocess.DEVNULL)
    log = (Path(folder) / "trainer_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in log]
    return [it["loss"] for it in log], [it["total_tokens"] for it in log]


def transformers(model, adapter, batches, gpu):
    device = "cuda" if gpu else "cpu"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if gpu else torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).to(device)
    trained = [it for it in model.parameters() if it.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 10, len(batches))
    losses = []
    for batch in batches:
        total = sum(sum(marks[1:]) for _, marks in batch)
        loss = 0.0
        for ids, marks in batch:
            labels = torch.tensor([token if mark else -100 for token, mark in zip(ids, marks)], device=device)
            logits = model(torch.tensor([ids], device=device)).logits[0, :-1].float()
            part = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / total
            part.backward()
            loss += float(part)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--data", type=Path, metavar="FILE", default=ROOT / "examples/identity.jsonl")
    parser.add_argument("--gpu", action="store_true", help="bf16 on a GPU")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/ferrotune")
    args = parser.parse_args()
    program, model, steps, gpu = args.program, args.model, args.steps, args.gpu
    device = "device=cuda" if gpu else "device=cpu"
    lines = conversations(args.data, BATCH * steps)
    with tempfile.TemporaryDirectory() as folder:
        batches = rows(program, model, lines, steps)
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(lines) + "\n")
        # A step of length 0 writes the first adapter.
        ferrotune(program, model, data, f"{folder}/first", device, "max_steps=1", "learning_rate=0")
        run = (program, model, data, f"{folder}/run", device)
        ours, seen = ferrotune(*run, f"max_steps={steps}", f"learning_rate={RATE}")
        tokens = [sum(len(ids) for ids, _ in batch) for batch in batches]
        assert seen == list(accumulate(tokens)), "the run has seen other tokens than transformers will"
        theirs = transformers(model, f"{folder}/first", batches, gpu)
    off = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step + 1:4}  ours {ours[step]:.6f}  transformers {theirs[step]:.6f}  {off[step]:.1e}")
    mean, most = sum(off) / len(off), max(off)
    print(f"{steps} steps: relative difference {mean:.1e} on average, {most:.1e} at most")
    sys.exit(0 if (mean < 1e-2 if gpu else mean < 1e-3 and most < 1e-2) else 1)


main()
