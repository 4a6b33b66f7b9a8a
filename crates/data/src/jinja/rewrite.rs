//! What minijinja can't parse or does otherwise, rewritten in the source text.

/// A source text that minijinja parses.
pub(crate) struct Rewritten {
    pub(crate) source: String,
    /// Whether there were `{% generation %}` tags.
    pub(crate) marks_generation: bool,
    /// About how many tokens the longest tag has.
    pub(crate) longest_tag: usize,
}

/// Rewrites `{% generation %}` tags, what `for` goes over, and sums with `|safe` in them. Line ends become `\n`, as in Python.
///
/// Comments, and tags inside string literals, are left alone.
pub(crate) fn rewrite(source: &str) -> Rewritten {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let (mut found, mut longest_tag) = (false, 0);
    let mut rest = source.as_str();
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let length = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some(b'{') => tag_length(rest, "}}"),
            Some(b'%') => tag_length(rest, "%}"),
            _ => 1,
        };
        let (tag, after) = rest.split_at(length);
        if tag_name(tag) == Some("raw") {
            let length = raw_length(rest).unwrap_or(rest.len());
            out.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        longest_tag = longest_tag.max(tokens_of(tag));
        match generation_tag(tag) {
            Some((left, "generation", right)) => {
                found = true;
                out.push_str(&format!("{{%{left} with %}}{{% filter __generation {right}%}}"));
            }
            Some((left, _, right)) => {
                out.push_str(&format!("{{%{left} endfilter %}}{{% endwith {right}%}}"));
            }
            None => match (for_iterable(tag), safe_sum(tag)) {
                (Some(range), _) => {
                    out.push_str(&tag[..range.start]);
                    out.push_str(&format!("({})|__iterable", &tag[range.clone()]));
                    out.push_str(&tag[range.end..]);
                }
                (None, Some(sum)) => out.push_str(&sum),
                (None, None) => out.push_str(tag),
            },
        }
        rest = after;
    }
    out.push_str(rest);
    Rewritten { source: out, marks_generation: found, longest_tag }
}

/// About how many tokens a tag has: words, numbers and signs; a string literal is one.
fn tokens_of(tag: &str) -> usize {
    let mut quote = None;
    let mut inside = false;
    let mut count = 0;
    for byte in tag.bytes() {
        let word = byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii();
        match quote {
            Some(open) => quote = Some(open).filter(|open| *open != byte),
            None if matches!(byte, b'\'' | b'"') => (quote, count) = (Some(byte), count + 1),
            None => count += usize::from(word && !inside || byte.is_ascii_punctuation()),
        }
        inside = word;
    }
    count
}

/// A tag's whitespace marks, with what stands between.
fn tag_parts(tag: &str) -> Option<(&str, &str, &str)> {
    let body = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let (left, body) = body.split_at(usize::from(body.starts_with(['-', '+'])));
    let (body, right) = body.split_at(body.len() - usize::from(body.ends_with(['-', '+'])));
    Some((left, body.trim(), right))
}

fn tag_name(tag: &str) -> Option<&str> {
    tag_parts(tag).map(|(_, name, _)| name)
}

/// The length of the raw block that `text` begins with, its tags included.
fn raw_length(text: &str) -> Option<usize> {
    text.match_indices("{%").find_map(|(open, _)| {
        let length = text[open..].find("%}")? + 2;
        (tag_name(&text[open..open + length]) == Some("endraw")).then_some(open + length)
    })
}

/// The whitespace marks around, and the name of, a generation tag.
fn generation_tag(tag: &str) -> Option<(&str, &str, &str)> {
    let (left, name, right) = tag_parts(tag)?;
    matches!(name, "generation" | "endgeneration").then_some((left, name, right))
}

/// Where in a `for` tag the expression stands that it goes over.
fn for_iterable(tag: &str) -> Option<std::ops::Range<usize>> {
    let body = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let body = body.trim_end_matches(['-', '+']);
    let head = body.trim_start_matches(['-', '+']).trim_start();
    head.strip_prefix("for").filter(|rest| rest.starts_with(char::is_whitespace))?;
    let mut words = top_level_words(body).into_iter();
    let start = words.by_ref().find(|(_, word)| *word == "in").map(|(at, _)| at + "in".len())?;
    let end = words.find(|(_, word)| matches!(*word, "if" | "recursive")).map_or(body.len(), |(at, _)| at);
    let blank = body[start..end].trim().is_empty();
    let end = start + body[start..end].trim_end().len();
    (!blank).then_some(start + 2..end + 2)
}

/// A printed sum with `|safe` in it, and nothing that binds less, as a chain of `__add`.
fn safe_sum(tag: &str) -> Option<String> {
    let body = tag.strip_prefix("{{")?.strip_suffix("}}")?;
    let (left, body) = body.split_at(usize::from(body.starts_with(['-', '+'])));
    let (body, right) = body.split_at(body.len() - usize::from(body.ends_with(['-', '+'])));
    let words = top_level_words(body);
    let has = |wanted: &[&str]| words.iter().any(|(_, word)| wanted.contains(word));
    let other = ["if", "else", "and", "or", "not", "in", "is", "~", "<", ">", "=", "!", "-", "*", "/", "%"];
    if !has(&["safe"]) || !has(&["+"]) || has(&other) {
        return None;
    }
    let mut terms = Vec::new();
    let mut start = 0;
    for (at, _) in words.iter().filter(|(_, word)| *word == "+") {
        terms.push(&body[start..*at]);
        start = at + 1;
    }
    terms.push(&body[start..]);
    let (first, others) = terms.split_first()?;
    let chain: String = others.iter().map(|term| format!("|__add({term})")).collect();
    Some(format!("{{{{{left} ({first}){chain} {right}}}}}"))
}

/// The words and operators of an expression outside brackets and string literals, with their byte positions.
fn top_level_words(text: &str) -> Vec<(usize, &str)> {
    let bytes = text.as_bytes();
    let (mut at, mut depth, mut words) = (0, 0usize, Vec::new());
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            c if c.is_ascii_alphanumeric() || c == b'_' => {
                let start = at;
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                    at += 1;
                }
                if depth == 0 {
                    words.push((start, &text[start..at]));
                }
                continue;
            }
            c if c.is_ascii_punctuation() && depth == 0 => words.push((at, &text[at..at + 1])),
            _ => {}
        }
        at += 1;
    }
    words
}

/// The byte length of the tag at the start of `text`, quotes respected; everything when it isn't closed.
fn tag_length(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 2;
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, c @ (b'"' | b'\'')) => quote = Some(c),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return at + close.len(),
            (None, _) => {}
        }
        at += 1;
    }
    text.len()
}
