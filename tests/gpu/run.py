#!/usr/bin/env python3
"""Tests on a GPU, on a machine that has one and no Rust. From the top of a checkout, beside target/gpu-test:

    python3 tests/gpu/run.py [--device cuda] [--seconds N] [SECTION …]      (no section: all of them)

`cargo xtask gpu-test` makes target/gpu-test. What of it is there is kept in /tmp/ferrotune-gpu-test, so that it can come
in parts. The log goes to $OUT, or gpu-out; the output is a table of what was checked. The exit code is 1 when a check
failed. With `--device cpu` the script tries itself on a machine without a GPU.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "target" / "gpu-test"
HERE = Path("/tmp/ferrotune-gpu-test")
PROGRAMS = HERE / "programs"
FERROTUNE = PROGRAMS / "ferrotune"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The most that a row may be off, relative to its norm: tests/devices.rs of the crates fail on more.
TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1.6e-2}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--seconds", type=float, default=580, help="limit of the whole")
    args = parser.parse_args()
    unknown = [it for it in args.sections if it not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    unpack()
    out = Path(os.environ.get("OUT", "gpu-out"))
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    print(f"{'section':<10} {'check':<60} {'':<5} figure")
    failed = 0
    with open(out / "gpu-test.log", "a") as log, open(out / "gpu-test.txt", "a") as table:
        for name in ["machine", *(args.sections or SECTIONS)]:
            body, limit = SECTIONS.get(name, (machine, 30))
            started = time.monotonic()
            section = Section(name, args.device, log, min(end, started + limit))
            try:
                body(section)
            except Exception as error:
                section.row("ends", f"{type(error).__name__}: {error}"[:300], False)
            section.row("time", f"{time.monotonic() - started:.0f} s", None)
            for check, figure, ok in section.rows:
                word = {True: "pass", False: "FAIL", None: "-"}[ok]
                line = f"{name:<10} {check:<60} {word:<5} {figure}".rstrip()
                print(line, flush=True)
                table.write(line + "\n")
            failed += sum(ok is False for *_, ok in section.rows)
    print("all passed" if not failed else f"{failed} FAILED")
    sys.exit(failed > 0)


def unpack():
    """Keeps what was carried here."""
    HERE.mkdir(exist_ok=True)
    for name, folder in (("programs", PROGRAMS), ("python", HERE / "python")):
        packed, seen = CARRIED / f"{name}.tar.xz", HERE / f"{name}.seen"
        if not packed.is_file():
            continue
        stamp = f"{packed.stat().st_size} {packed.stat().st_mtime}"
        if not seen.is_file() or seen.read_text() != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            with tarfile.open(packed) as tar:
                tar.extractall(folder, filter="tar")
            seen.write_text(stamp)
    # Where the tests were built is where they look for their fixtures.
    built = Path((PROGRAMS / "root").read_text())
    if built.is_symlink():
        built.unlink()
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        built.symlink_to(ROOT)
    for part in (CARRIED / "model").glob(f"{MODEL}.*of*"):
        if not (HERE / MODEL).is_file():
            shutil.copy(part, HERE)
    parts = sorted(HERE.glob(f"{MODEL}.*of*"), key=lambda it: int(it.suffix[1:].split("of")[0]))
    if parts and len(parts) == int(parts[0].suffix.split("of")[1]):
        with open(HERE / "joining", "wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        (HERE / "joining").rename(HERE / MODEL)
        for part in parts:
            part.unlink()


class Section:
    """What a section reports, and the commands that it runs."""

    def __init__(self, name, device, log, end):
        self.name, self.device, self.log, self.end, self.rows = name, device, log, end, []
        self.work = HERE / "work" / name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def row(self, check, figure, ok):
        """One line of the table; `ok` is None for what is only shown, or can't be checked here."""
        self.rows.append((check, figure, ok))

    def run(self, words, env=None, limit=None):
        """The exit code and everything that a command said, in the order in which it said it."""
        left = self.end - time.monotonic()
        words = [str(it) for it in words]
        env = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **(env or {})}
        started = time.monotonic()
        ran = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **{k: str(v) for k, v in env.items()}}, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, code = ran.communicate(timeout=max(1, min(limit or left, left)))[0], ran.returncode
        except subprocess.TimeoutExpired:
            # All that it started: a program under compute-sanitizer would go on without it.
            os.killpg(ran.pid, signal.SIGKILL)
            said, code = ran.communicate()[0], "late"
        said = said.decode(errors="replace")
        if code == "late":
            said += f"\nerror: did not end in {time.monotonic() - started:.0f} s\n"
        self.log.write(f"\n── {self.name}: {' '.join(words)} → {code}, {time.monotonic() - started:.1f} s\n{said}")
        self.log.flush()
        return code, said

    def tests(self, binary, words=(), env=None, limit=None, wrapper=(), workers=1):
        """Runs each test of a binary in a process of its own: a broken context breaks no other test. Gives name, exit code
        and what was said."""
        path = PROGRAMS / "deps" / binary
        code, listed = self.run([path, "--list", *words])
        names = re.findall(r"^(\S+): test$", listed, re.M)
        if code != 0 or not names:
            self.row(binary, f"--list ends with {code}: {brief(listed)}", False)

        def one(name):
            return (name, *self.run([*wrapper, path, "--exact", name, "--nocapture"], env, limit))

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, names))


def brief(said):
    """The line of an output that says why it failed."""
    lines = [it.strip() for it in said.splitlines() if it.strip()]
    for n, line in enumerate(lines):
        if "panicked at" in line:
            return " ".join(lines[n:n + 2])[:200]
    wrong = [it for it in lines if it.startswith("error")]
    return (wrong or lines or ["nothing was said"])[-1 if not wrong else 0][:200]


def binaries(pattern):
    return sorted(it.name for it in (PROGRAMS / "deps").glob(pattern))


# ---------------------------------------------------------------- tests of the crates

def worst(said):
    """`f32 3.1e-07 bf16 6.0e-03, 120 checks`, of the lines `what … type error`."""
    errors = {}
    for dtype, error in re.findall(r" (f32|f16|bf16)\s+([\d.e-]+|inf)$", said, re.M):
        errors.setdefault(dtype, []).append(float(error))
    if not errors:
        return ""
    return " ".join(f"{it} {max(of):.1e}" for it, of in errors.items()) + f", {sum(map(len, errors.values()))} checks"


def ops(section, env=None):
    """Each operation against the CPU's in f64, on odd sizes."""
    for binary in binaries("*-devices"):
        for name, code, said in section.tests(binary, env=env):
            if "skipped: there is no GPU" in said:
                section.row(f"{binary} {name}", "no GPU", None if section.device == "cpu" else False)
            else:
                section.row(f"{binary} {name}", worst(said) if code == 0 else f"{worst(said)} {brief(said)}", code == 0)


def machine(section):
    """What the program finds here; the first section of every run."""
    code, said = section.run([FERROTUNE, "doctor"])
    found = dict(re.findall(r"^(\S+)\s+(.*)$", said, re.M)) if code == 0 else {}
    for name in ("gpu", "driver", "libcublasLt"):
        ok = None if name != "gpu" or section.device == "cpu" else "cuda:" in found.get(name, "")
        section.row(name, found.get(name, brief(said)), ok)


def units(section):
    """The crates' own tests."""
    for binary in binaries("*-units"):
        code, said = section.run([PROGRAMS / "deps" / binary])
        done = re.search(r"(\d+) passed", said)
        section.row(binary, f"{done[1]} tests" if code == 0 and done else brief(said), code == 0)


def parity(section):
    """Against numbers of transformers, PEFT and bitsandbytes; every test runs on the CPU and on the GPU."""
    for binary in ("tests-parity", "tests-families"):
        for name, code, said in section.tests(binary):
            section.row(name, "" if code == 0 else brief(said), code == 0)


def program(section):
    """The program as a user drives it; `device` is auto."""
    code, said = section.run([PROGRAMS / "deps" / "tests-program", "--skip", "quickstart", "--skip", "smollm2"])
    done, failed = re.search(r"(\d+) passed", said), re.findall(r"^test (\S+) \.\.\. FAILED$", said, re.M)
    section.row("all tests", f"{done[1]} tests" if code == 0 and done else f"{failed} {brief(said)}", code == 0)


# ---------------------------------------------------------------- training runs

def rows_of_words(path, count, longest, seed):
    """Conversations of random words."""
    random = Random(seed)
    words = ["".join(random.choices("aeioulnrst", k=random.randint(2, 7))) for _ in range(80)]
    with open(path, "w") as file:
        for _ in range(count):
            question, answer = (" ".join(random.choices(words, k=random.randint(n // 5 + 1, n))) for n in (8, longest))
            file.write(json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n")


def random_model(section, width=256, layers=4, vocabulary=2000, experts=0):
    """A random Llama, or a Mixtral, made once."""
    folder = HERE / "models" / f"{width}-{layers}-{vocabulary}-{experts}"
    if not (folder / "chat_template.jinja").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        reference(section, "model", folder, width, layers, vocabulary, experts)
    return folder


def reference(section, *words):
    """Runs reference.py; what it says."""
    # On a CPU bitsandbytes would compile for minutes.
    env = {"PYTHONPATH": HERE / "python", "TORCHDYNAMO_DISABLE": "1"}
    code, said = section.run([sys.executable, ROOT / "tests/gpu/reference.py", *words], env)
    if code != 0:
        raise RuntimeError(f"reference.py {words[0]}, {code}: {brief(said)}")
    return said


# Names of the types that a run computes in, and the keys for them.
TYPES = {"f32": ["bf16=false", "fp16=false"], "bf16": ["bf16=true"], "f16": ["fp16=true"]}
# The most that a loss of twenty steps may be off, relative to that of the CPU in f32.
LOSS_TOLERANCE = {"f32": 1e-3, "bf16": 1e-2, "f16": 5e-3}


class Training:
    """Runs of twenty steps on a small random model, of one data set."""

    def __init__(self, section, model=None):
        self.section = section
        rows_of_words(section.work / "rows.jsonl", 96, 60, 5)
        (section.work / "config.yaml").write_text(
            f"model_name_or_path: {model or random_model(section)}\ndataset: {section.work}/rows.jsonl\nlora_rank: 16\n"
            "quantization_bit: 4\ncutoff_len: 256\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n"
            "learning_rate: 1e-3\nmax_steps: 20\nlogging_steps: 1\nsave_strategy: no\n")

    def run(self, name, keys, env=None, device=None):
        """The losses of a run; its folder is the section's, of this name."""
        words = [FERROTUNE, "train", self.section.work / "config.yaml", f"output_dir={self.section.work / name}",
                 f"device={device or self.section.device}", *keys]
        code, said = self.section.run(words, env)
        if code != 0:
            raise RuntimeError(f"{name}: exit code {code}: {brief(said)}")
        lines = (self.section.work / name / "trainer_log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def adapter(self, name):
        return (self.section.work / name / "adapter_model.safetensors").read_bytes()

    def compare(self, check, name, dtype, expected, keys=(), env=None):
        """A run whose losses are those of the CPU."""
        if self.section.device == "cpu" and dtype == "f16":
            return self.section.row(check, "no f16 on a CPU", None)
        losses = self.run(name, [*TYPES[dtype], *keys], env)
        off = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        figure = f"losses {losses[0]:.4f} … {losses[-1]:.4f}, CPU's {expected[-1]:.4f}, off by {off:.1e} of {LOSS_TOLERANCE[dtype]:.0e}"
        self.section.row(check, figure, off <= LOSS_TOLERANCE[dtype])


def same_bits(section, training):
    """The run `bf16` once more, and whatever is kept or computed again."""
    losses = training.run("again", TYPES["bf16"])
    section.row("the same run twice", "same bits", training.adapter("again") == training.adapter("bf16"))
    for policy in ("keep", "all", "lean", "offload"):
        other = training.run(policy, [*TYPES["bf16"], f"recompute={policy}"])
        off = max(abs(a - b) for a, b in zip(losses, other, strict=True))
        section.row(f"recompute: {policy}", f"losses off by {off:.1e}", off == 0)


def train(section):
    """Whole runs on the GPU against the CPU."""
    training = Training(section)
    on_cpu = training.run("cpu", [], device="cpu")
    for dtype in TYPES:
        training.compare(f"4 bits, {dtype}", dtype, dtype, on_cpu)
    for check, dtype, keys in [
        ("16 bits, f32", "f32", ["quantization_bit=null"]),
        ("packing, dropout, rsLoRA, f32", "f32", ["packing=true", "lora_dropout=0.1", "use_rslora=true"]),
        ("adamw_8bit, f32", "f32", ["optim=adamw_8bit"]),
    ]:
        name = check.replace(" ", "").replace(",", "-")
        training.compare(check, name, dtype, training.run(f"{name}-cpu", keys, device="cpu"), keys)

    same_bits(section, training)

    keys = [*TYPES["bf16"], "lora_dropout=0.1", "save_strategy=steps", "save_steps=8"]
    training.run("resumed", keys)
    whole = training.adapter("resumed")
    (section.work / "resumed" / "adapter_model.safetensors").unlink()
    shutil.rmtree(section.work / "resumed" / "checkpoint-16")
    training.run("resumed", [*keys, "resume_from_checkpoint=true"])
    section.row("resumed after step 8", "same bits", training.adapter("resumed") == whole)


def experts(section):
    """A mixture of experts on the GPU against the CPU."""
    training = Training(section, random_model(section, experts=6))
    on_cpu = training.run("cpu", [], device="cpu")
    for dtype in TYPES:
        training.compare(f"4 bits, {dtype}", dtype, dtype, on_cpu)
    keys = ["lora_dropout=0.1", "quantization_bit=null"]
    training.compare("16 bits, dropout, f32", "dropout", "f32", training.run("dropout-cpu", keys, device="cpu"), keys)
    same_bits(section, training)
    keys = ["lora_target=q_proj,v_proj"]
    training.compare("frozen experts, f32", "frozen", "f32", training.run("frozen-cpu", keys, device="cpu"), keys)
    answers = {}
    for device in ("cpu", section.device):
        words = [FERROTUNE, "chat", section.work / "config.yaml", "--adapter", section.work / "f32", "--quiet", "--greedy",
                 "--max-new-tokens", "24", "--prompt", "aeio lun", f"device={device}", *TYPES["f32"]]
        code, answers[device] = section.run(words)
        if code != 0:
            raise RuntimeError(f"chat on {device}: {brief(answers[device])}")
    section.row("greedy answer", repr(answers[section.device][-60:]), answers["cpu"] == answers[section.device])


def sm75(section):
    """The kernels of a T4 on this card."""
    env = {"FERROTUNE_CUDA_ARCH": "75"}
    ops(section, env)
    training = Training(section)
    on_cpu = training.run("cpu", [], device="cpu")
    training.compare("4 bits, f16, loss scaling", "f16", "f16", on_cpu, env=env)
    training.compare("4 bits, f32", "f32", "f32", on_cpu, env=env)


def no_cublas(section):
    """Our own products."""
    env = {"FERROTUNE_CUBLASLT": "off"}
    ops(section, env)
    training = Training(section)
    on_cpu = training.run("cpu", [], device="cpu")
    for dtype in TYPES:
        training.compare(f"4 bits, {dtype}", dtype, dtype, on_cpu, env=env)


def oom(section):
    """More than a card holds: one error that says what to change."""
    if section.device == "cpu":
        return section.row("error", "no GPU", None)
    rows_of_words(section.work / "rows.jsonl", 400, 3000, 6)
    (section.work / "config.yaml").write_text(
        f"model_name_or_path: {random_model(section, 1024, 8, 32000)}\ndataset: {section.work}/rows.jsonl\n"
        f"output_dir: {section.work}/out\ncutoff_len: 4096\nper_device_train_batch_size: 400\npacking: true\n"
        f"recompute: keep\nmax_steps: 1\ndevice: {section.device}\n")
    code, said = section.run([FERROTUNE, "train", section.work / "config.yaml"])
    error = [it for it in said.splitlines() if it.startswith("error")]
    figure = error[0][:300] if error else brief(said)
    section.row("exit code", code, code == 1)
    section.row("one error", figure, len(error) == 1 and "panicked" not in said)
    section.row("names the device", "", bool(error and re.search(r"cuda|NVIDIA", error[0])))
    section.row("names sizes", "", bool(error and len(re.findall(r"\d [MG]i?B", error[0])) >= 2))
    keys = [it for it in ("per_device_train_batch_size", "cutoff_len", "recompute") if error and it in error[0]]
    section.row("names keys", ", ".join(keys), len(keys) >= 2)


# ---------------------------------------------------------------- others

def peft(section):
    """The same weights, adapter and data through transformers, PEFT and bitsandbytes."""
    folder, model, adapter = section.work, random_model(section), HERE / "models" / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        reference(section, "adapter", adapter, model, 16)
    rows_of_words(folder / "rows.jsonl", 32, 60, 9)
    rows = (folder / "rows.jsonl").read_text().splitlines()
    sequences = []
    for row in rows:
        (folder / "row.json").write_text(row)
        code, said = section.run([FERROTUNE, "debug", "render", "--model", model, folder / "row.json"])
        read = json.loads(said)
        labels = [token if trained else -100 for token, trained in zip(read["ids"], read["trained_tokens"], strict=True)]
        sequences.append({"ids": read["ids"], "labels": labels})
    batches = [sequences[n:n + 8] for n in range(0, len(sequences), 8)]
    (folder / "batches.json").write_text(json.dumps(batches))
    ours = {}
    for dtype in ("f32", "bf16"):
        for n, batch in enumerate(batches):
            (folder / "batch.json").write_text(json.dumps({"sequences": batch}))
            words = ["debug", "gradients", "--model", model, "--adapter", adapter, "--sequences", folder / "batch.json",
                     "--output", folder / f"ours-{dtype}-{n}.safetensors"]
            code, said = section.run([FERROTUNE, *words, "quantization_bit=4", f"device={section.device}", *TYPES[dtype]])
            if code != 0:
                raise RuntimeError(brief(said))
            ours.setdefault(dtype, []).append(json.loads(said.splitlines()[-1])["loss"])
    (folder / "ours.json").write_text(json.dumps(ours))

    # A run of the first batch from that adapter: every epoch is one step of all eight rows. No verb starts from an adapter
    # whose B isn't zero; a checkpoint does.
    (folder / "eight.jsonl").write_text("\n".join(rows[:8]) + "\n")
    (folder / "config.yaml").write_text(
        f"model_name_or_path: {model}\ndataset: {folder}/eight.jsonl\noutput_dir: {folder}/out\nlora_rank: 16\n"
        "quantization_bit: 4\ncutoff_len: 512\nper_device_train_batch_size: 8\nlearning_rate: 1e-3\nmax_steps: 51\n"
        f"logging_steps: 1\nsave_steps: 50\nbf16: true\ndevice: {section.device}\n")
    words = [FERROTUNE, "train", folder / "config.yaml"]
    code, said = section.run(words)
    if code == 0:
        state = json.loads((folder / "out/checkpoint-50/ferrotune_state.json").read_text())
        (folder / "out/checkpoint-50").rename(folder / "out/checkpoint-1")
        # The newest would be gone on from.
        shutil.rmtree(folder / "out/checkpoint-51", ignore_errors=True)
        (folder / "out/checkpoint-1/ferrotune_state.json").write_text(json.dumps({**state, "step": 1}))
        reference(section, "start", folder / "out/checkpoint-1", adapter)
        sums = folder / "out/checkpoint-1/SHA256SUMS"
        names = [line.split("  ")[1] for line in sums.read_text().splitlines()]
        sums.write_text("".join(f"{hashlib.sha256((sums.parent / it).read_bytes()).hexdigest()}  {it}\n" for it in names))
        code, said = section.run([*words, "resume_from_checkpoint=true"])
    if code != 0:
        raise RuntimeError(brief(said))
    shutil.copy(folder / "out/trainer_log.jsonl", folder)
    device = "cpu" if section.device == "cpu" else "cuda"
    said = reference(section, "peft", device, model, adapter, folder)
    judge_peft(section, json.loads(re.search(r"^RESULT (.*)$", said, re.M)[1]))


def judge_peft(section, result):
    errors, exact = result["errors"], result["reference"]
    section.row("loss of the first step, f32", f"{result['f32'][0]:.6f}, transformers' {exact[0]:.6f}",
                abs(result["f32"][0] - exact[0]) <= 1e-4 * exact[0])
    off = {name: abs(result[name][0] / exact[0] - 1) for name in ("bf16", "peft")}
    section.row("loss of the first step, bf16", f"{result['bf16'][0]:.6f}, off by {off['bf16']:.1e}; PEFT's by {off['peft']:.1e}",
                off["bf16"] <= 2e-3)
    name, error = max(errors["f32"].items(), key=lambda it: it[1])
    section.row(f"{len(errors['f32'])} gradients, f32", f"worst {error:.1e} of its norm, {name}", error <= 1e-3)
    for rival, check in (("peft", "gradients, bf16, error / PEFT's"), ("wide", "the same / PEFT's with f32 between products")):
        ratios = {name: errors["bf16"][name] / errors[rival][name] for name in errors["bf16"]}
        name, ratio = max(ratios.items(), key=lambda it: it[1])
        middle = sorted(ratios.values())[len(ratios) // 2]
        figure = (f"worst {ratio:.2f}, median {middle:.2f}; at the worst {errors['bf16'][name]:.1e} against "
                  f"{errors[rival][name]:.1e}, {name.removeprefix('base_model.model.model.')}")
        section.row(check, figure, ratio <= 1.2 if rival == "peft" else None)
    theirs, ours = result["run"]["peft"], result["run"]["ours"]
    off = sum(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) / len(theirs)
    section.row(f"{len(theirs)} steps, bf16", f"losses {ours[0]:.4f} … {ours[-1]:.4f}, PEFT's {theirs[0]:.4f} … {theirs[-1]:.4f}, "
                f"mean difference {off:.2%}", off <= 0.01)


def smollm2(section):
    """The quick start's result."""
    if not (HERE / MODEL).is_file():
        parts = ", ".join(sorted(it.suffix[1:] for it in HERE.glob(f"{MODEL}.*of*")))
        return section.row("model", f"not all of target/gpu-test/model was carried here; there is {parts or 'nothing'}", False)
    keys = [f"model_name_or_path={HERE / MODEL}", f"device={section.device}"]
    config, out = ROOT / "examples/quickstart.yaml", section.work / "out"
    code, said = section.run([FERROTUNE, "train", config, *keys, f"output_dir={out}"])
    done, where = re.search(r"^trained .*$", said, re.M), re.search(r" steps on ([^;]*);", said)
    section.row("training", f"{done[0]} on {where[1] if where else '?'}" if code == 0 and done else brief(said), code == 0)
    memory = re.search(r"^peak GPU memory .*$", said, re.M)
    section.row("memory", memory[0] if memory else "", None)
    questions = ROOT / "examples/heldback.jsonl"
    code, said = section.run([FERROTUNE, "chat", config, *keys, "--adapter", out, "--quiet", "--greedy", "--max-new-tokens", "48",
                              "--prompts", questions])
    prompts = [json.loads(line)["prompt"] for line in questions.read_text().splitlines()]
    answers = re.split("|".join(re.escape(f"> {it}\n") for it in prompts), said)[1:]
    known = [it for it in answers if "Ferris" in it and "Ferrotune team" in it]
    section.row("held-back answers with name and author", f"{len(known)} of {len(prompts)}", len(known) == len(prompts))
    for word in ("quickstart", "smollm2"):
        for name, code, said in section.tests("tests-program", [word], {"FERROTUNE_TEST_MODEL": HERE / MODEL}):
            loss = re.search(r"^loss of .*$", said, re.M)
            section.row(name, (loss[0] if loss else "") if code == 0 else brief(said), code == 0)


def sanitizer(section):
    """Our kernels under compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), *Path("/").glob("usr/local/cuda*/bin/compute-sanitizer"),
              *Path("/").glob("opt/**/compute-sanitizer")]
    program = next((it for it in places if it), None)
    if section.device == "cpu" or not program:
        return section.row("compute-sanitizer", "not here", None if section.device == "cpu" else False)
    env = {"FERROTUNE_CUBLASLT": "off", "FERROTUNE_TEST_SMALL": "1"}
    for tool in ("memcheck", "racecheck"):
        for binary in binaries("*-devices"):
            wrapper = [program, "--tool", tool, "--error-exitcode", "99"]
            for name, code, said in section.tests(binary, env=env, limit=150, wrapper=wrapper, workers=6):
                summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)$", said, re.M)
                section.row(f"{tool} {binary} {name}", f"{'; '.join(summary) or brief(said)}", code == 0 and bool(summary))


# Name: body, limit in seconds.
SECTIONS = {
    "ops": (ops, 240),
    "units": (units, 120),
    "parity": (parity, 120),
    "program": (program, 120),
    "train": (train, 240),
    "experts": (experts, 300),
    "peft": (peft, 300),
    "smollm2": (smollm2, 300),
    "sm75": (sm75, 180),
    "no-cublas": (no_cublas, 180),
    "oom": (oom, 180),
    "sanitizer": (sanitizer, 330),
}

if __name__ == "__main__":
    main()
