//! What minijinja can't parse or does otherwise, rewritten in the source text.

/// Longest tag, in tokens: what is parsed by recursion must not end the program. Real ones have some hundreds.
pub(crate) const LONGEST_TAG: usize = 2000;

/// A source text that minijinja parses.
pub(crate) struct Rewritten {
    pub(crate) source: String,
    /// Whether there were `{% generation %}` tags.
    pub(crate) marks_generation: bool,
    /// About how many tokens the longest tag has; the text ends before one that is longer than [`LONGEST_TAG`].
    pub(crate) longest_tag: usize,
}

/// Rewrites `{% generation %}` tags, what `for` goes over, what gets a name, and sums with `|safe` in them. Line ends
/// become `\n`, as in Python.
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
            Some(b'#') => rest[2..].find("#}").map_or(rest.len(), |end| end + 4),
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
        if longest_tag > LONGEST_TAG {
            break;
        }
        let formatted = percent_formats(tag);
        let tag = formatted.as_str();
        match generation_tag(tag) {
            Some((left, "generation", right)) => {
                found = true;
                out.push_str(&format!("{{%{left} with %}}{{% filter __generation {right}%}}"));
            }
            Some((left, _, right)) => {
                out.push_str(&format!("{{%{left} endfilter %}}{{% endwith {right}%}}"));
            }
            None if !is_balanced(tag) => out.push_str(tag),
            None => {
                let changed = for_loop(tag).or_else(|| safe_sum(tag)).or_else(|| binding(tag));
                out.push_str(changed.as_deref().unwrap_or(tag));
            }
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

/// A `for` tag that refuses to go over what Python refuses; its names are looked at where a loop calls itself.
fn for_loop(tag: &str) -> Option<String> {
    let (left, body, right) = tag_parts(tag)?;
    let words = top_level_words(body);
    let (first, others) = words.split_first().filter(|(first, _)| first.1 == "for")?;
    let targets = first.0 + "for".len();
    let at = others.iter().position(|(_, word)| *word == "in")?;
    let start = others[at].0 + "in".len();
    let end = others[at..].iter().find(|(_, word)| matches!(*word, "if" | "recursive"));
    let end = end.map_or(body.len(), |(at, _)| *at);
    let targets = &body[targets..others[at].0];
    let iterable = body[start..end].trim();
    if iterable.is_empty() {
        return None;
    }
    let head = format!("for{targets}in ({iterable})|__iterable {}", &body[end..]);
    let recursive = words.last().is_some_and(|(_, word)| *word == "recursive");
    let names = targets.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|name| !name.is_empty());
    Some(with_names_held(left, &head, right, names.filter(|_| recursive)))
}

/// A tag that gives values names: each is looked at ([`super::held`]).
fn binding(tag: &str) -> Option<String> {
    let (left, body, right) = tag_parts(tag)?;
    let words = top_level_words(body);
    match words.first().filter(|(at, _)| *at == 0)?.1 {
        "set" => {
            let (at, _) = words.iter().find(|(_, word)| *word == "=")?;
            let (target, value) = (&body[..*at], &body[at + 1..]);
            let filter = if target.contains('.') { "__kept" } else { "__held" };
            Some(format!("{{%{left} {target}= ({value})|{filter} {right}%}}"))
        }
        "with" => Some(with_names_held(left, body, right, names(&body["with".len()..]))),
        // The parameters stand between the first brackets: of a macro after its name, of a call at once.
        word @ ("macro" | "call") => {
            let open = body.find('(')?;
            if word == "call" && !body["call".len()..open].trim().is_empty() {
                return None;
            }
            let length = bracket_length(&body[open..])?;
            Some(with_names_held(left, body, right, names(&body[open + 1..open + length - 1])))
        }
        _ => None,
    }
}

/// A tag, and behind it one that looks at each of these names.
fn with_names_held<'a>(left: &str, body: &str, right: &str, names: impl Iterator<Item = &'a str>) -> String {
    let mut out = format!("{{%{left} {body} ");
    for name in names {
        out.push_str(&format!("%}}{{% set {name} = {name}|__held "));
    }
    out + right + "%}"
}

/// The names in `a, b = 1`.
fn names(list: &str) -> impl Iterator<Item = &str> {
    let words = top_level_words(list);
    let starts =
        std::iter::once(0).chain(words.into_iter().filter(|(_, word)| *word == ",").map(|(at, _)| at + 1));
    let name = |start: usize| {
        let rest = list[start..].trim_start();
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().filter(|name| !name.is_empty())
    };
    starts.filter_map(name)
}

/// The byte length of what stands in the bracket that `text` begins with, brackets included.
fn bracket_length(text: &str) -> Option<usize> {
    let mut depth = 0;
    unquoted(text).find_map(|(at, byte)| {
        depth += bracket(byte);
        (depth == 0).then_some(at + 1)
    })
}

/// Whether no bracket of a tag is closed that isn't open; the parser refuses others.
fn is_balanced(tag: &str) -> bool {
    let mut depth = 0;
    unquoted(tag.get(2..tag.len().saturating_sub(2)).unwrap_or_default()).all(|(_, byte)| {
        depth += bracket(byte);
        depth >= 0
    })
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

/// A tag with `'…' % value` as `'…' | format(value)`.
fn percent_formats(tag: &str) -> String {
    let mut out = tag.to_string();
    // A tag that isn't closed may end anywhere.
    let body =
        tag.get(2..tag.len().saturating_sub(2)).filter(|_| tag.starts_with("{{") || tag.starts_with("{%"));
    let Some(body) = body else { return out };
    let operators: Vec<usize> = unquoted(body)
        .filter(|(at, byte)| *byte == b'%' && tag[2..at + 2].trim_end().ends_with(['\'', '"']))
        .map(|(at, _)| at + 2)
        .collect();
    for at in operators.into_iter().rev() {
        let literal = out[..at].trim_end().len();
        let start = at + 1 + out[at + 1..].len() - out[at + 1..].trim_start().len();
        let Some(length) = operand_length(&out[start..]) else { continue };
        let operand = &out[start..start + length];
        let values = match bracket_length(operand) {
            Some(whole) if whole == length && operand.starts_with('(') => &operand[1..length - 1],
            _ => operand,
        };
        let call = format!("|format({values})");
        out.replace_range(literal..start + length, &call);
    }
    out
}

/// The byte length of the value that `text` begins with, its attributes, items, calls and filters included.
fn operand_length(text: &str) -> Option<usize> {
    let name = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let first = text.chars().next()?;
    let mut length = match first {
        '(' | '[' | '{' => bracket_length(text)?,
        '\'' | '"' => 1 + unquoted(text).next().map_or(text.len(), |(at, _)| at).checked_sub(1)?,
        _ => Some(name(text)).filter(|length| *length > 0)?,
    };
    loop {
        let rest = &text[length..];
        let spaced = rest.trim_start();
        let skipped = rest.len() - spaced.len();
        length += match rest.chars().next() {
            Some('(' | '[') => bracket_length(rest)?,
            Some('.') => 1 + name(&rest[1..]),
            _ => match spaced.strip_prefix('|') {
                Some(filter) => {
                    let blank = filter.len() - filter.trim_start().len();
                    skipped + 1 + blank + name(filter.trim_start())
                }
                None => return Some(length),
            },
        };
    }
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

/// The byte length of the tag at the start of `text`; everything when it isn't closed. An end within quotes or brackets
/// is none.
fn tag_length(text: &str, close: &str) -> usize {
    let mut depth = 0;
    for (at, byte) in unquoted(&text[2..]) {
        if depth == 0 && text.as_bytes()[at + 2..].starts_with(close.as_bytes()) {
            return at + 2 + close.len();
        }
        depth += bracket(byte);
    }
    text.len()
}

/// The bytes of `text` outside string literals, with their positions.
fn unquoted(text: &str) -> impl Iterator<Item = (usize, u8)> {
    let (mut quote, mut escaped) = (None, false);
    text.bytes().enumerate().filter(move |(_, byte)| {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if *byte == b'\\' => escaped = true,
            Some(open) => quote = Some(open).filter(|open| open != byte),
            None if matches!(byte, b'\'' | b'"') => quote = Some(*byte),
            None => return true,
        }
        false
    })
}

/// What a byte does to the depth of brackets.
fn bracket(byte: u8) -> i32 {
    match byte {
        b'(' | b'[' | b'{' => 1,
        b')' | b']' | b'}' => -1,
        _ => 0,
    }
}
