//! What the program says: results on standard output, everything else on standard error.

use std::fmt;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use clap::ValueEnum;

/// `--color`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Everywhere.
    Always,
    /// Nowhere.
    Never,
}

/// A mistake in what was typed, on the command line or in a config; the exit code is 2.
#[derive(Debug)]
pub struct Usage(pub Vec<String>);

impl Usage {
    /// A single mistake.
    pub fn one(message: impl Into<String>) -> Usage {
        Usage(vec![message.into()])
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Usage {}

/// Where and how the program speaks.
#[derive(Clone, Copy, Debug)]
pub struct Console {
    /// No notes, no progress.
    pub quiet: bool,
    /// Colours on standard output.
    pub color_out: bool,
    /// Colours on standard error.
    pub color_err: bool,
}

impl Console {
    /// Decides about colours.
    pub fn new(quiet: bool, color: ColorChoice) -> Console {
        // NO_COLOR counts when it is not empty: https://no-color.org.
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        let colored = |terminal: bool| match color {
            ColorChoice::Auto => terminal && !no_color && !dumb,
            ColorChoice::Always => true,
            ColorChoice::Never => false,
        };
        Console {
            quiet,
            color_out: colored(io::stdout().is_terminal()),
            color_err: colored(io::stderr().is_terminal()),
        }
    }

    /// Standard output, for results. A reader that went away is an error to pass on with `?`, never a panic.
    pub fn out(&self) -> BufWriter<StdoutLock<'static>> {
        BufWriter::new(io::stdout().lock())
    }

    /// Whether a progress bar would be seen.
    pub fn shows_progress(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    /// A line of progress, on standard error.
    pub fn plain(&self, message: impl fmt::Display) {
        let _ = writeln!(io::stderr().lock(), "{message}");
    }

    /// Something worth knowing; `--quiet` hides it.
    pub fn note(&self, message: impl fmt::Display) {
        if !self.quiet {
            self.say("note", Color::Cyan, message);
        }
    }

    /// Something that is probably not wanted; `--quiet` does not hide it.
    pub fn warn(&self, message: impl fmt::Display) {
        self.say("warning", Color::Yellow, message);
    }

    /// Why the program stops: one line for each mistake, the chain of causes on it.
    pub fn error(&self, error: &anyhow::Error) {
        match error.downcast_ref::<Usage>() {
            Some(Usage(mistakes)) => mistakes.iter().for_each(|it| self.say("error", Color::Red, it)),
            None => self.say("error", Color::Red, chain(error)),
        }
    }

    fn say(&self, kind: &str, color: Color, message: impl fmt::Display) {
        let kind = color.paint(self.color_err, kind);
        // With nowhere to say it, there is nothing left to do.
        let _ = writeln!(io::stderr().lock(), "{kind}: {message}");
    }
}

/// As many fields side by side as fit into so many columns: those with the highest numbers are let go first, and those
/// without text always.
pub fn fitting(fields: &[(usize, String)], width: usize) -> String {
    let mut shown: Vec<&(usize, String)> = fields.iter().filter(|it| !it.1.is_empty()).collect();
    loop {
        let line = shown.iter().map(|it| it.1.as_str()).collect::<Vec<_>>().join("  ");
        match shown.iter().enumerate().max_by_key(|(_, it)| it.0) {
            Some((last, _)) if line.chars().count() > width => shown.remove(last),
            _ => return line,
        };
    }
}

/// The causes on one line. A message that ends with its cause already is not said twice.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}

/// The few colours in use; all of them read on dark and on light.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    /// Errors.
    Red,
    /// What is trained on.
    Green,
    /// Warnings.
    Yellow,
    /// Notes.
    Cyan,
    /// What is not trained on.
    Dim,
    /// Headings.
    Bold,
}

impl Color {
    /// The text in this colour, or as it is.
    pub fn paint(self, colored: bool, text: &str) -> String {
        let code = match self {
            Color::Red => "31",
            Color::Green => "32",
            Color::Yellow => "33",
            Color::Cyan => "36",
            Color::Dim => "2",
            Color::Bold => "1",
        };
        if colored { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
}

/// Bytes as people read them: `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < 4 {
        value /= 1024.0;
        unit += 1;
    }
    let unit_name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {unit_name}")
    } else {
        format!("{value:.1} {unit_name}")
    }
}

/// A count with its thousands apart: `134,515,008`.
pub fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 row`, `2,000 rows`: a count with its thing, whose plural takes an s.
pub fn counted(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", thousands(count), if count == 1 { "" } else { "s" })
}

/// A time in seconds as 1:02:03, or 2:03.
pub fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(thousands(134_515_008), "134,515,008");
        assert_eq!(thousands(999), "999");
        assert_eq!([0, 1, 2000].map(|it| counted(it, "row")), ["0 rows", "1 row", "2,000 rows"]);
    }
}
