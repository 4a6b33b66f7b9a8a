//! Which files of PTX the sources make, and what each is made of.

use std::fmt::Write;
use std::path::Path;

use super::{names, ptx, read, toolkit};
use crate::{Result, sha256};

/// Architectures of a source that doesn't name its own: T4 and newer, A100 and newer.
const ARCHS: &str = "75, 80";

/// What nvcc is told besides the architecture and the macro.
const FLAGS: [&str; 4] = ["-ptx", "-std=c++17", "-Werror", "all-warnings"];

/// A file of PTX: a source for an architecture, with a value of its macro if it has one.
pub struct Unit {
    /// `attention.cu`
    pub source: String,
    /// `attention.64`
    pub module: String,
    /// `80`
    pub arch: String,
    /// What nvcc is told.
    pub flags: Vec<String>,
    /// The first line of the file, with the hash of all that it is made of.
    pub head: String,
}

impl Unit {
    pub fn file(&self) -> String {
        format!("{}.sm_{}.ptx", self.module, self.arch)
    }

    /// The architecture as a number. One with an `a` gets a 1 for it, and so is above all that it could be
    /// compared with: it is for one compute capability only.
    pub fn number(&self) -> u32 {
        self.arch.replace('a', "1").parse().unwrap_or(u32::MAX)
    }

    /// What follows the head and the version, if the file is there and was made of the sources as they are.
    pub fn current(&self, outputs: &Path) -> Option<String> {
        let text = read(&outputs.join(self.file())).ok()?;
        let (version, body) = text.strip_prefix(&self.head)?.strip_prefix('\n')?.split_once('\n')?;
        ptx::version(version)?;
        Some(body.to_string())
    }
}

/// Every file that the sources of a folder make.
pub fn units(folder: &Path) -> Result<Vec<Unit>> {
    // Any source may include any header.
    let mut headers = String::new();
    for (name, text) in texts(folder, "cuh")? {
        let _ = write!(headers, "{name} {}\n{text}", text.len());
    }
    let mut units = Vec::new();
    for (source, text) in texts(folder, "cu")? {
        let name = source.trim_end_matches(".cu");
        for (arch, (define, value)) in directives(&source, &text)?.units() {
            let mut module = name.to_string();
            let mut flags: Vec<String> = FLAGS.map(String::from).into();
            flags.push(format!("-arch=compute_{arch}"));
            if !value.is_empty() {
                module = format!("{name}.{value}");
                flags.push(format!("-D{define}={value}"));
            }
            let made_of = format!(
                "{}\n{}\n{source} {}\n{text}{headers}",
                toolkit::packages(),
                flags.join(" "),
                text.len()
            );
            let hash = sha256::hex(made_of.as_bytes());
            let head = format!("// Made by `cargo xtask kernels` from {source}, SHA-256 {hash}");
            units.push(Unit { source: source.clone(), module, arch: arch.clone(), flags, head });
        }
    }
    Ok(units)
}

/// What a source asks for in the comment that it begins with.
#[derive(Debug, PartialEq, Eq)]
struct Directives {
    archs: Vec<String>,
    /// The macro and a value of it; both are empty where the source is compiled once.
    values: Vec<(String, String)>,
    /// Values for further architectures, which have no others.
    further: Vec<(String, (String, String))>,
}

impl Directives {
    /// Each architecture with each of its values.
    fn units(&self) -> impl Iterator<Item = (&String, &(String, String))> {
        let all = self.archs.iter().flat_map(|arch| self.values.iter().map(move |it| (arch, it)));
        all.chain(self.further.iter().map(|(arch, value)| (arch, value)))
    }
}

fn directives(source: &str, text: &str) -> Result<Directives> {
    let list = |text: &str| text.split(',').map(|it| it.trim().to_string()).collect::<Vec<_>>();
    let is_word = |it: &str| !it.is_empty() && it.chars().all(|it| it.is_ascii_alphanumeric() || it == '_');
    let none = vec![(String::new(), String::new())];
    let mut found = Directives { archs: list(ARCHS), values: none, further: Vec::new() };
    for line in text.lines().map_while(|line| line.strip_prefix("//")).map(str::trim) {
        let archs = |text: &str| {
            let archs = list(text);
            let known =
                |it: &String| it.strip_suffix('a').unwrap_or(it).parse::<u32>().is_ok_and(|it| it >= 75);
            if archs.iter().all(known) {
                return Ok(archs);
            }
            Err(format!("{source}: `// {line}`: expected numbers from 75 on, as in `// archs: 75, 90a`"))
        };
        if let Some(text) = line.strip_prefix("archs:") {
            found.archs = archs(text)?;
        } else if let Some(text) = line.strip_prefix("compile:") {
            let (text, of) = text.split_once(" for ").map_or((text, None), |(text, of)| (text, Some(of)));
            let (define, values) = text.split_once('=').unwrap_or_default();
            let values: Vec<(String, String)> =
                list(values).into_iter().map(|value| (define.trim().to_string(), value)).collect();
            if !values.iter().all(|(define, value)| is_word(define) && is_word(value)) {
                return Err(format!("{source}: `// {line}`: expected `// compile: MACRO = value, value`"));
            }
            match of {
                None => found.values = values,
                Some(of) => {
                    for arch in archs(of)? {
                        found.further.extend(values.iter().map(|value| (arch.clone(), value.clone())));
                    }
                }
            }
        }
    }
    Ok(found)
}

/// The files of a folder with this extension, in order of their names.
fn texts(folder: &Path, extension: &str) -> Result<Vec<(String, String)>> {
    let mut texts = Vec::new();
    for name in names(folder)? {
        if Path::new(&name).extension().is_some_and(|it| it == extension) {
            let text = read(&folder.join(&name))?;
            texts.push((name, text));
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read() {
        let check = |text: &str, archs: &[&str], values: &[(&str, &str)]| {
            let found = directives("x.cu", text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert_eq!(found.archs, archs, "{text:?}");
            let owned = |it: &(&str, &str)| (it.0.to_string(), it.1.to_string());
            assert_eq!(found.values, values.iter().map(owned).collect::<Vec<_>>(), "{text:?}");
        };
        check("", &["75", "80"], &[("", "")]);
        check("// Attention.\n//archs: 80,90a\n", &["80", "90a"], &[("", "")]);
        check("// compile: HEAD_DIM = 64, 128\n", &["75", "80"], &[("HEAD_DIM", "64"), ("HEAD_DIM", "128")]);
        check("// compile: D = 1\n// archs: 80\nint x;\n", &["80"], &[("D", "1")]);
        let text = "// compile: D = 1, 2\n// compile: D = 2 for 90a\n";
        check(text, &["75", "80"], &[("D", "1"), ("D", "2")]);
        let found = directives("x.cu", text).unwrap();
        let units: Vec<_> = found.units().map(|(arch, (_, value))| format!("{value}.{arch}")).collect();
        assert_eq!(units, ["1.75", "2.75", "1.80", "2.80", "2.90a"]);
        // Only the comment that a file begins with.
        check("int x;\n// archs: 80\n", &["75", "80"], &[("", "")]);
    }

    #[test]
    fn directives_that_make_no_sense_are_refused() {
        for line in [
            "// archs:",
            "// archs: sm_80",
            "// archs: 70",
            "// compile: 64",
            "// compile: D = 64,",
            "// compile: = 1",
            "// compile: D = 1 for sm_90",
        ] {
            let error = directives("x.cu", line).unwrap_err();
            assert!(error.contains("x.cu") && error.contains("expected"), "{error}");
        }
    }
}
