//! YAML into nodes that remember their line.
//!
//! A node keeps the text that was typed; what it means (number, name, list) is for the key to say.
//! So a token of digits stays text, `1e-4` is a number although YAML 1.1 calls it text, and every
//! message names the file and the line.

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

/// A value as it was typed.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its line in the file, counted from 1; 0 on the command line.
    pub line: usize,
    /// What stands there.
    pub data: Data,
}

/// What stands in a [`Node`].
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Text; `quoted` text is never null, a number or a truth value.
    Scalar {
        /// The text, unquoted.
        text: String,
        /// Whether quotes or a block mark stood around it.
        quoted: bool,
    },
    /// `[a, b]`, or lines with dashes.
    List(Vec<Node>),
    /// Keys and values, in the order of the file.
    Map(Vec<(String, Node)>),
}

/// A syntax error and its line.
#[derive(Debug)]
pub struct SyntaxError {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

impl Node {
    /// Text that was typed without quotes.
    pub fn plain(line: usize, text: &str) -> Node {
        Node { line, data: Data::Scalar { text: text.to_string(), quoted: false } }
    }

    /// Whether this says "nothing": `null`, `~` or an empty value.
    pub fn is_null(&self) -> bool {
        matches!(&self.data, Data::Scalar { text, quoted: false } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value as a message shows it.
    pub fn shown(&self) -> String {
        match &self.data {
            Data::Scalar { text, .. } if text.is_empty() => "an empty value".to_string(),
            Data::Scalar { text, .. } => {
                let mut short: String = text.chars().take(60).collect();
                if short.len() < text.len() {
                    short.push('…');
                }
                format!("`{}`", short.escape_debug())
            }
            Data::List(_) => "a list".to_string(),
            Data::Map(_) => "a mapping".to_string(),
        }
    }
}

/// Reads one document; an empty one is an empty mapping.
pub fn parse(text: &str) -> Result<Node, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = Reader { parser: Parser::new_from_str(text), depth: 0 };
    loop {
        match reader.next()? {
            (Event::StreamStart | Event::DocumentStart(_) | Event::Nothing, _) => {}
            (Event::StreamEnd | Event::DocumentEnd, _) => {
                return Ok(Node { line: 1, data: Data::Map(Vec::new()) });
            }
            (event, span) => {
                let node = reader.node(event, span)?;
                loop {
                    match reader.next()? {
                        (Event::StreamEnd, _) => return Ok(node),
                        (Event::DocumentStart(_), span) => {
                            return Err(error(
                                &span,
                                "a second document starts here; a config is one document",
                            ));
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Deeper nesting than this is a mistake or an attack; no key needs more than two.
const DEEPEST: usize = 16;

struct Reader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), SyntaxError> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(scan)) => {
                Err(SyntaxError { line: scan.marker().line(), message: scan.info().to_string() })
            }
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span) -> Result<Node, SyntaxError> {
        let line = span.start.line();
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(error(&span, "nested too deeply"));
        }
        let data = match event {
            Event::Scalar(text, style, _, _) => {
                Data::Scalar { text: text.into_owned(), quoted: style != ScalarStyle::Plain }
            }
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break Data::List(items),
                        (event, span) => items.push(self.node(event, span)?),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut entries: Vec<(String, Node)> = Vec::new();
                loop {
                    let (key, span) = match self.next()? {
                        (Event::MappingEnd, _) => break Data::Map(entries),
                        (Event::Scalar(text, ..), span) => (text.into_owned(), span),
                        (_, span) => return Err(error(&span, "a key has to be plain text")),
                    };
                    if let Some((_, first)) = entries.iter().find(|(known, _)| *known == key) {
                        let message = format!("key `{key}` stands here and on line {}", first.line);
                        return Err(error(&span, &message));
                    }
                    let (event, value_span) = self.next()?;
                    let mut value = self.node(event, value_span)?;
                    // A message points at the key, which is where one looks.
                    value.line = span.start.line();
                    entries.push((key, value));
                }
            }
            Event::Alias(_) => return Err(error(&span, "aliases (`*name`) are not supported in a config")),
            _ => return Err(error(&span, "the document ends too early")),
        };
        self.depth -= 1;
        Ok(Node { line, data })
    }
}

fn error(span: &Span, message: &str) -> SyntaxError {
    SyntaxError { line: span.start.line(), message: message.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_error(text: &str, line: usize, part: &str) {
        let error = parse(text).expect_err("this should not parse");
        assert_eq!(error.line, line, "{}", error.message);
        assert!(error.message.contains(part), "{}", error.message);
    }

    #[test]
    fn nodes_keep_text_and_line() {
        let node =
            parse("# a comment\na: 1e-4   # the rate\nb: '007'\nc:\n  - x\n  - y\nd: {e: f}\n").unwrap();
        let Data::Map(entries) = node.data else { panic!("a mapping") };
        assert_eq!(entries[0], ("a".to_string(), Node::plain(2, "1e-4")));
        assert_eq!(entries[1].1.data, Data::Scalar { text: "007".to_string(), quoted: true });
        assert_eq!(entries[2].1.data, Data::List(vec![Node::plain(5, "x"), Node::plain(6, "y")]));
        assert_eq!(entries[3].1.line, 7);
    }

    #[test]
    fn an_empty_file_is_an_empty_mapping() {
        for text in ["", "# only a comment\n", "---\n", "\u{feff}"] {
            match parse(text).unwrap().data {
                Data::Map(entries) => assert!(entries.is_empty()),
                Data::Scalar { text, .. } => assert_eq!(text, "", "an explicit empty document is null"),
                Data::List(_) => panic!("no list"),
            }
        }
    }

    #[test]
    fn errors_name_their_line() {
        check_error("a: 1\nb: [1, 2\n", 3, "");
        check_error("a: 1\nb: 2\na: 3\n", 3, "key `a` stands here and on line 1");
        check_error("a: &x 1\nb: *x\n", 2, "aliases");
        check_error("a: 1\n---\nb: 2\n", 2, "second document");
        let deep = format!("a: {}{}", "[".repeat(40), "]".repeat(40));
        check_error(&deep, 1, "nested too deeply");
    }
}
