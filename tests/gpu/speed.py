"""Training speed on a GPU beside what its matrix products could give, on shapes of real models with random weights.

    python3 tests/gpu/speed.py [--shapes 3b,1b] [--steps 8] [key=value …]      (after tests/gpu/run.py has unpacked the programs)

For each mode of training: tokens a second (median of the steps after the third), its share of the bound that the measured rate of
large bf16 products sets to a step without recomputation, memory, and seconds to the end of the first step. `decode`: greedy tokens a second after
a short prompt, with the adapter that a mode before has trained.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

PROGRAMS = Path("/tmp/ferrotune-gpu-test")
SHAPES = {
    # hidden, layers, heads, kv heads, head size, inner, tied
    "1b": (2048, 16, 32, 8, 64, 8192, True),
    "3b": (3072, 28, 24, 8, 128, 8192, True),
    "8b": (4096, 32, 32, 8, 128, 14336, False),
}
VOCAB = 128_256
RANK = 16
MODES = {
    "fastest": ["recompute=keep"],
    "lean": ["recompute=all"],
    "leanest": ["recompute=lean"],
    "batch 1, fastest": ["recompute=keep", "per_device_train_batch_size=1"],
    "batch 8, fastest": ["recompute=keep", "per_device_train_batch_size=8"],
}


def make_model(name, folder, tokenizer):
    """A checkpoint of these shapes, bf16, normal weights."""
    hidden, layers, heads, kv, size, inner, tied = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            (folder / file.name).write_bytes(file.read_bytes())
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=size, intermediate_size=inner, tie_word_embeddings=tied,
        rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, hidden_act="silu", torch_dtype="bfloat16",
        bos_token_id=1, eos_token_id=2,
    )
    (folder / "config.json").write_text(json.dumps(config))
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    matrix = lambda rows, cols: (torch.randn(rows, cols, device="cuda", dtype=torch.float32) * 0.02).bfloat16().cpu()
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    if not tied:
        tensors["lm_head.weight"] = matrix(VOCAB, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        for part, rows, cols in [
            ("self_attn.q_proj", heads * size, hidden), ("self_attn.k_proj", kv * size, hidden), ("self_attn.v_proj", kv * size, hidden),
            ("self_attn.o_proj", hidden, heads * size), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ]:
            tensors[f"{at}{part}.weight"] = matrix(rows, cols)
        for part in ["input_layernorm", "post_attention_layernorm"]:
            tensors[f"{at}{part}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def ceiling():
    """TFLOP/s of large bf16 products, sustained for two seconds."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    start, count = time.time(), 0
    while time.time() - start < 2:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        count += 20
    rate = count * 2 * 8192**3 / (time.time() - start) / 1e12
    del a, b
    torch.cuda.empty_cache()
    return rate


def step_flops(name, tokens, length):
    """A step without recomputation: base products both ways, head, causal attention, adapters."""
    hidden, layers, heads, kv, size, inner, _ = SHAPES[name]
    kinds = [(heads * size, hidden), (kv * size, hidden), (kv * size, hidden), (hidden, heads * size), (inner, hidden), (inner, hidden), (hidden, inner)]
    linear = layers * sum(rows * cols for rows, cols in kinds)
    adapters = layers * RANK * sum(rows + cols for rows, cols in kinds)
    attention = 6 * length * heads * size * layers
    return tokens * (4 * linear + 4 * VOCAB * hidden + attention + 6 * adapters)


def decode(program, shape, folder, out, keys):
    adapter = ["--adapter", "/tmp/speed-out"] if Path("/tmp/speed-out/adapter_model.safetensors").exists() else []
    words = [str(program), "-v", "chat", "--model", str(folder), *adapter, "--prompt", "hello", "--greedy", "--max-new-tokens", "513"]
    ran = subprocess.run([*words, "quantization_bit=4", *keys], capture_output=True, text=True, errors="replace")
    (out / f"speed-{shape}-decode.log").write_text(ran.stdout + ran.stderr)
    pace = re.search(r"\d+ tokens, .*", ran.stderr)
    print(f"{shape}, decode{', adapter' * bool(adapter)}: {pace[0] if pace else ran.stderr.strip()[-400:]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="3b")
    parser.add_argument("--modes", default="fastest;lean;leanest", help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("keys", nargs="*")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", "gpu-out"))
    out.mkdir(exist_ok=True)
    rate = ceiling()
    print(f"{torch.cuda.get_device_name()}: large bf16 products {rate:.0f} TFLOP/s, sustained")
    program = next(PROGRAMS.rglob("ferrotune"))
    rows = Path("/tmp/speed.jsonl")
    rows.write_text("".join(json.dumps({"text": f"{i} " + "".join(chr(97 + (i * 31 + j * j) % 26) for j in range(3 * args.length))}) + "\n" for i in range(64)))
    for shape in args.shapes.split(","):
        folder = Path(f"/tmp/speed-{shape}")
        make_model(shape, folder, Path("tests/fixtures/llama_tiny"))
        torch.cuda.empty_cache()
        for mode in args.modes.split(";"):
            if mode == "decode":
                decode(program, shape, folder, out, args.keys)
                continue
            keys = dict(
                model_name_or_path=folder, dataset=rows, output_dir="/tmp/speed-out", overwrite_output_dir="true", quantization_bit=4,
                lora_rank=RANK, lora_alpha=RANK, lora_target="all", optim="adamw_8bit", cutoff_len=args.length,
                per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=args.steps, logging_steps=1,
                save_strategy="no", learning_rate=1e-4,
            )
            config = Path("/tmp/speed.yaml")
            config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
            words = [str(program), "-v", "train", str(config), *MODES[mode], *args.keys]
            start = time.time()
            ran = subprocess.run(words, capture_output=True, text=True)
            (out / f"speed-{shape}-{mode.replace(', ', '-').replace(' ', '-')}.log").write_text(ran.stdout + ran.stderr)
            if ran.returncode:
                print(f"{shape}, {mode}: {ran.stderr.strip().splitlines()[-1][:300]}")
                continue
            lines = [json.loads(line) for line in Path("/tmp/speed-out/trainer_log.jsonl").read_text().splitlines()]
            tokens = [line["total_tokens"] for line in lines]
            times = [line["total_tokens"] / line["throughput"] for line in lines]
            steps = [b - a for a, b in zip(times, times[1:])]
            steps = steps[2:] or steps[-1:]
            per_step = tokens[1] - tokens[0]
            pace = per_step / statistics.median(steps)
            bound = rate * 1e12 / (step_flops(shape, per_step, args.length) / per_step)
            memory = re.search(r"peak GPU memory.*", ran.stdout)
            read = re.search(r"weights read in ([\d.]+) s", ran.stdout + ran.stderr)
            print(f"{shape}, {mode}: {pace:,.0f} tokens/s, {100 * pace / bound:.0f} % of {bound:,.0f}; {memory and memory[0]}; whole run {time.time() - start:.1f} s, weights read {read and read[1]} s, trained {times[-1]:.1f} s, first step {times[0]:.2f} s; loss {lines[-1]['loss']:.3f}")


if __name__ == "__main__":
    main()
