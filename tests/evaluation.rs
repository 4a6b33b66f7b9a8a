//! Evaluation during and after a run, and what comes of it.

use std::fs;

use serde_json::Value;

use crate::train::with_config;
use crate::util::Dir;

const ROWS: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"Question 3\"}, {\"role\": \"assistant\", \"content\": \"Answer 3\"}]}\n\
    {\"messages\": [{\"role\": \"user\", \"content\": \"Question 40\"}, {\"role\": \"assistant\", \"content\": \"Answer 40\"}]}\n\
    {\"messages\": [{\"role\": \"user\", \"content\": \"Something else\"}, {\"role\": \"assistant\", \"content\": \"Whatever\"}]}\n";

fn with_eval(keys: &str) -> Dir {
    let dir = with_config(&format!("eval_dataset: eval.jsonl\n{keys}"));
    dir.file("eval.jsonl", ROWS);
    dir
}

/// (step, value) of each line of the log that has this number.
fn logged(dir: &Dir, name: &str) -> Vec<(u64, f64)> {
    let log = fs::read_to_string(dir.path().join("out/trainer_log.jsonl")).expect("the log");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter_map(|it| Some((it["current_steps"].as_u64()?, it[name].as_f64()?))).collect()
}

fn state(dir: &Dir, checkpoint: &str) -> Value {
    let path = dir.path().join("out").join(checkpoint).join("trainer_state.json");
    serde_json::from_str(&fs::read_to_string(path).expect("the state")).expect("JSON")
}

fn adapter(dir: &Dir, folder: &str) -> Vec<u8> {
    fs::read(dir.path().join(folder).join("adapter_model.safetensors")).expect("the adapter")
}

#[test]
fn losses_on_other_rows_fall_and_are_logged() {
    let keys = "max_steps: 10\neval_strategy: steps\neval_steps: 4\neval_on_start: true\nsave_steps: 5\n";
    let dir = with_eval(keys);
    let ran = dir.ferrotune(&["train", "c.yaml"]).succeeds();
    ran.says("step 0/10  eval_loss ").says("step 8/10  eval_loss ").says("token accuracy");
    let losses = logged(&dir, "eval_loss");
    assert_eq!(losses.iter().map(|it| it.0).collect::<Vec<_>>(), [0, 4, 8, 10]);
    assert!(losses[3].1 < losses[0].1 - 0.5, "{losses:?}");
    for ((_, loss), (_, perplexity)) in losses.iter().zip(logged(&dir, "eval_perplexity")) {
        assert!((loss.exp() - perplexity).abs() < 1e-9);
    }
    assert!(logged(&dir, "eval_accuracy").iter().all(|(_, it)| (0.0..=1.0).contains(it)));
    // One at a time is the same.
    let words = ["train", "c.yaml", "overwrite_output_dir=true", "per_device_eval_batch_size=1"];
    dir.ferrotune(&words).succeeds();
    let one_by_one = logged(&dir, "eval_loss");
    for ((_, a), (_, b)) in losses.iter().zip(&one_by_one) {
        assert!((a - b).abs() < 1e-5, "{losses:?} {one_by_one:?}");
    }
    let state = state(&dir, "checkpoint-10");
    assert_eq!((state["global_step"].as_u64(), state["eval_steps"].as_u64()), (Some(10), Some(4)));
    let history = state["log_history"].as_array().expect("a list");
    assert_eq!(history.iter().filter(|it| it.get("eval_loss").is_some()).count(), 4);
    assert_eq!(history.iter().filter(|it| it.get("grad_norm").is_some()).count(), 10);
}

#[test]
fn a_run_that_gets_no_better_stops_early() {
    let keys = "max_steps: 50\neval_strategy: steps\neval_steps: 2\nearly_stopping_steps: 2\n";
    let dir = with_eval(keys);
    let ran = dir.ferrotune(&["train", "c.yaml", "learning_rate=0"]).succeeds();
    ran.says("stopped after step 6: evaluations got no better").prints("trained 6 steps");
    // The same command doesn't go on where there is nothing to hope for.
    let words = ["train", "c.yaml", "learning_rate=0", "resume_from_checkpoint=auto"];
    dir.ferrotune(&words).succeeds().says("stopped after step 6");
}

#[test]
fn the_best_model_is_kept_and_ends_the_run() {
    // What is best is a matter of the key: here the highest loss, which comes early.
    let keys = "max_steps: 12\ngreater_is_better: true\neval_strategy: steps\neval_steps: 1\nload_best_model_at_end: true\nsave_strategy: steps\nsave_steps: 6\nsave_total_limit: 1\n";
    let dir = with_eval(keys);
    dir.ferrotune(&["train", "c.yaml", "learning_rate=0.3"]).succeeds().says(" is the best: ");
    let losses = logged(&dir, "eval_loss");
    let best = losses.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("evaluations").0;
    assert!(best < 12, "the test wants a best model before the last: {losses:?}");
    let folder = format!("out/checkpoint-{best}");
    assert!(adapter(&dir, "out") == adapter(&dir, &folder), "the model of step {best}");
    let state = state(&dir, "checkpoint-12");
    assert_eq!(state["best_global_step"].as_u64(), Some(best));
    assert_eq!(state["best_model_checkpoint"].as_str(), Some(folder.as_str()));
    let checkpoints = fs::read_dir(dir.path().join("out")).expect("a folder").flatten();
    let kept = checkpoints.filter(|it| it.file_name().to_string_lossy().starts_with("checkpoint-")).count();
    assert_eq!(kept, 2, "the best and the newest");
}

#[test]
fn plateaus_lower_the_rate_and_resume_exactly() {
    let keys = "max_steps: 8\neval_strategy: steps\neval_steps: 1\nlr_scheduler_type: reduce_lr_on_plateau\nlr_scheduler_kwargs: {patience: 0, factor: 0.5, threshold: 0.5, threshold_mode: abs}\nsave_steps: 4\nnum_threads: 2\n";
    let dir = with_eval(keys);
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let (rates, expected, losses) = (logged(&dir, "lr"), adapter(&dir, "out"), logged(&dir, "eval_loss"));
    assert!(rates[0].1 == 1e-2 && rates[7].1 < 1e-2, "{rates:?}");
    fs::remove_dir_all(dir.path().join("out/checkpoint-8")).expect("a checkpoint");
    dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"]).succeeds().says("after step 4");
    assert!(adapter(&dir, "out") == expected && logged(&dir, "lr") == rates);
    assert_eq!(logged(&dir, "eval_loss"), losses);
}

#[test]
fn keys_that_need_something_to_evaluate_on() {
    let dir = with_config("max_steps: 2\n");
    let check = |word: &str, said: &str| drop(dir.ferrotune(&["train", "c.yaml", word]).fails(2).says(said));
    check("eval_strategy=steps", "`eval_strategy`: there is nothing to evaluate on; name an `eval_dataset`");
    check("do_eval=true", "`do_eval`: there is nothing to evaluate on");
    check("load_best_model_at_end=true", "`load_best_model_at_end`: needs evaluations during the run");
    check("lr_scheduler_type=reduce_lr_on_plateau", "needs evaluations during the run");
    check("evaluation_strategy=steps", "use `eval_strategy`");
}

#[test]
fn answers_are_compared_with_the_expected_ones() {
    let dir = with_eval(
        "max_steps: 4\ndo_predict: true\npredict_with_generate: true\nmax_new_tokens: 6\ndo_sample: false\n",
    );
    dir.ferrotune(&["train", "c.yaml"]).succeeds().says("3 predictions: BLEU-4 ");
    let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).expect(name);
    let json = |name: &str| serde_json::from_str::<Value>(&read(name)).expect("JSON");
    let predictions = read("generated_predictions.jsonl");
    let rows: Vec<Value> =
        predictions.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[2]["label"], "Whatever");
    let prompt = rows[2]["prompt"].as_str().expect("text");
    assert!(prompt.contains("Something else") && prompt.contains("<|im_start|>"), "{prompt}");
    let (results, all) = (json("predict_results.json"), json("all_results.json"));
    for name in ["predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l"] {
        assert!((0.0..=100.0).contains(&results[name].as_f64().expect(name)), "{results}");
    }
    for name in ["train_loss", "eval_loss", "predict_rouge-l", "train_runtime"] {
        assert!(all[name].is_number(), "{name} in {all}");
    }
    assert_eq!(all["eval_loss"], json("eval_results.json")["eval_loss"]);
    // The same without training.
    let words = [
        "train",
        "c.yaml",
        "do_train=false",
        "do_eval=true",
        "adapter_name_or_path=out",
        "output_dir=judged",
    ];
    dir.ferrotune(&words).succeeds().says("3 predictions: BLEU-4 ").says("eval_loss ");
    let judged = |name: &str| fs::read_to_string(dir.path().join("judged").join(name)).expect(name);
    assert_eq!(judged("generated_predictions.jsonl"), predictions);
    let judged: Value = serde_json::from_str(&judged("eval_results.json")).expect("JSON");
    assert_eq!(judged["eval_loss"], all["eval_loss"]);
    assert!(!dir.path().join("judged/adapter_config.json").exists());
    let words = ["train", "c.yaml", "predict_with_generate=false", "output_dir=other"];
    dir.ferrotune(&words).fails(2).says("set `predict_with_generate: true` as well");
}

#[test]
fn runs_are_listed() {
    let dir = with_eval("max_steps: 2\n");
    dir.ferrotune(&["runs"]).succeeds().says("no runs below .");
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let ran = dir.ferrotune(&["runs"]).succeeds().prints("folder").prints("out ").prints("2/2");
    ran.prints("finished");
    fs::remove_file(dir.path().join("out/train_results.json")).expect("the results");
    dir.ferrotune(&["runs", "."]).succeeds().prints("stopped, saved at step 2");
    fs::remove_dir_all(dir.path().join("out/checkpoint-2")).expect("the checkpoint");
    dir.ferrotune(&["runs", "."]).succeeds().prints("stopped, nothing saved");
    dir.ferrotune(&["watch", "out"]).fails(2).says("`watch` draws on a terminal");
}
