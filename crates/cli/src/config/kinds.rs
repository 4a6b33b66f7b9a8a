//! What a key can hold, and how it is read from what was typed. Enums of names are in `choices.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::yaml::{Data, Node};

/// A type that a key can have.
pub trait Setting: Sized {
    /// What a message says was expected.
    fn expected() -> String;
    /// Reads a value; `Err` holds what is wrong with it, to which the caller adds key and line.
    fn read(node: &Node) -> Result<Self, String>;
    /// The value as help shows it.
    fn shown(&self) -> String;
}

pub(super) fn mismatch<T: Setting>(node: &Node) -> String {
    format!("expected {}, found {}", T::expected(), node.shown())
}

pub(super) fn scalar<T: Setting>(node: &Node) -> Result<&str, String> {
    match &node.data {
        Data::Scalar { text, .. } => Ok(text),
        _ => Err(mismatch::<T>(node)),
    }
}

impl Setting for bool {
    fn expected() -> String {
        "true or false".to_string()
    }
    fn read(node: &Node) -> Result<bool, String> {
        // YAML 1.1's yes/no/on/off as well: PyYAML takes them, so files have them.
        match scalar::<bool>(node)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Ok(true),
            "false" | "no" | "off" => Ok(false),
            _ => Err(mismatch::<bool>(node)),
        }
    }
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Setting for u64 {
    fn expected() -> String {
        "a whole number, 0 or more".to_string()
    }
    fn read(node: &Node) -> Result<u64, String> {
        let text = scalar::<u64>(node)?.replace('_', "");
        if let Ok(number) = text.parse() {
            return Ok(number);
        }
        // `500.0` and `1e3` are whole as well.
        match text.parse::<f64>() {
            Ok(number) if number >= 0.0 && number.fract() == 0.0 && number <= 2f64.powi(53) => {
                Ok(number as u64)
            }
            _ => Err(mismatch::<u64>(node)),
        }
    }
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Setting for i64 {
    fn expected() -> String {
        "a whole number".to_string()
    }
    fn read(node: &Node) -> Result<i64, String> {
        scalar::<i64>(node)?.replace('_', "").parse().map_err(|_| mismatch::<i64>(node))
    }
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Setting for usize {
    fn expected() -> String {
        u64::expected()
    }
    fn read(node: &Node) -> Result<usize, String> {
        usize::try_from(u64::read(node)?).map_err(|_| mismatch::<usize>(node))
    }
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Setting for f64 {
    fn expected() -> String {
        "a number".to_string()
    }
    fn read(node: &Node) -> Result<f64, String> {
        match scalar::<f64>(node)?.replace('_', "").parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(mismatch::<f64>(node)),
        }
    }
    fn shown(&self) -> String {
        if *self != 0.0 && self.abs() < 1e-3 { format!("{self:e}") } else { self.to_string() }
    }
}

impl Setting for String {
    fn expected() -> String {
        "text".to_string()
    }
    fn read(node: &Node) -> Result<String, String> {
        if node.is_null() {
            return Err(mismatch::<String>(node));
        }
        scalar::<String>(node).map(str::to_string)
    }
    fn shown(&self) -> String {
        self.clone()
    }
}

impl Setting for PathBuf {
    fn expected() -> String {
        "a path".to_string()
    }
    fn read(node: &Node) -> Result<PathBuf, String> {
        match scalar::<PathBuf>(node)? {
            _ if node.is_null() => Err(mismatch::<PathBuf>(node)),
            "" => Err(mismatch::<PathBuf>(node)),
            text => Ok(PathBuf::from(text)),
        }
    }
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

/// `null` or one of the strings "none" is `None`.
impl<T: Setting> Setting for Option<T> {
    fn expected() -> String {
        format!("{} or null", T::expected())
    }
    fn read(node: &Node) -> Result<Option<T>, String> {
        let none = node.is_null()
            || matches!(&node.data, Data::Scalar { text, quoted: false } if text.eq_ignore_ascii_case("none"));
        if none { Ok(None) } else { T::read(node).map(Some) }
    }
    fn shown(&self) -> String {
        self.as_ref().map_or_else(|| "null".to_string(), T::shown)
    }
}

/// Names in a list, or separated by commas.
impl Setting for Vec<String> {
    fn expected() -> String {
        "names separated by commas, or a list of names".to_string()
    }
    fn read(node: &Node) -> Result<Vec<String>, String> {
        match &node.data {
            _ if node.is_null() => Ok(Vec::new()),
            Data::Scalar { text, .. } => {
                let names = text.split(',').map(str::trim);
                Ok(names.filter(|name| !name.is_empty()).map(str::to_string).collect())
            }
            Data::List(items) => items.iter().map(String::read).collect(),
            Data::Map(_) => Err(mismatch::<Vec<String>>(node)),
        }
    }
    fn shown(&self) -> String {
        if self.is_empty() { "none".to_string() } else { self.join(",") }
    }
}

impl Setting for Vec<PathBuf> {
    fn expected() -> String {
        "paths separated by commas, or a list of paths".to_string()
    }
    fn read(node: &Node) -> Result<Vec<PathBuf>, String> {
        let paths = Vec::<String>::read(node).map_err(|_| mismatch::<Vec<PathBuf>>(node))?;
        Ok(paths.into_iter().map(PathBuf::from).collect())
    }
    fn shown(&self) -> String {
        self.iter().map(PathBuf::shown).collect::<Vec<_>>().shown()
    }
}

/// Numbers in a list, or separated by commas.
impl Setting for Vec<usize> {
    fn expected() -> String {
        "whole numbers separated by commas, or a list of them".to_string()
    }
    fn read(node: &Node) -> Result<Vec<usize>, String> {
        let numbers = Vec::<String>::read(node).map_err(|_| mismatch::<Vec<usize>>(node))?;
        numbers.iter().map(|it| it.parse().map_err(|_| mismatch::<Vec<usize>>(node))).collect()
    }
    fn shown(&self) -> String {
        self.iter().map(usize::to_string).collect::<Vec<_>>().shown()
    }
}

/// Names with values.
impl Setting for BTreeMap<String, String> {
    fn expected() -> String {
        "a mapping from names to text, as in `{name: Ada}`".to_string()
    }
    fn read(node: &Node) -> Result<BTreeMap<String, String>, String> {
        match &node.data {
            _ if node.is_null() => Ok(BTreeMap::new()),
            Data::Map(entries) => {
                entries.iter().map(|(name, value)| Ok((name.clone(), String::read(value)?))).collect()
            }
            _ => Err(mismatch::<BTreeMap<String, String>>(node)),
        }
    }
    fn shown(&self) -> String {
        let entries: Vec<String> = self.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        if entries.is_empty() { "none".to_string() } else { format!("{{{}}}", entries.join(", ")) }
    }
}

/// Numbers in a list, or separated by commas.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Numbers(pub Vec<f64>);

impl Setting for Numbers {
    fn expected() -> String {
        "numbers separated by commas, or a list of numbers".to_string()
    }
    fn read(node: &Node) -> Result<Numbers, String> {
        let parts = Vec::<String>::read(node).map_err(|_| mismatch::<Numbers>(node))?;
        let numbers: Result<Vec<f64>, String> = parts
            .iter()
            .map(|part| f64::read(&Node::plain(node.line, part)).map_err(|_| mismatch::<Numbers>(node)))
            .collect();
        numbers.map(Numbers)
    }
    fn shown(&self) -> String {
        let shown: Vec<String> = self.0.iter().map(f64::to_string).collect();
        shown.shown()
    }
}

/// A number of steps, or a share of all of them when it is less than 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Steps {
    /// So many.
    Count(u64),
    /// This share of the run's steps, more than 0 and less than 1.
    Share(f64),
}

impl Steps {
    /// The number of steps in a run of `total`.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Steps::Count(count) => count,
            Steps::Share(share) => (share * total as f64).ceil() as u64,
        }
    }
}

impl Setting for Steps {
    fn expected() -> String {
        "a number of steps, or a share of all steps between 0 and 1".to_string()
    }
    fn read(node: &Node) -> Result<Steps, String> {
        let number = f64::read(node).map_err(|_| mismatch::<Steps>(node))?;
        if number > 0.0 && number < 1.0 {
            return Ok(Steps::Share(number));
        }
        u64::read(node).map(Steps::Count).map_err(|_| mismatch::<Steps>(node))
    }
    fn shown(&self) -> String {
        match self {
            Steps::Count(count) => count.to_string(),
            Steps::Share(share) => share.to_string(),
        }
    }
}

/// A time in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Time(pub f64);

impl Setting for Time {
    fn expected() -> String {
        "seconds, or a time such as 90m, 11.5h or 1:30:00".to_string()
    }
    fn read(node: &Node) -> Result<Time, String> {
        let text = scalar::<Time>(node)?.trim();
        let number = |text: &str| text.parse::<f64>().ok().filter(|it| it.is_finite() && *it >= 0.0);
        let with_unit = [("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)]
            .iter()
            .find_map(|(unit, seconds)| Some(number(text.strip_suffix(unit)?)? * seconds));
        let clock = || text.split(':').try_fold(0.0, |sum, part| Some(60.0 * sum + number(part)?));
        with_unit.or_else(clock).filter(|it| *it > 0.0).map(Time).ok_or_else(|| mismatch::<Time>(node))
    }
    fn shown(&self) -> String {
        format!("{}s", self.0)
    }
}

/// `max_steps`: a limit, or none (transformers writes -1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxSteps(pub Option<u64>);

impl Setting for MaxSteps {
    fn expected() -> String {
        "a number of steps, 1 or more, or null".to_string()
    }
    fn read(node: &Node) -> Result<MaxSteps, String> {
        match Option::<f64>::read(node) {
            Ok(None) => Ok(MaxSteps(None)),
            Ok(Some(number)) if number < 0.0 => Ok(MaxSteps(None)),
            Ok(Some(number)) if number >= 1.0 => u64::read(node).map(|steps| MaxSteps(Some(steps))),
            _ => Err(mismatch::<MaxSteps>(node)),
        }
    }
    fn shown(&self) -> String {
        self.0.shown()
    }
}

/// `optim_args`, as transformers writes them: `name=value` with commas between.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimArgs {
    /// Of SGD and Muon.
    pub momentum: Option<f64>,
}

impl Setting for OptimArgs {
    fn expected() -> String {
        "momentum=NUMBER".to_string()
    }
    fn read(node: &Node) -> Result<OptimArgs, String> {
        let mut args = OptimArgs::default();
        if node.is_null() {
            return Ok(args);
        }
        for word in scalar::<OptimArgs>(node)?.split(',').map(str::trim).filter(|it| !it.is_empty()) {
            let number = word.strip_prefix("momentum=").and_then(|text| text.parse().ok());
            let momentum = number.filter(|it| (0.0..1.0).contains(it));
            args.momentum = Some(momentum.ok_or_else(|| mismatch::<OptimArgs>(node))?);
        }
        Ok(args)
    }
    fn shown(&self) -> String {
        self.momentum.map_or_else(|| "none".to_string(), |momentum| format!("momentum={momentum}"))
    }
}

/// Where to go on from.
#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    /// Start anew.
    No,
    /// The newest checkpoint of `output_dir`; without one that is an error.
    Newest,
    /// The newest checkpoint of `output_dir`, or the start.
    Auto,
    /// This checkpoint.
    From(PathBuf),
}

impl Setting for Resume {
    fn expected() -> String {
        "true, false, auto or the path of a checkpoint".to_string()
    }
    fn read(node: &Node) -> Result<Resume, String> {
        if node.is_null() {
            return Ok(Resume::No);
        }
        if let Ok(newest) = bool::read(node) {
            return Ok(if newest { Resume::Newest } else { Resume::No });
        }
        match scalar::<Resume>(node)? {
            "auto" => Ok(Resume::Auto),
            path => Ok(Resume::From(PathBuf::from(path))),
        }
    }
    fn shown(&self) -> String {
        match self {
            Resume::No => "false".to_string(),
            Resume::Newest => "true".to_string(),
            Resume::Auto => "auto".to_string(),
            Resume::From(path) => path.shown(),
        }
    }
}
