//! Which crate may know which: design, turned into a check.

use std::fs;
use std::path::Path;

use crate::{Result, root};

/// Each crate and those of ours that it may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("nn", &["tensor"]),
    ("quant", &["nn", "tensor"]),
    ("lora", &["nn", "tensor"]),
    ("model", &["nn", "tensor"]),
    ("data", &[]),
    ("trainer", &["nn", "data", "tensor"]),
    ("generate", &["model", "nn", "tensor"]),
    ("export", &["model", "lora", "quant", "tensor"]),
    ("hub", &[]),
    ("cli", &["tensor", "nn", "quant", "lora", "model", "data", "trainer", "generate", "export", "hub"]),
];

/// Packages of others that only some crates may use.
const CONFINED: &[(&str, &[&str])] = &[
    ("cudarc", &["tensor"]),
    ("gemm", &["tensor"]),
    ("minijinja", &["data"]),
    ("tokenizers", &["data"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
    ("tracing-subscriber", &["cli"]),
    ("saphyr-parser", &["cli"]),
    ("jieba-rs", &["cli"]),
    ("plotters", &["cli"]),
    ("ratatui", &["cli"]),
    ("anyhow", &["cli"]),
];

/// Compares every manifest under crates/ with the tables.
pub fn run() -> Result<()> {
    let mut wrong = Vec::new();
    let mut names = Vec::new();
    let folder = root().join("crates");
    let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let used = dependencies(&entry.path().join("Cargo.toml"))?;
        wrong.extend(violations(&name, &used));
        names.push(name);
    }
    for (name, _) in ARROWS.iter().filter(|(name, _)| !names.iter().any(|it| it == name)) {
        wrong.push(format!("crates/{name} is in the table of xtask/src/arrows.rs, but not there"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

fn violations(name: &str, used: &[String]) -> Vec<String> {
    let Some((_, allowed)) = ARROWS.iter().find(|it| it.0 == name) else {
        return vec![format!("crates/{name} is not in the table of xtask/src/arrows.rs")];
    };
    let mut wrong = Vec::new();
    for package in used {
        if let Some(ours) = package.strip_prefix("ferrotune-")
            && !allowed.contains(&ours)
        {
            wrong.push(format!("crates/{name} must not know `{ours}`; it may know {allowed:?}"));
        }
        if let Some((_, users)) = CONFINED.iter().find(|it| it.0 == package)
            && !users.contains(&name)
        {
            wrong.push(format!("crates/{name} must not use `{package}`: that is for {users:?}"));
        }
    }
    wrong
}

/// The packages under `[dependencies]` and its variants for targets and builds; those of tests may go anywhere.
fn dependencies(manifest: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
    Ok(scan(&text))
}

fn scan(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.split(']').next().unwrap_or_default();
            // `[dependencies.name]` is a section of its own.
            if let Some((_, name)) = section.split_once("dependencies.")
                && !section.starts_with("dev-")
            {
                names.push(name.to_string());
            }
            inside = section.ends_with("dependencies") && !section.ends_with("dev-dependencies");
        } else if inside && !line.starts_with('#') {
            let end = line.find(['.', '=', ' ']).unwrap_or(0);
            if end > 0 {
                names.push(line[..end].to_string());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_read() {
        let text = "[package]\nname = \"x\"\n[dependencies]\nferrotune-nn.workspace = true\n# serde = \"1\"\nhalf = \"2\"\n\
            [dev-dependencies]\nclap = \"4\"\n[target.'cfg(unix)'.dependencies]\nlibc = \"1\"\n[dependencies.gemm]\nversion = \"1\"\n[lints]\nworkspace = true\n";
        assert_eq!(scan(text), ["ferrotune-nn", "half", "libc", "gemm"]);
    }

    #[test]
    fn wrong_arrows_are_named() {
        let used = ["ferrotune-quant".to_string(), "clap".to_string(), "ferrotune-nn".to_string()];
        let wrong = violations("lora", &used);
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(wrong[0].contains("`quant`") && wrong[1].contains("`clap`"));
        assert!(violations("web", &[])[0].contains("not in the table"));
    }
}
