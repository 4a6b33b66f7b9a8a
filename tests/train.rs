//! Whole runs on a tiny model: what is written, going on, talking to the result.

use std::fs;
use std::path::PathBuf;

use crate::util::{Dir, TINY, repository};

/// Thirty-two rows and a config for them.
pub fn with_config(keys: &str) -> Dir {
    with_rows(32, keys)
}

fn with_rows(count: usize, keys: &str) -> Dir {
    let dir = Dir::new();
    let rows: String = (0..count)
        .map(|n| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Question {n}\"}}, {{\"role\": \"assistant\", \"content\": \"Answer {n}\"}}]}}\n"
            )
        })
        .collect();
    dir.file("rows.jsonl", rows);
    let model = repository(TINY);
    let config = format!(
        "model_name_or_path: {}\ndataset: rows.jsonl\noutput_dir: out\nlearning_rate: 1e-2\nlogging_steps: 1\n{keys}",
        model.display()
    );
    dir.file("c.yaml", config);
    dir
}

#[test]
fn a_run_learns_and_writes_an_adapter() {
    let dir = with_config("max_steps: 16\nquantization_bit: 4\nplot_loss: true\nreport_to: tensorboard\n");
    let ran = dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let ran = ran.says("trainable params: ").says("step 16/16 ");
    ran.prints("trained 16 steps").prints("tokens/s").prints("peak memory");
    let losses = dir.losses("out");
    assert_eq!(losses.len(), 16, "{losses:?}");
    assert!(losses[14] + losses[15] < losses[0] + losses[1] - 0.5, "{losses:?}");
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
        "training_loss.svg",
        "training_loss.png",
        "trainer_state.json",
        "train_results.json",
        "all_results.json",
    ] {
        assert!(dir.path().join("out").join(name).is_file(), "{name}");
    }
    let svg = fs::read_to_string(dir.path().join("out/training_loss.svg")).expect("a picture");
    assert!(svg.contains("training loss") && svg.contains("smoothed"), "{svg}");
    let png = fs::read(dir.path().join("out/training_loss.png")).expect("a picture");
    assert!(png.starts_with(b"\x89PNG") && png.len() > 5000, "{} bytes", png.len());
    let events =
        fs::read_dir(dir.path().join("out/runs")).expect("event files").flatten().next().expect("one");
    let events = fs::read(events.path()).expect("events");
    for (tag, count) in [(&b"brain.Event:2"[..], 1), (b"train/loss", 16), (b"train/grad_norm", 16)] {
        assert_eq!(events.windows(tag.len()).filter(|it| *it == tag).count(), count);
    }
    let model = repository(TINY).display().to_string();
    let answer = |words: &[&str]| {
        let chat = [
            "chat",
            "--quiet",
            "--model",
            &model,
            "--prompt",
            "Question 1",
            "--greedy",
            "--max-new-tokens",
            "8",
        ];
        dir.ferrotune(&[&chat, words].concat()).succeeds().stdout
    };
    assert_ne!(answer(&[]), answer(&["--adapter", "out"]), "the adapter changes the answer");
    assert_eq!(answer(&["--adapter", "out"]), answer(&["--adapter", "out"]), "greedy answers repeat");

    let ran = dir.ferrotune(&["train", "c.yaml", "overwrite_output_dir=true", "--quiet"]).succeeds();
    assert_eq!(ran.stderr, "");
}

#[test]
fn epochs_follow_one_another() {
    // Steps of two rows: they fill an epoch exactly, or the last one of each epoch has a single row.
    for rows in [4, 3] {
        let dir = with_rows(rows, "num_train_epochs: 3\ngradient_accumulation_steps: 2\n");
        dir.ferrotune(&["train", "c.yaml"]).succeeds().prints("trained 6 steps");
        let losses = dir.losses("out");
        assert!(losses.len() == 6 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    let run = || {
        let dir = with_config("max_steps: 4\nlora_dropout: 0.1\nnum_threads: 2\nsave_strategy: no\n");
        dir.ferrotune(&["train", "c.yaml"]).succeeds();
        fs::read(dir.path().join("out/adapter_model.safetensors")).expect("the adapter")
    };
    assert!(run() == run());
}

#[test]
fn a_resumed_run_ends_as_if_it_had_never_stopped() {
    // Of rank 64, most of the adapters are large enough for moments in 8 bits.
    for keys in [
        "lora_rank: 8\n",
        "lora_rank: 64\noptim: adamw_8bit\n",
        "lora_rank: 8\noptim: muon\nlr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 3}\n",
        "lora_rank: 8\noptim: sgd\noptim_args: momentum=0.9\nloraplus_lr_ratio: 4\n",
        "neftune_noise_alpha: 5\ngroup_by_length: true\n",
    ] {
        let run = format!("max_steps: 9\nlora_dropout: 0.1\nnum_threads: 2\nsave_steps: 4\n{keys}");
        let whole = with_config(&run);
        whole.ferrotune(&["train", "c.yaml", "logging_steps=3"]).succeeds();
        let adapter =
            |dir: &Dir| fs::read(dir.path().join("out/adapter_model.safetensors")).expect("the adapter");
        let (at_the_end, losses) = (adapter(&whole), whole.losses("out"));
        // As if it had been killed after step 4.
        fs::remove_file(whole.path().join("out/adapter_model.safetensors")).expect("the adapter");
        for step in [8, 9] {
            fs::remove_dir_all(whole.path().join(format!("out/checkpoint-{step}"))).expect("a checkpoint");
        }
        let words = ["train", "c.yaml", "logging_steps=3", "resume_from_checkpoint=true"];
        let ran = whole.ferrotune(&words).succeeds();
        ran.says("checkpoint-4 after step 4");
        assert!(adapter(&whole) == at_the_end, "{keys}");
        assert_eq!(whole.losses("out"), losses, "the log goes on, in the middle of a window");
        // Another rank is another run.
        let words = ["train", "c.yaml", "resume_from_checkpoint=auto", "learning_rate=1e-3", "lora_rank=4"];
        let ran = whole.ferrotune(&words).fails(2);
        ran.says("`learning_rate` was 0.01 when the checkpoint was written and is 0.001 now")
            .says("`lora_rank` was");
    }
}

#[test]
fn whole_weights_are_trained_saved_and_resumed() {
    let model = |dir: &Dir, folder: &str| dir.path().join(folder).join("model.safetensors");
    let open = |path| candle_core::safetensors::load(path, &candle_core::Device::Cpu).expect("tensors");
    let floats = |tensor: &candle_core::Tensor| -> Vec<f32> {
        tensor.flatten_all().and_then(|it| it.to_vec1()).expect("f32 numbers")
    };
    let base = open(repository(TINY).join("model.safetensors"));
    for (keys, trained) in [
        ("finetuning_type: full\n", vec![""]),
        (
            "finetuning_type: freeze\nfreeze_trainable_layers: 1\nfreeze_trainable_modules: mlp\nfreeze_extra_modules: norm\n",
            vec!["layers.2.mlp", "model.norm"],
        ),
    ] {
        let dir = with_config(&format!("max_steps: 6\nsave_steps: 3\nnum_threads: 2\n{keys}"));
        dir.ferrotune(&["train", "c.yaml"]).succeeds().says("trainable params: ");
        let losses = dir.losses("out");
        assert!(losses[5] < losses[0] - 0.3, "{losses:?}");
        let after = open(model(&dir, "out"));
        assert_eq!(after.len(), base.len());
        for (name, tensor) in &base {
            let moved = floats(tensor) != floats(&after[name]);
            assert_eq!(moved, trained.iter().any(|it| name.contains(it)), "{name}");
            assert_eq!(tensor.dims(), after[name].dims(), "{name}");
        }
        // What came out is a model.
        let logits = |model: &str| {
            let words = ["debug", "logits", "--model", model, "--ids", "5,6,7", "--top", "1"];
            dir.ferrotune(&words).succeeds().stdout
        };
        assert_ne!(logits("out"), logits(&repository(TINY).display().to_string()));
        let expected = fs::read(model(&dir, "out")).expect("the model");
        fs::remove_dir_all(dir.path().join("out/checkpoint-6")).expect("a checkpoint");
        fs::remove_file(dir.path().join("out/config.json")).expect("the config");
        let ran = dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"]).succeeds();
        ran.says("after step 3");
        assert!(fs::read(model(&dir, "out")).expect("the model") == expected, "{keys}");
    }
    let dir = with_config("max_steps: 2\nfinetuning_type: full\n");
    let check = |words: &[&str], said: &str| {
        dir.ferrotune(&[&["train", "c.yaml"], words].concat()).fails(2).says(said);
    };
    check(&["quantization_bit=4"], "`quantization_bit`: quantised weights can't be trained");
    let freeze = "finetuning_type=freeze";
    check(&[freeze, "freeze_trainable_modules=mpl"], "`mpl` is no module of a layer");
    check(&[freeze, "freeze_extra_modules=head"], "`head` is no module beside the layers");
    let gguf = format!("model_name_or_path={}", repository("tests/fixtures/gguf/tiny.gguf").display());
    check(&[&gguf], "needs a model folder as Hugging Face lays it out");
}

#[test]
fn weights_that_were_quantised_before_are_the_same_bits() {
    let dir = with_config("max_steps: 2\nquantization_bit: 4\nnum_threads: 1\nsave_strategy: no\n");
    let model = dir.path().join("model");
    fs::create_dir(&model).expect("a folder");
    for entry in fs::read_dir(repository(TINY)).expect("the model").flatten() {
        if entry.path().is_file() {
            fs::copy(entry.path(), model.join(entry.file_name())).expect("a copy");
        }
    }
    let kept = dir.path().join("kept");
    let run = |folder: &str, out: &str| {
        let words = ["train", "c.yaml", "model_name_or_path=model", &format!("output_dir={out}")];
        dir.ferrotune(&words).env("FERROTUNE_KEPT_WEIGHTS", folder).succeeds();
        let adapter = dir.path().join(out).join("adapter_model.safetensors");
        (dir.losses(out), fs::read(adapter).expect("the adapter"))
    };
    let files = || -> Vec<PathBuf> {
        let mut files: Vec<_> =
            fs::read_dir(&kept).into_iter().flatten().flatten().map(|it| it.path()).collect();
        files.sort();
        files
    };
    let expected = run("off", "without");
    assert!(files().is_empty());
    let folder = kept.display().to_string();
    assert_eq!(run(&folder, "first"), expected);
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    assert_eq!(run(&folder, "second"), expected);

    // What is damaged is quantised again, and gone for the next run.
    let mut bytes = fs::read(file).expect("the file");
    bytes[1000] ^= 1;
    fs::write(file, bytes).expect("the file");
    assert_eq!(run(&folder, "damaged"), expected);
    assert!(files().is_empty(), "{:?}", files());
    assert_eq!(run(&folder, "again"), expected);
    assert_eq!(files().len(), 1);

    // Of a model that is another now, nothing is taken.
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("the weights");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).expect("the weights");
    run(&folder, "changed");
    assert_eq!(files().len(), 2);
    // Nor for scales of another kind.
    dir.ferrotune(&[
        "train",
        "c.yaml",
        "model_name_or_path=model",
        "output_dir=plain",
        "double_quantization=false",
    ])
    .env("FERROTUNE_KEPT_WEIGHTS", &folder)
    .succeeds();
    assert_eq!(files().len(), 3);
}
