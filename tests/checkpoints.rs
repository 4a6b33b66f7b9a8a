//! Nothing is lost: whatever ends a run, it goes on from the newest whole checkpoint, to the same bits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::train::with_config;
use crate::util::Dir;

/// A run that can be told from others by its last bit, with a checkpoint after every step.
const KEYS: &str = "max_steps: 12\nlora_dropout: 0.1\nnum_threads: 2\nsave_steps: 1\nsave_total_limit: 3\nresume_from_checkpoint: auto\n";

fn adapter(dir: &Dir) -> Vec<u8> {
    fs::read(dir.path().join("out/adapter_model.safetensors")).expect("the adapter")
}

fn start(dir: &Dir, words: &[&str]) -> Child {
    let mut command = dir.ferrotune(&[&["train", "c.yaml"], words].concat()).command();
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program")
}

/// Waits for a child to have logged some steps.
fn wait_for_steps(dir: &Dir, child: &mut Child, steps: usize) {
    let (log, start) = (dir.path().join("out/trainer_log.jsonl"), Instant::now());
    while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < steps {
        assert!(start.elapsed() < Duration::from_secs(60), "no steps");
        assert!(child.try_wait().expect("the program").is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().expect("kill");
    assert!(sent.success());
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|it| it.file_name().to_string_lossy().into_owned()).collect()
}

/// What a run that began then was doing when it was killed, by what it left.
fn phase(out: &Path, since: SystemTime) -> String {
    let mut names = names(out);
    // A leftover of the run before is no sign of this one.
    let fresh = |name: &String| {
        let modified = fs::metadata(out.join(name)).and_then(|it| it.modified());
        !name.starts_with(".checkpoint-") || modified.is_ok_and(|it| it >= since)
    };
    names.retain(fresh);
    let with = |end: &str| names.iter().find(|it| it.starts_with(".checkpoint-") && it.ends_with(end));
    if let Some(partial) = with(".partial") {
        return format!("writing a checkpoint, {} files of {partial}", self::names(&out.join(partial)).len());
    }
    if let Some(old) = with(".old") {
        return format!("writing a checkpoint, removing {old}");
    }
    if names.iter().any(|it| it == "README.md" || it == "tokenizer.json") {
        return "writing the result".to_string();
    }
    match names.iter().filter(|it| it.starts_with("checkpoint-")).max() {
        Some(newest) => format!("training or loading after {newest}"),
        None => "training or loading before the first checkpoint".to_string(),
    }
}

/// `FERROTUNE_KILLS=200` for as many; each is told on standard error.
#[test]
fn a_run_that_is_killed_at_any_instant_ends_as_if_it_had_not_been() {
    let kills: usize = std::env::var("FERROTUNE_KILLS").ok().and_then(|it| it.parse().ok()).unwrap_or(20);
    let whole = with_config(KEYS);
    let started = Instant::now();
    whole.ferrotune(&["train", "c.yaml"]).succeeds();
    let (expected, losses, length) = (adapter(&whole), whole.losses("out"), started.elapsed());
    let (mut killed, mut inside, mut random, mut finished) = (0, 0, 0x9E37_79B9_u64, 0);
    while killed < kills {
        let dir = with_config(KEYS);
        for _ in 0..3 {
            // xorshift: any instant of a whole run.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let delay = length.mul_f64((random % 10_000) as f64 / 10_000.0);
            let (since, mut child) = (SystemTime::now(), start(&dir, &[]));
            std::thread::sleep(delay);
            if child.try_wait().expect("the program").is_some() {
                break;
            }
            child.kill().expect("SIGKILL");
            child.wait().expect("the program");
            killed += 1;
            let phase = phase(&dir.path().join("out"), since);
            inside += usize::from(phase.starts_with("writing a checkpoint"));
            eprintln!("kill {killed} after {:4} ms: {phase}", delay.as_millis());
        }
        dir.ferrotune(&["train", "c.yaml"]).succeeds();
        assert!(adapter(&dir) == expected, "the adapter");
        assert_eq!(dir.losses("out"), losses, "the log");
        let left = names(&dir.path().join("out"));
        assert!(!left.iter().any(|it| it.starts_with(".checkpoint-")), "{left:?}");
        assert_eq!(left.iter().filter(|it| it.starts_with("checkpoint-")).count(), 3, "{left:?}");
        finished += 1;
    }
    eprintln!(
        "{killed} kills, {inside} of them inside checkpoint writing; {finished} runs, all bit-identical"
    );
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = with_config(KEYS);
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let (expected, losses) = (adapter(&dir), dir.losses("out"));
    let file = dir.path().join("out/checkpoint-12/optimizer.safetensors");
    let mut bytes = fs::read(&file).expect("a file");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&file, bytes).expect("a file");
    fs::remove_file(dir.path().join("out/checkpoint-11/tokenizer.json")).expect("a file");
    let ran = dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"]).succeeds();
    ran.says("checkpoint-12/optimizer.safetensors: isn't what was written")
        .says("checkpoint-11/tokenizer.json")
        .says("going on from out/checkpoint-10 after step 10");
    assert!(adapter(&dir) == expected && dir.losses("out") == losses);
    let named = ["train", "c.yaml", "resume_from_checkpoint=out/checkpoint-11"];
    fs::remove_file(dir.path().join("out/checkpoint-11/SHA256SUMS")).expect("a file");
    dir.ferrotune(&named).fails(1).says("error: ").says("SHA256SUMS");
}

#[test]
fn a_run_that_was_over_keeps_its_results() {
    let dir = with_config("max_steps: 4\nsave_steps: 2\n");
    let again = ["train", "c.yaml", "resume_from_checkpoint=true"];
    let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).expect("a file");
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let (results, expected) = (read("train_results.json"), adapter(&dir));
    dir.ferrotune(&again).succeeds().prints("all 4 steps were taken before");
    assert_eq!(read("train_results.json"), results);
    // As if it had been killed between its last checkpoint and its final files.
    for name in ["train_results.json", "all_results.json", "adapter_model.safetensors", "adapter_config.json"]
    {
        fs::remove_file(dir.path().join("out").join(name)).expect("a file");
    }
    dir.ferrotune(&again).succeeds();
    assert!(adapter(&dir) == expected);
    let loss =
        |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON")["train_loss"].as_f64();
    let (before, now) = (loss(&results).expect("a loss"), loss(&read("train_results.json")).expect("a loss"));
    assert!((before - now).abs() < 1e-9, "{before} {now}");
    dir.ferrotune(&["train", "c.yaml", "output_dir=o", "lora_target=W_pack"])
        .fails(2)
        .says("`W_pack` is no projection");
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_the_same_command_goes_on() {
    for (name, resume) in [("-INT", false), ("-TERM", true)] {
        let keys = if resume { "resume_from_checkpoint: auto\n" } else { "" };
        let dir = with_config(&format!("max_steps: 100000\nsave_strategy: no\n{keys}"));
        let mut child = start(&dir, &[]);
        wait_for_steps(&dir, &mut child, 3);
        signal(&child, name);
        let output = child.wait_with_output().expect("the program");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        let command = if resume { "train c.yaml\n" } else { "train c.yaml resume_from_checkpoint=true\n" };
        assert!(stderr.contains(&format!("Go on with: ferrotune {command}")), "{stderr}");
        let done = dir.losses("out").len();
        let words: &[&str] = if resume { &[] } else { &["resume_from_checkpoint=true"] };
        let mut child = start(&dir, words);
        wait_for_steps(&dir, &mut child, done + 2);
        // Twice leaves at once.
        signal(&child, name);
        signal(&child, name);
        let code = child.wait_with_output().expect("the program").status.code();
        assert!(matches!(code, Some(75 | 130)), "{code:?}");
    }
}

#[test]
fn max_time_saves_and_stops() {
    let dir = with_config("max_steps: 1000000\nmax_time: 2\n");
    let started = Instant::now();
    let mut command = dir.ferrotune(&["train", "c.yaml"]).command();
    let output = command.output().expect("the program");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("`max_time` is over after step "), "{stderr}");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(names(&dir.path().join("out")).iter().any(|it| it.starts_with("checkpoint-")));
    dir.ferrotune(&["train", "c.yaml", "max_time=soon"]).fails(2).says("expected seconds, or a time such as");
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let dir = with_config("max_steps: 100000\n");
    let mut child = start(&dir, &[]);
    wait_for_steps(&dir, &mut child, 1);
    let ran = dir.ferrotune(&["train", "c.yaml", "overwrite_output_dir=true"]).fails(1);
    ran.says(&format!("error: out: another run (process {}) writes into this folder", child.id()));
    child.kill().expect("SIGKILL");
    child.wait().expect("the program");
    dir.ferrotune(&["train", "c.yaml", "overwrite_output_dir=true", "max_steps=2"]).succeeds();
}

#[test]
fn steps_that_are_not_finite_are_left_out_and_then_the_run_stops() {
    let dir = with_config("max_steps: 50\nsave_steps: 1\n");
    let ran = dir.ferrotune(&["train", "c.yaml", "learning_rate=1e38"]).fails(1);
    let ran = ran.says("is left out: its loss is NaN").says("of data set `rows.jsonl`");
    ran.says("3 steps in a row were left out").says("The last checkpoint is as good as it was");
    let newest = names(&dir.path().join("out"))
        .iter()
        .filter_map(|it| it.strip_prefix("checkpoint-")?.parse::<usize>().ok())
        .max();
    assert!(newest.is_some());
}

/// Where files end early, as on a disk that is full.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_leaves_the_last_checkpoint() {
    let dir = with_config("max_steps: 12\nnum_threads: 2\nsave_steps: 1\nlora_rank: 8\n");
    dir.ferrotune(&["train", "c.yaml", "output_dir=expected"]).succeeds();
    let program = crate::util::program();
    let script = format!(
        "mkdir disk && mount -t tmpfs -o size=1m none disk || exit 99\n\
         '{}' train c.yaml output_dir=disk/out; echo $? > code; cp -r disk/out out",
        program.display()
    );
    let mut command = Command::new("unshare");
    let ran = command.args(["-m", "sh", "-c", &script]).current_dir(dir.path()).output();
    let Ok(output) = ran.as_ref() else { return eprintln!("skipped: no unshare: {ran:?}") };
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() != Some(0) {
        return eprintln!("skipped: a disk of its own can't be mounted here: {stderr}");
    }
    assert_eq!(fs::read_to_string(dir.path().join("code")).expect("the code").trim(), "1", "{stderr}");
    assert!(stderr.contains("No space left on device") && !stderr.contains("panicked"), "{stderr}");
    assert!(!names(&dir.path().join("out")).iter().any(|it| it.ends_with(".partial")));
    let ran = dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"]).succeeds();
    ran.says("going on from out/checkpoint-");
    let result =
        |folder: &str| fs::read(PathBuf::from(dir.path()).join(folder).join("adapter_model.safetensors"));
    assert!(result("out").expect("the adapter") == result("expected").expect("the adapter"));
}

/// A folder that nobody can write to, root neither.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_folder_is_said_before_training() {
    let dir = with_config("max_steps: 2\n");
    let ran = dir.ferrotune(&["train", "c.yaml", "output_dir=/proc/ferrotune-out"]).fails(1);
    ran.says("error: can't create /proc/ferrotune-out");
}
