#!/usr/bin/env python3
"""The peers on the files that tests/outcome.rs makes: those that they agree with are recorded in fixtures/outcome.json.

    FERROTUNE_OUTCOME=DIR cargo test --release --package ferrotune-tests --test outcome
    python3 tests/peers_outcome.py DIR

Run by `cargo xtask peers outcome`, once by a Python with transformers and PEFT and once by one with llama-cpp-python: each checks
what it can and leaves the rest of the record as it was. What transformers computes of base and adapter is in families.json. Prints
family × door with the largest difference, and exits with 1 where one is too large; that one isn't recorded.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FIXTURES = Path(__file__).resolve().parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
RECORD = FIXTURES / "outcome.json"


class Skip(Exception):
    """No peer reads this, and why."""


def with_transformers(folder):
    """Doors of the families: (family, door, allowed difference, what computes it)."""
    import torch
    from make_families import LENGTHS, POSITIONS, VOCAB, numbers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    golden = json.loads((FIXTURES / "families.json").read_text())
    load = lambda path, dtype=torch.float32: AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()

    def off(model, family):
        """As tests/families.rs has it: by the logits where they are above 1."""
        rows = []
        for index, (length, positions) in enumerate(zip(LENGTHS, POSITIONS)):
            ids = torch.from_numpy(((numbers(f"tokens.{index}", length).astype("f8") + 1) / 2 * VOCAB).astype("i8"))
            with torch.no_grad():
                rows.append(model(input_ids=ids[None]).logits[0][positions].double())
        expected = torch.tensor(golden[family]["logits"], dtype=torch.float64)
        return ((torch.cat(rows) - expected).abs() / expected.abs().clamp(min=1)).max().item()

    def adapter(family):
        config = golden[family]["config"]
        if config["model_type"] == "phi3":
            raise Skip("a base with split projections is needed")
        if "num_experts_per_tok" in config:
            raise Skip("PEFT sees no linear layers in experts")
        model = PeftModel.from_pretrained(load(folder / family / "base"), folder / family / "adapter")
        count = sum(".lora_" in name for name, _ in model.named_parameters())
        if count != len(golden[family]["gradients"]):
            raise RuntimeError(f"PEFT has put {count} matrices on the model")
        return off(model, family)

    def in_16_bits(family):
        """Weights that aren't the base's, rounded once, are as far apart as bf16 has room for."""
        model = load(folder / family / "bf16", torch.bfloat16)
        base = dict(load(folder / family / "base").named_parameters())
        worst = 0
        for name, value in model.named_parameters():
            exact = base.get(name, base.get(name.replace("model.", "model.language_model.", 1)))
            worst = max(worst, ((value.float() - exact).abs() / (exact.abs() + 2**-7)).max().item())
        return worst

    for family in golden:
        yield family, "adapter", 1e-4, lambda: adapter(family)
        yield family, "merged", 1e-4, lambda: off(load(folder / family / "merged"), family)
        yield family, "bf16", 2**-7, lambda: in_16_bits(family)


def with_llama_cpp(folder):
    """Doors of llama.cpp's architectures."""
    import numpy as np
    from peers_llama_cpp import difference, open_peer, peer_logits

    def computed(path):
        expected = json.loads((path / "logits.json").read_text())
        ids = expected["ids"]
        ours = np.array(expected["logits"]).reshape(len(ids), -1)
        return difference(ours, peer_logits(open_peer(path / "model.gguf"), ids))

    for name in sorted(it.name for it in folder.glob("gguf *")):
        # llama.cpp looks GELU up in a table of f16.
        exact = 2e-3 if "gemma" in name else 1e-4
        for door, allowed in [("F32", exact), ("F16", 1e-2)]:
            yield name, door, allowed, lambda: computed(folder / name / door)


def main():
    folder = Path(sys.argv[1]).resolve()
    made = json.loads((folder / "outcome.json").read_text())
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    doors, failed = [], 0
    if find_spec("transformers"):
        doors.append(with_transformers(folder))
    if find_spec("llama_cpp"):
        sys.path.insert(0, str(FIXTURES.parent))
        doors.append(with_llama_cpp(folder))
    for name, door, allowed, check in (it for all in doors for it in all):
        digest = made[name][door]
        try:
            off = check()
            good = off <= allowed
            said = f"{off:.1e} {'pass' if good else 'FAIL'}"
        except Skip as why:
            good, digest, said = True, None, f"– ({why})"
        except Exception as error:
            good, said = False, f"FAIL: {error}"
        failed += not good
        if good:
            record.setdefault(name, {})[door] = digest
        else:
            record.get(name, {}).pop(door, None)
        print(f"{name:14} {door:8} {said}", flush=True)
    record = {name: record[name] for name in sorted(record) if name in made}
    lines = (f' {json.dumps(name)}: {json.dumps(it, separators=(",", ":"))}' for name, it in record.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
