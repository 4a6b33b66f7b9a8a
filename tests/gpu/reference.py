#!/usr/bin/env python3
"""What transformers, PEFT and bitsandbytes make and compute for tests/gpu/run.py, which calls it:

    reference.py model FOLDER WIDTH LAYERS VOCABULARY       a random Llama with the tokenizer of tests/fixtures/llama_tiny
    reference.py model FOLDER WIDTH LAYERS VOCABULARY EXPERTS       a random Mixtral, two experts for each token
    reference.py adapter FOLDER MODEL RANK                  a PEFT adapter for it, B random too
    reference.py start CHECKPOINT ADAPTER                   puts the adapter into a checkpoint of step 1
    reference.py peft DEVICE MODEL ADAPTER FOLDER           see `compare`
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "llama_tiny"
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD, IGNORE = 64, -100


def make_model(folder, width, layers, vocabulary, experts=0):
    """Head size 64, four query heads to each key-value head where there are as many; bf16, of weights that keep the size of
    what they multiply."""
    heads = int(width) // HEAD
    config = LlamaConfig(
        vocab_size=int(vocabulary), hidden_size=int(width), intermediate_size=int(width) * 11 // 4, num_hidden_layers=int(layers),
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4 if heads % 4 == 0 and heads > 4 else heads // 2),
        head_dim=HEAD, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[1] ** -0.5)
    Path(folder).mkdir(parents=True)
    # The rope's buffers aren't made on "meta", and aren't saved.
    state = {name: it.to(torch.bfloat16).contiguous() for name, it in model.state_dict().items()}
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    if int(experts):
        state, config = with_experts(state, config, int(experts), generator)
    save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)


def with_experts(state, config, experts, generator):
    """A Llama's weights as a Mixtral's, the mlps as narrow experts, under the names of the hub."""
    inner = config.hidden_size
    config = MixtralConfig(
        **{key: getattr(config, key) for key in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
            "rope_parameters", "dtype")},
        intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=2, architectures=["MixtralForCausalLM"])
    state = {name: it for name, it in state.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.block_sparse_moe"
        shapes = {f"{at}.gate.weight": (experts, inner)}
        shapes |= {f"{at}.experts.{expert}.w{n}.weight": (inner, inner) for expert in range(experts) for n in (1, 2, 3)}
        for name, shape in shapes.items():
            state[name] = (torch.randn(shape, generator=generator) * inner ** -0.5).to(torch.bfloat16)
    return state, config


def make_adapter(folder, model, rank):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(
        r=int(rank), lora_alpha=2 * int(rank), bias="none", task_type="CAUSAL_LM", target_modules=KINDS))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.05
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def start(checkpoint, adapter):
    """The adapter and AdamW as if it had taken one step of gradients of zero: what a run can go on from with any B."""
    shutil.copy(f"{adapter}/adapter_model.safetensors", checkpoint)
    path = f"{checkpoint}/optimizer.safetensors"
    state = load_file(path)
    save_file({name: torch.ones_like(it) if name == "step" else torch.zeros_like(it) for name, it in state.items()}, path)


# ---------------------------------------------------------------- PEFT

def dense(model):
    """In f32, with the numbers that bitsandbytes' four bits of bf16 weights stand for: what both sides round on their way to."""
    import bitsandbytes.functional as bnb

    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed, state = bnb.quantize_4bit(module.weight.data.to(DEVICE, torch.bfloat16), blocksize=64,
                                                  compress_statistics=True, quant_type="nf4")
                module.weight.copy_(bnb.dequantize_4bit(packed, state).float())
    return model.to(DEVICE)


def four_bit(model):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0 if DEVICE == "cuda" else "cpu"})


def adapted(model, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def loss_of(model, sequences, autocast):
    """Mean over the trained tokens, as transformers' Trainer computes it: padded, logits in f32."""
    longest = max(len(it["ids"]) for it in sequences)
    ids, labels, seen = (torch.full((len(sequences), longest), of, device=DEVICE) for of in (0, IGNORE, 0))
    for row, it in enumerate(sequences):
        length = len(it["ids"])
        ids[row, :length], labels[row, :length] = torch.tensor(it["ids"]), torch.tensor(it["labels"])
        seen[row, :length] = 1
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def gradients(model, batches, autocast):
    """The loss of each batch, and for each adapter matrix its gradient in each batch."""
    losses, grads = [], {}
    for sequences in batches:
        model.zero_grad()
        loss = loss_of(model, sequences, autocast)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grads.setdefault(name.replace(".default", ""), []).append(parameter.grad.double().cpu())
    return losses, grads


def errors(got, expected):
    """Of each matrix: the error over all batches, relative to the gradient's norm."""
    result = {}
    for name, those in expected.items():
        off = sum((a.double() - b).square().sum() for a, b in zip(got[name], those, strict=True))
        result[name] = (off / sum(it.square().sum() for it in those)).sqrt().item()
    return result


def train(model, sequences, steps):
    """Losses of steps over all sequences, with the learning rates of our own log; the first step was taken already."""
    trained = [it for it in model.parameters() if it.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for it in trained:
        optimizer.state[it] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(it), "exp_avg_sq": torch.zeros_like(it)}
    losses = []
    for learning_rate in steps:
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        loss = loss_of(model, sequences, True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(device, model, adapter, folder):
    """FOLDER holds batches.json; `ours-TYPE-N.safetensors` and losses in ours.json, from `ferrotune debug gradients`; and the
    run's log. Prints JSON: what run.py judges."""
    from peft import prepare_model_for_kbit_training

    global DEVICE
    DEVICE, folder = device, Path(folder)
    batches = json.loads((folder / "batches.json").read_text())
    ours = json.loads((folder / "ours.json").read_text())

    reference_losses, reference = gradients(adapted(dense(model), adapter), batches, False)
    theirs = adapted(four_bit(model), adapter)
    losses, grads = gradients(theirs, batches, True)
    their_errors = errors(grads, reference)
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()][1:]
    run = train(theirs, batches[0], [it["lr"] for it in log])
    del theirs
    # The recipe that keeps everything but the products in f32.
    wide = prepare_model_for_kbit_training(four_bit(model), use_gradient_checkpointing=False)
    wide_losses, grads = gradients(adapted(wide, adapter), batches, True)
    result = {"reference": reference_losses, "peft": losses, "wide": wide_losses, "errors": {
        "peft": their_errors, "wide": errors(grads, reference)}, "run": {"peft": run, "ours": [it["loss"] for it in log]}}
    for dtype, of in ours.items():
        files = [load_file(folder / f"ours-{dtype}-{n}.safetensors") for n in range(len(batches))]
        result[dtype] = of
        result["errors"][dtype] = errors({name: [it[name] for it in files] for name in reference}, reference)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    {"model": make_model, "adapter": make_adapter, "start": start, "peft": compare}[verb](*words)
