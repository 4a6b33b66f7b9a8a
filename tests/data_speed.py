#!/usr/bin/env python3
"""Compares how fast data becomes tokens: `ferrotune data` against `datasets.map` with a fast tokenizer.

    python3 -m venv venv && venv/bin/pip install datasets==5.2.0 transformers jinja2
    cargo build --release -p ferrotune-cli
    venv/bin/python tests/data_speed.py --model FOLDER [--rows FILE] [--megabytes 10] [--procs 2]

FOLDER holds tokenizer.json, tokenizer_config.json and a chat template. The rows are those of FILE (alpaca; without it,
made ones), repeated and numbered until they are as many megabytes. Both sides read the file, render each conversation
by the chat template and tokenise it, in a new process; Ferrotune also finds and marks what is trained on. Times are
those of reading and encoding (loading and mapping), without starting the program and opening the tokenizer; the
rival's is the better one of processes and of the tokenizer's own threads.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the of and a to in is that it was for on are with as his they at be this from have or by".split()


def made_rows():
    for n in range(1000):
        words = [WORDS[(n * 7 + i * i) % len(WORDS)] for i in range(30 + n % 90)]
        yield {"instruction": f"Write {n} words.", "input": "", "output": " ".join(words)}


def write_rows(path, source, size):
    rows = json.loads(source.read_text()) if source else list(made_rows())
    written, number = 0, 0
    with path.open("w") as file:
        while written < size:
            row = rows[number % len(rows)]
            turns = [row["instruction"] + ("\n" + row["input"] if row.get("input") else ""), f"{number}: {row['output']}"]
            messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"], turns)]
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            number += 1
    return number


RIVAL = """
import sys, time
from datasets import load_dataset, disable_caching
from transformers import AutoTokenizer
model, path, folder, procs = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(model)
disable_caching()
def encode(batch):
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]]
    return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}
start = time.perf_counter()
rows = load_dataset("json", data_files=path, split="train", cache_dir=folder)
mapped = rows.map(encode, batched=True, batch_size=1000, remove_columns=rows.column_names, num_proc=int(procs) or None)
seconds = time.perf_counter() - start
print("RESULT", seconds, sum(map(len, mapped["input_ids"])))
"""


def rival(args, path, folder, procs):
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false" if procs else "true", HF_HUB_OFFLINE="1", HF_HOME=str(folder))
    words = [sys.executable, "-c", RIVAL, str(args.model), str(path), str(folder / f"rival{procs}"), str(procs)]
    out = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, tokens = re.search(r"RESULT (\S+) (\d+)", out).groups()
    return float(seconds), int(tokens)


def ours(args, path, folder):
    config = folder / "c.yaml"
    config.write_text(f"model_name_or_path: {args.model}\ndataset: {path}\ncutoff_len: 100000\nnum_threads: {args.procs}\n")
    environment = dict(os.environ, FERROTUNE_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
    times, work = [], 0
    # The second start finds the tokens of the first.
    for _ in range(2):
        start = time.perf_counter()
        ran = subprocess.run([args.program, "data", config, "-v", "--samples", "0"], env=environment, check=True, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        for seconds in re.findall(r"(?:read|encoded) in ([\d.]+) s", ran.stderr):
            work += float(seconds)
    tokens = int(re.search(r"^tokens +([\d,]+)", ran.stdout, re.M).group(1).replace(",", ""))
    return *times, work, tokens


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/ferrotune")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = folder / "rows.jsonl"
        rows = write_rows(path, args.rows, args.megabytes * 1e6)
        print(f"{rows} rows, {path.stat().st_size / 1e6:.1f} MB, {args.procs} cores")
        first, second, work, tokens = ours(args, path, folder)
        print(f"ferrotune data            {work:6.2f} s  {tokens / work:10,.0f} tokens/s  ({tokens} tokens)")
        print(f"  the whole program       {first:6.2f} s, its second start {second:.2f} s")
        best = 0
        for name, procs in [("processes", args.procs), ("threads", 0)]:
            seconds, count = rival(args, path, folder, procs)
            best = max(best, count / seconds)
            print(f"datasets.map, {name:<10}  {seconds:6.2f} s  {count / seconds:10,.0f} tokens/s  ({count} tokens)")
        print(f"ratio {tokens / work / best:.1f}")


main()
