#!/usr/bin/env python3
"""Each door checked by the peer itself: a tiny model of every family is trained by Ferrotune, goes out by each door, and
transformers, PEFT and bitsandbytes say what they read. `cargo xtask peers` brings a Python with them and runs this.

    python3 tests/peers.py target/release/ferrotune
    python3 tests/peers.py target/release/ferrotune --families llama,phi3 --doors bnb-out

Prints family × door: the largest difference of logits, by the largest logit (of weights, where the door says so), then pass
or FAIL. Exits with 1 where anything failed. A door is a function of a `Case`, marked with `@door`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FIXTURES = Path(__file__).resolve().parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

import torch
from make_families import FAMILIES, config_of, weight
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(2)

IDS = [5, 6, 7, 100, 299, 42, 17, 8, 9, 250, 3, 77]
# The tokenizer's vocabulary, and rows of whole blocks: on a CPU, bitsandbytes 0.50 reads others wrongly.
SIZES = dict(vocab_size=300, intermediate_size=128)
EXACT, ROUNDED = 1e-4, 5e-2


class Skip(Exception):
    """There is no such door for this family, and why."""


class Case:
    """A family's model on disk, and an adapter that Ferrotune trained for it."""

    def __init__(self, program, family, folder):
        self.program, self.family, self.folder = program, family, folder
        changes = dict(FAMILIES.get(family, {}))
        if "moe_intermediate_size" in changes:
            changes["moe_intermediate_size"] = 64
        config = config_of(family, changes | SIZES)
        model_type = config.pop("model_type")
        parsed = AutoConfig.for_model(model_type, **config)
        self.fused, self.experts = model_type == "phi3", hasattr(parsed, "num_experts_per_tok")
        for name, dtype in [("base", torch.float32), ("base16", torch.bfloat16)]:
            parsed.dtype = dtype
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(weight(key, value.shape))
            model.save_pretrained(self.path(name))
            for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
                shutil.copy(FIXTURES / "llama_tiny" / file, self.path(name))
        rows = [{"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": f"Answer {n}"}]}
                for n in range(16)]
        self.path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = dict(model_name_or_path="base", dataset="rows.jsonl", output_dir="adapter", max_steps=6, learning_rate=0.02,
                      lora_rank=4, lora_target="all", use_rslora=True, device="cpu")
        self.path("train.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in config.items()))
        self.run("train", "train.yaml")
        self.run("train", "train.yaml", "output_dir=dora", "use_dora=true")
        # What is nothing would go through any door unchanged.
        if not apart(self.ours("base"), self.ours("base", "--adapter", "adapter")) > 0.1:
            raise RuntimeError(f"{family}: the adapter changes next to nothing")

    def path(self, name):
        return self.folder / name

    def run(self, *words):
        ran = subprocess.run([self.program, *words], cwd=self.folder, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"`ferrotune {' '.join(words)}`: {ran.stderr.strip()}")
        return ran.stdout

    def ours(self, model, *more):
        """Ferrotune's logits."""
        ids = ",".join(map(str, IDS))
        out = self.run("debug", "logits", "--model", model, "--ids", ids, *more, "device=cpu")
        return torch.tensor(json.loads(out)["logits"], dtype=torch.float64)

    def export(self, out, *words):
        """A folder that `ferrotune export` writes; what it says of itself is trusted no further."""
        self.run("export", "--output", out, "--no-verify", *words, "device=cpu")
        return self.path(out)

    def theirs(self, model):
        """A model's logits in f32."""
        with torch.no_grad():
            return model.float().eval()(input_ids=torch.tensor([IDS])).logits[0].double()


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=more.pop("dtype", torch.float32), **more)


def apart(mine, theirs):
    if mine.shape != theirs.shape or not (mine.isfinite().all() and theirs.isfinite().all()):
        return float("nan")
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def dequantised(model):
    """The weights of a model in 4 bits, by bitsandbytes."""
    import bitsandbytes as bnb

    exact = {}
    for name, module in model.named_modules():
        # Of a model of more than text, the part for text is exported as a model by itself.
        if isinstance(module, bnb.nn.Linear4bit) and "vision_tower" not in name and "multi_modal" not in name:
            exact[name.replace("model.language_model.", "model.") + ".weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return exact


def same_bits(exact, folder):
    """The largest difference of weights from those of a folder; not a number where one isn't there."""
    ours = {}
    for file in folder.glob("*.safetensors"):
        ours |= load_file(file)
    off = [(ours[name].double() - value.double()).abs().max().item() if name in ours else float("nan")
           for name, value in exact.items()]
    return max(off) if off and all(it == it for it in off) else float("nan")


DOORS = {}


def door(name, allowed):
    def mark(function):
        DOORS[name] = (function, allowed)
        return function
    return mark


def by_peft(case, adapter):
    if case.fused:
        raise Skip("a base with split projections is needed")
    if case.experts:
        raise Skip("PEFT sees no linear layers in experts")
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(case.path("base")), case.path(adapter))
    saved = load_file(case.path(adapter) / "adapter_model.safetensors")
    own = {n.replace(".default", "").replace("_vector.weight", "_vector"): p for n, p in model.named_parameters() if ".lora_" in n}
    if own.keys() != saved.keys() or not all(torch.equal(own[n], it) for n, it in saved.items()):
        raise RuntimeError("PEFT has other tensors than were saved")
    return apart(case.ours("base", "--adapter", adapter), case.theirs(model))


def by_transformers(case, adapter):
    out = case.export(f"{adapter}-merged", "--model", "base", "--adapter", adapter, "export_size=0.0002")
    return apart(case.ours("base", "--adapter", adapter), case.theirs(load(out)))


@door("adapter → PEFT", EXACT)
def adapter(case):
    return by_peft(case, "adapter")


@door("DoRA → PEFT", EXACT)
def dora(case):
    return by_peft(case, "dora")


@door("merged f32", EXACT)
def merged(case):
    return by_transformers(case, "adapter")


@door("DoRA merged f32", EXACT)
def merged_dora(case):
    return by_transformers(case, "dora")


@door("merged bf16", ROUNDED)
def merged_16(case):
    out = case.export("merged16", "--model", "base16", "--adapter", "adapter")
    model = load(out, dtype="auto")
    if {it.dtype for it in model.parameters()} != {torch.bfloat16}:
        raise RuntimeError("transformers loads other types than bf16")
    return apart(case.ours("base16", "--adapter", "adapter"), case.theirs(load(out)))


@door("bnb-4bit out: weights", 0)
def bnb_out(case):
    out = case.export("coded", "--model", "base16", "--adapter", "adapter", "--format", "bnb-4bit")
    exact = dequantised(load(out, dtype=torch.bfloat16))
    return same_bits(exact, case.export("coded-read", "--model", "coded"))


@door("bnb-4bit out: logits", EXACT)
def bnb_out_logits(case):
    exact = dequantised(load(case.path("coded"), dtype=torch.bfloat16))
    model = load(case.path("merged16"))
    model.load_state_dict({k: v.float() for k, v in exact.items()}, strict=False)
    return apart(case.ours("coded"), case.theirs(model))


@door("bnb-4bit in: weights", 0)
def bnb_in(case):
    worst = 0
    for quant_type, nested, storage in [("nf4", True, torch.uint8), ("nf4", False, torch.bfloat16), ("fp4", True, torch.uint8)]:
        asked = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
        model = load(case.path("base16"), dtype=torch.bfloat16, quantization_config=asked)
        name = f"theirs-{quant_type}-{nested}"
        model.save_pretrained(case.path(name))
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
            shutil.copy(FIXTURES / "llama_tiny" / file, case.path(name))
        off = same_bits(dequantised(model), case.export(f"{name}-read", "--model", name))
        worst = off if off != off else max(worst, off)
    return worst


@door("bnb-4bit in: experts", 0)
def bnb_in_experts(case):
    """As transformers 4 has saved them: every expert and the router are linear layers, and in 4 bits."""
    if not case.experts:
        raise Skip("it has none")
    from bitsandbytes import functional

    coded, exact = {}, {}
    for name, value in load_file(case.path("base16") / "model.safetensors").items():
        if value.dim() != 2 or "embed" in name or "lm_head" in name:
            coded[name] = value
            continue
        coded[name], state = functional.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
        coded |= {f"{name}.{key}": it for key, it in state.as_dict(packed=True).items()}
        exact[name] = functional.dequantize_4bit(coded[name], state)
    shutil.copytree(case.path("base16"), case.path("experts"))
    save_file(coded, case.path("experts") / "model.safetensors", {"format": "pt"})
    return same_bits(exact, case.export("experts-read", "--model", "experts"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    # Ropes for short and long sequences are told apart by a key here, and by the sequence in transformers.
    parser.add_argument("--families", default=",".join(["llama", *(it for it in FAMILIES if it != "phi3_short")]))
    parser.add_argument("--doors", help="only doors whose names contain one of these words")
    args = parser.parse_args()
    words = (args.doors or "").split(",")
    doors = {name: it for name, it in DOORS.items() if any(word in name for word in words)}
    print("| family | " + " | ".join(doors) + " |\n" + "|---" * (len(doors) + 1) + "|")
    failed = []
    for family in args.families.split(","):
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(args.program).resolve(), family, Path(folder))
            for name, (check, allowed) in doors.items():
                try:
                    off = check(case)
                    good = off <= allowed
                    cells.append(f"{off:.1e} {'pass' if good else 'FAIL'}")
                except Skip as why:
                    good = True
                    cells.append(f"– ({why})")
                except Exception as error:
                    good = False
                    cells.append("FAIL")
                    print(f"{family}, {name}: {error}", file=sys.stderr)
                if not good:
                    failed.append(f"{family}: {name}")
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
    print(f"{len(failed)} failed" + "".join(f"\n  {it}" for it in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
