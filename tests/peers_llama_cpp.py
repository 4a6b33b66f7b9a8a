#!/usr/bin/env python3
"""Do the gguf package and llama.cpp read the GGUF files that Ferrotune exports, and compute what Ferrotune computes?

    python3 tests/peers_llama_cpp.py FERROTUNE [--model FOLDER] [--work DIR] [--json FILE]

FERROTUNE is the built program. Tiny models of each family are made from hashed numbers; FOLDER is a real one in Hugging
Face's form, tried besides. `cargo xtask peers llama.cpp` brings a Python with numpy, gguf and llama-cpp-python and runs
this. Rows: family, door, pass or FAIL, what was compared.

    f32, f16     llama.cpp's greedy 32 tokens are Ferrotune's; the largest difference of logits, by the largest logit
    quantised    the mean Kullback-Leibler divergence from Ferrotune's logits of the same file (llama.cpp rounds activations too)
                 With experts, rounding sends some tokens to other experts: then f16 and quantised take the median of the tokens.
    adapter      base and adapter file in llama.cpp against base and adapter folder in Ferrotune
    tokens       llama.cpp's tokenizer against Ferrotune's, on texts
    quantize     each tensor's type and bytes against llama.cpp's own llama_model_quantize
"""

import argparse
import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import llama_cpp.llama_cpp as low
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "tests/fixtures/llama_tiny"
VOCAB, RANK = 320, 2
MIXES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
TEXTS = ["Once upon a time there was", "Hello, world! 3 cats, 12345 dogs.\n\n\tdef f(x):  return x+1", "ünïcode 🙂 你好", "<|im_start|>user\nHi<|im_end|>\n"]

BASE = dict(vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=100.0,
            bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=False)
GELU = dict(hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True)
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                  high_freq_factor=4.0, original_max_position_embeddings=32)),
    "mistral": dict(head_dim=32),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=32, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "smollm3": dict(num_hidden_layers=4),
    "olmo2": dict(rms_norm_eps=1e-5),
    "granite": dict(attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, attention_multiplier=0.2,
                    residual_multiplier=0.6, logits_scaling=2.5, tie_word_embeddings=True),
    "gemma": dict(head_dim=32, hidden_act="gelu", tie_word_embeddings=True, num_key_value_heads=1),
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=4, attn_logit_softcapping=5.0,
                   final_logit_softcapping=3.0, **GELU),
    "gemma3_text": dict(head_dim=32, num_hidden_layers=3, query_pre_attn_scalar=32, sliding_window=4,
                        sliding_window_pattern=2, rope_local_base_freq=10.0,
                        rope_scaling=dict(rope_type="linear", factor=8.0), **GELU),
    "phi3": dict(partial_rotary_factor=0.5),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(head_dim=32, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=256, norm_topk_prob=True),
    "cohere2": dict(num_hidden_layers=4, layer_norm_eps=1e-5, logit_scale=0.25, sliding_window=4, tie_word_embeddings=True),
}
# A row of ours is one of 576: what has no block of 256.
NARROW = {"llama 576": dict(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=768)}


def numbers(name, count):
    """In −1..1, as fixtures/make_families.py makes them."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 & 0xFFFFFFFF
    x = (np.arange(count, dtype=np.uint64) * 0x9E3779B9 + seed).astype(np.uint32)
    with np.errstate(over="ignore"):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    return ((x >> np.uint32(8)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def weight(name, shape):
    values = numbers(name, int(np.prod(shape))).reshape(shape)
    return (1 + values / 2 if "norm" in name else values / 8).astype(np.float32)


def save(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, it in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(it.shape), "data_offsets": [at, at + it.nbytes]}
        at += it.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for it in tensors.values():
            f.write(it.tobytes())


def shapes(family, c):
    """Projections of a layer and all tensors of a checkpoint, by their shapes."""
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    width = c.get("head_dim", hidden // heads)
    q, kv = heads * width, c["num_key_value_heads"] * width
    linear = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}
    stored = dict(linear)
    if family == "phi3":
        stored = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "self_attn.o_proj": (hidden, q),
                  "mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)}
    experts = c.get("num_local_experts", c.get("num_experts", 0))
    if experts:
        inner = c.get("moe_intermediate_size", inner)
        parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        linear = {name: it for name, it in linear.items() if "mlp" not in name}
        linear |= {f"mlp.experts.{n}.{part}": it for n in range(experts) for part, it in parts.items()}
        stored = linear | {"mlp.gate": (experts, hidden)}
    if family == "mixtral":
        theirs = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        named = lambda name: name.replace("mlp.", "block_sparse_moe.").replace(part := name.split(".")[-1], theirs.get(part, part))
        stored = {named(name): it for name, it in stored.items()}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family == "cohere2":
        norms = {"input_layernorm": hidden}
    if family == "olmo2":
        norms = {"post_attention_layernorm": hidden, "post_feedforward_layernorm": hidden, "self_attn.q_norm": q,
                 "self_attn.k_norm": kv}
    if family in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        norms |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    biased = lambda name: name[-6:] in ("q_proj", "k_proj", "v_proj") if family == "qwen2" else \
        c.get("attention_bias" if "attn" in name else "mlp_bias", False)
    every = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        every["lm_head.weight"] = (VOCAB, hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        every |= {f"{at}{name}.weight": shape for name, shape in stored.items()}
        every |= {f"{at}{name}.bias": shape[:1] for name, shape in stored.items() if biased(name)}
        every |= {f"{at}{name}.weight": (length,) for name, length in norms.items()}
    return linear, every


def make(folder, family, more):
    """A tiny model, and an adapter on all of its projections."""
    family = family.split()[0]
    config = BASE | more | dict(model_type=family)
    linear, every = shapes(family, config)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    save(folder / "model.safetensors", {name: weight(name, shape) for name, shape in every.items()})
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, cols) in linear.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = weight(f"{module}.A", (RANK, cols))
            tensors[f"{module}.lora_B.weight"] = weight(f"{module}.B", (rows, RANK))
    save(adapter / "adapter_model.safetensors", tensors)
    settings = dict(peft_type="LORA", r=RANK, lora_alpha=3, use_rslora=True, target_modules="all-linear",
                    base_model_name_or_path="", bias="none", task_type="CAUSAL_LM")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter


class Program:
    def __init__(self, path):
        self.path = str(Path(path).resolve())
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *words):
        done = subprocess.run([self.path, *map(str, words)], capture_output=True, text=True, env=self.environment)
        if done.returncode:
            sys.exit(f"ferrotune {' '.join(map(str, words))}: {done.stderr}")
        return done.stdout

    def export(self, model, format, output, adapter=None):
        shutil.rmtree(output, ignore_errors=True)
        flag = ["--adapter", adapter] if adapter else []
        self.run("export", "--model", model, "--format", format, "--output", output, "--quiet", *flag)
        return next(output.glob("*.gguf"))

    def logits(self, model, ids, adapter=None):
        flag = ["--adapter", adapter] if adapter else []
        words = ["debug", "logits", "--model", model, "--ids", ",".join(map(str, ids)), *flag]
        return np.array(json.loads(self.run(*words))["logits"], dtype=np.float64).reshape(len(ids), -1)

    def tokens(self, model, text):
        return json.loads(self.run("debug", "tokenize", "--control-tokens", "--model", model, text))["ids"]


@low.llama_log_callback
def quiet(level, text, data):
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


usual_parameters = low.llama_model_default_params


def plain_parameters():
    """Weights stay as they lie: repacked for AMX they end the process where the kernel doesn't grant its registers."""
    parameters = usual_parameters()
    parameters.use_extra_bufts = False
    return parameters


low.llama_model_default_params = plain_parameters


def open_peer(path, adapter=None):
    return llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, logits_all=True, n_threads=2, verbose=False, flash_attn=False,
                           type_k=0, type_v=0, lora_path=str(adapter) if adapter else None)


def peer_logits(peer, ids):
    peer.reset()
    peer.eval(ids)
    return np.array(peer.scores[:len(ids)], dtype=np.float64)


def greedy(peer, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(peer_logits(peer, ids)[-1].argmax()))
    return ids


def difference(a, b, over_tokens=np.max):
    return float(over_tokens(np.abs(a - b).max(-1)) / np.abs(a).max())


def divergence(a, b, over_tokens):
    log = lambda it: it - it.max(-1, keepdims=True) - np.log(np.exp(it - it.max(-1, keepdims=True)).sum(-1, keepdims=True))
    a, b = log(a), log(b)
    return float(over_tokens((np.exp(a) * (a - b)).sum(-1)))


def check_quantised(ours, reference, source, kind):
    """Types and bytes against what llama.cpp makes of the f32 file."""
    parameters = low.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = kind, 2
    if low.llama_model_quantize(str(source).encode(), str(reference).encode(), ctypes.byref(parameters)):
        return False, "llama_model_quantize failed"
    mine, theirs = ({it.name: it for it in gguf.GGUFReader(path).tensors} for path in (ours, reference))
    if mine.keys() != theirs.keys():
        return False, "other tensors"
    types = [name for name in mine if mine[name].tensor_type != theirs[name].tensor_type]
    same = lambda name: np.array_equal(mine[name].data.view(np.uint8), theirs[name].data.view(np.uint8))
    bytes_of = sum(mine[name].data.nbytes for name in mine)
    differ = [name for name in mine if name not in types and not same(name)]
    share = sum((mine[name].data.view(np.uint8) != theirs[name].data.view(np.uint8)).sum() for name in differ) / bytes_of
    reference.unlink()
    # Ties between two levels may be rounded the other way by a compiler that fuses products.
    return not types and share < 1e-2, f"{len(mine)} tensors, {len(types)} of another type, {share:.1e} of the bytes differ"


def rows_of(program, family, model, adapter, work, mixes, texts):
    def row(door, passed, what):
        rows.append(dict(family=family, door=door, passed=bool(passed), what=what))
        print(f"{family:12} {door:14} {'pass' if passed else 'FAIL'}  {what}", flush=True)

    rows = []
    experts = "num_experts_per_tok" in json.loads((model / "config.json").read_text())
    prompt = program.tokens(model, "Once upon a time there was")
    f32 = program.export(model, "gguf-f32", work / "f32")
    fields = gguf.GGUFReader(f32).fields
    row("gguf package", fields["general.file_type"].contents() == 0, f"{len(fields)} entries of metadata")
    peer = open_peer(f32)
    pairs = [(peer.tokenize(text.encode(), add_bos=False, special=True), program.tokens(model, text)) for text in texts]
    row("tokens", all(a == b for a, b in pairs), f"{sum(len(b) for _, b in pairs)} tokens of {len(pairs)} texts")
    # llama.cpp looks GELU up in a table of f16.
    exact = 2e-3 if family.startswith("gemma") else 1e-4
    for door, tolerance in (("f32", exact), ("f16", 1e-2)):
        path = f32 if door == "f32" else program.export(model, "gguf-f16", work / "f16")
        peer = open_peer(path)
        ids = greedy(peer, prompt, 32)
        ours, theirs = program.logits(path, ids), peer_logits(peer, ids)
        off = difference(ours, theirs, np.median if experts and door == "f16" else np.max)
        # In f16, two tokens that are as near to each other as rounding is large are one.
        chosen = np.take_along_axis(ours, theirs.argmax(-1)[:, None], -1)[:, 0]
        near = ours.max(-1) - chosen <= (0 if door == "f32" else 2 * off * np.abs(ours).max())
        same = near[len(prompt) - 1:].mean() >= (0.9 if experts and door == "f16" else 1)
        row(door, same and off < tolerance, f"greedy 32 {'the same' if same else 'differ'}, logits {off:.1e}")
    for mix in mixes:
        path = program.export(model, f"gguf-{mix}", work / mix)
        over = np.median if experts else np.mean
        off = divergence(program.logits(path, ids), peer_logits(open_peer(path), ids), over)
        row(mix, off <= 1e-2, f"{over.__name__} divergence {off:.1e}")
        row(f"{mix} quantize", *check_quantised(path, work / "reference.gguf", f32, MIXES[mix]))
        shutil.rmtree(work / mix)
    if adapter:
        path = program.export(model, "gguf-adapter", work / "adapter", adapter)
        ours, theirs = program.logits(model, ids, adapter), peer_logits(open_peer(f32, path), ids)
        off, moved = difference(ours, theirs), difference(program.logits(model, ids), ours)
        row("adapter", off < exact and moved > 1e-2, f"logits {off:.1e} (the adapter moves them by {moved:.1e})")
        merged = program.export(model, "gguf-f32", work / "merged", adapter)
        off = difference(ours, peer_logits(open_peer(merged), ids))
        row("merged", off < exact, f"logits {off:.1e}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ferrotune")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path, help="an adapter of that model")
    parser.add_argument("--work", type=Path, default=Path("target/peers-gguf"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="families, with commas")
    args = parser.parse_args()
    low.llama_log_set(quiet, ctypes.c_void_p(0))
    program, rows = Program(args.ferrotune), []
    wanted = [it for it in args.only.split(",") if it]
    for family, more in (FAMILIES | NARROW).items():
        if wanted and family not in wanted:
            continue
        work = args.work / family.replace(" ", "-")
        shutil.rmtree(work, ignore_errors=True)
        adapter = make(work / "model", family, more)
        rows += rows_of(program, family, work / "model", adapter, work, MIXES, TEXTS)
        shutil.rmtree(work)
    if args.model:
        rows += rows_of(program, args.model.name, args.model, args.adapter, args.work / "real", MIXES, TEXTS)
        shutil.rmtree(args.work / "real")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(not it["passed"] for it in rows)
    print(f"{len(rows)} rows, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
