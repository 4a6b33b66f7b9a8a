//! What reading data sets gave, as plain values: rows, what was left out and why, duplicates.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::error::Place;

/// How many places are kept of each reason.
const PLACES: usize = 3;
/// How many reasons are told apart; what comes after is counted under one.
const REASONS: usize = 50;

/// What the rows of a data set are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Answers to learn: conversations.
    #[default]
    Supervised,
    /// Plain texts, trained as a whole.
    Text,
    /// Pairs of a chosen and a rejected answer.
    Preference,
    /// Answers labelled good or bad (KTO).
    Labelled,
}

impl Purpose {
    /// As messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::Supervised => "conversations",
            Purpose::Text => "texts",
            Purpose::Preference => "preference pairs",
            Purpose::Labelled => "labelled answers (KTO)",
        }
    }
}

/// Rows that have something in common: left out for the same reason, equal to an earlier one, …
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noticed {
    /// What about them, as a message; numbers in which messages differ are left open (`…`).
    pub reason: String,
    /// How many.
    pub rows: usize,
    /// Where the first of them are, at most three.
    pub first: Vec<Place>,
}

/// What reading one data set gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetCounts {
    /// As the config names it.
    pub name: String,
    /// Name of the format: `alpaca`, `sharegpt`, `openai`, `text`.
    pub format: String,
    /// What its rows are for.
    pub purpose: Purpose,
    /// Files that were read.
    pub files: usize,
    /// Rows that were read, those left out included.
    pub rows: usize,
    /// Rows that can be used: `rows` less those of `skipped`.
    pub used: usize,
    /// Rows left out, by reason, in the order in which each was met first.
    pub skipped: Vec<Noticed>,
    /// Rows that are used in spite of something: answers without a word, …
    pub doubtful: Vec<Noticed>,
    /// Rows that say the same as an earlier one; they are used.
    pub duplicates: Option<Noticed>,
}

impl SetCounts {
    /// Rows left out.
    pub fn skipped_rows(&self) -> usize {
        self.skipped.iter().map(|it| it.rows).sum()
    }

    /// Counts a row that is left out.
    pub fn skip(&mut self, place: &Place, reason: &str) {
        self.rows += 1;
        notice(&mut self.skipped, place, reason);
    }

    /// Counts a row as left out that was counted as used.
    pub(crate) fn leave_out(&mut self, place: &Place, reason: &str) {
        self.used -= 1;
        notice(&mut self.skipped, place, reason);
    }

    /// Counts a row that is used.
    pub(crate) fn use_row(&mut self, place: &Place, conversation: &Conversation, seen: Option<&mut Seen>) {
        self.rows += 1;
        self.used += 1;
        if let Some(doubt) = conversation.doubt() {
            notice(&mut self.doubtful, place, doubt);
        }
        if seen.is_some_and(|seen| !seen.0.insert(hash(conversation))) {
            let duplicates = self.duplicates.get_or_insert_with(|| Noticed {
                reason: "the same as an earlier row".to_string(),
                rows: 0,
                first: Vec::new(),
            });
            duplicates.add(place);
        }
    }
}

/// The rows that were met, by 64 bits of each.
#[derive(Debug, Default)]
pub(crate) struct Seen(HashSet<u64>);

fn hash(conversation: &Conversation) -> u64 {
    let mut hasher = DefaultHasher::new();
    for message in conversation.messages.iter().chain(&conversation.rejected) {
        (message.role, &message.content).hash(&mut hasher);
        message.tool_calls.as_ref().map(ToString::to_string).hash(&mut hasher);
    }
    (conversation.tools.as_ref().map(ToString::to_string), conversation.label).hash(&mut hasher);
    hasher.finish()
}

impl Noticed {
    fn add(&mut self, place: &Place) {
        self.rows += 1;
        if self.first.len() < PLACES {
            self.first.push(place.clone());
        }
    }
}

fn notice(all: &mut Vec<Noticed>, place: &Place, reason: &str) {
    let same = all.iter().enumerate().find_map(|(index, it)| Some((index, merged(&it.reason, reason)?)));
    if let Some((index, reason)) = same {
        all[index].reason = reason;
        return all[index].add(place);
    }
    // Reasons that name what they found could be as many as the rows.
    let reason = if all.len() < REASONS { reason } else { "other reasons" };
    let index = all.iter().position(|it| it.reason == reason).unwrap_or_else(|| {
        all.push(Noticed { reason: reason.to_string(), rows: 0, first: Vec::new() });
        all.len() - 1
    });
    all[index].add(place);
}

/// What stands for numbers that differ.
const ANY_NUMBER: char = '…';

fn is_number(c: char) -> bool {
    c.is_ascii_digit() || c == ANY_NUMBER
}

/// What two messages say that differ at most in numbers, those that differ left open.
fn merged(one: &str, other: &str) -> Option<String> {
    if one == other {
        return Some(one.to_string());
    }
    let (one, other) = (parts(one), parts(other));
    let mut text = String::new();
    for (a, b) in one.iter().zip(&other) {
        match a == b {
            true => text.push_str(a),
            false if a.starts_with(is_number) && b.starts_with(is_number) => text.push(ANY_NUMBER),
            false => return None,
        }
    }
    (one.len() == other.len()).then_some(text)
}

/// A message cut between its numbers and the rest.
fn parts(mut text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    while let Some(first) = text.chars().next() {
        let number = is_number(first);
        let (part, rest) = text.split_at(text.find(|c| is_number(c) != number).unwrap_or(text.len()));
        parts.push(part);
        text = rest;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::{Message, Role};

    #[test]
    fn reasons_are_counted_with_their_first_places() {
        let mut counts = SetCounts::default();
        let place = |line| Place::new("f", line);
        for line in 1..=5 {
            counts.skip(&place(line), &format!("turn {line}: unknown role `x`"));
        }
        counts.skip(&place(9), "not UTF-8 text");
        let first = &counts.skipped[0];
        assert_eq!((first.reason.as_str(), first.rows), ("turn …: unknown role `x`", 5));
        assert_eq!(first.first, [place(1), place(2), place(3)]);
        assert_eq!((counts.skipped.len(), counts.skipped_rows(), counts.rows), (2, 6, 6));
        for kind in 0..200u32 {
            let letter = char::from_u32(0x4E00 + kind).unwrap();
            counts.skip(&place(20), &format!("unknown role `{letter}`"));
        }
        assert_eq!((counts.skipped.len(), counts.skipped_rows()), (REASONS + 1, 206));
    }

    #[test]
    fn only_numbers_that_differ_are_left_open() {
        let check = |one, other, expected: Option<&str>| assert_eq!(merged(one, other).as_deref(), expected);
        let four = "expected 3 columns, found 4";
        check(four, four, Some(four));
        check(four, "expected 3 columns, found 10", Some("expected 3 columns, found …"));
        check("expected 3 columns, found …", four, Some("expected 3 columns, found …"));
        check(four, "expected 3 rows, found 4", None);
        check(four, "expected 3 columns, found ", None);
        check("a1b", "ab1", None);
    }

    #[test]
    fn duplicates_are_counted_and_used() {
        let (mut counts, mut seen) = (SetCounts::default(), Seen::default());
        for (line, text) in [(1, "a"), (2, "b"), (3, "a"), (4, "a"), (5, "")] {
            let messages = vec![Message::new(Role::User, "q"), Message::new(Role::Assistant, text)];
            let conversation = Conversation { messages, ..Conversation::default() };
            counts.use_row(&Place::new("f", line), &conversation, Some(&mut seen));
        }
        let duplicates = counts.duplicates.as_ref().unwrap();
        assert_eq!((duplicates.rows, duplicates.first[0].line), (2, 3));
        assert_eq!((counts.rows, counts.used), (5, 5));
        assert_eq!(counts.doubtful[0].reason, "an answer without a word");
        assert_eq!(counts.doubtful[0].first, [Place::new("f", 5)]);
    }
}
