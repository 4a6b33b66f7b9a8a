//! A sample in pieces, for people to look at.

use crate::conversation::Conversation;
use crate::error::Result;
use crate::marked::{MarkOptions, Sample, encode_with_text};
use crate::template::Template;
use crate::tokenizer::Tokenizer;

/// What becomes of a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The model reads it.
    Read,
    /// The model is trained to say it.
    Trained,
    /// It is over `cutoff_len`, and cut off.
    Cut,
}

/// Tokens that follow each other and have the same fate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Their text.
    pub text: String,
    /// What becomes of them.
    pub fate: Fate,
    /// Whether they are control tokens.
    pub control: bool,
    /// How many they are.
    pub tokens: usize,
}

/// A sample as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its tokens and marks.
    pub sample: Sample,
    /// Its text, what is cut off included.
    pub pieces: Vec<Piece>,
}

/// Encodes a conversation, and keeps the text of its tokens. The errors are those of
/// [`encode_conversation`](crate::encode_conversation).
pub fn show_conversation(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<Shown> {
    let made = encode_with_text(conversation, template, tokenizer, options)?;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    let mut kept = made.kept.iter().filter(|range| !range.is_empty()).peekable();
    for (index, (id, range)) in made.encoded.ids.iter().zip(&made.encoded.ranges).enumerate() {
        while kept.peek().is_some_and(|range| range.end <= index) {
            kept.next();
        }
        let fate = match (kept.peek().is_some_and(|range| range.start <= index), made.trained[index]) {
            (false, _) => Fate::Cut,
            (true, true) => Fate::Trained,
            (true, false) => Fate::Read,
        };
        let control = tokenizer.is_control(*id);
        // Tokens that share a character share its range; those that were added have none.
        let text = match range.is_empty() {
            true => tokenizer.piece(*id).unwrap_or_default(),
            false => made.text.get(at..range.end.max(at)).unwrap_or_default().to_string(),
        };
        at = at.max(range.end);
        match pieces.last_mut() {
            Some(last) if last.fate == fate && last.control == control => {
                last.text.push_str(&text);
                last.tokens += 1;
            }
            _ => pieces.push(Piece { text, fate, control, tokens: 1 }),
        }
    }
    Ok(Shown { sample: made.sample, pieces })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::{Message, Role};
    use crate::test_support::{CHATML, tokenizer};

    /// Read `(…)`, trained `[…]`, cut off `{…}`; control tokens with a star.
    fn check(messages: &[(Role, &str)], cutoff_len: usize, expected: &str) {
        let tokenizer = tokenizer();
        let template = Template::new("t", CHATML, tokenizer.special_tokens()).unwrap();
        let messages = messages.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        let conversation = Conversation { messages, ..Conversation::default() };
        let shown =
            show_conversation(&conversation, &template, &tokenizer, &MarkOptions::new(cutoff_len)).unwrap();
        let text: String = shown
            .pieces
            .iter()
            .map(|piece| {
                let star = if piece.control { "*" } else { "" };
                match piece.fate {
                    Fate::Read => format!("({star}{})", piece.text),
                    Fate::Trained => format!("[{star}{}]", piece.text),
                    Fate::Cut => format!("{{{star}{}}}", piece.text),
                }
            })
            .collect();
        assert_eq!(text, expected);
        let kept = shown.pieces.iter().filter(|piece| piece.fate != Fate::Cut).map(|piece| piece.tokens);
        assert_eq!(kept.sum::<usize>(), shown.sample.tokens.len());
    }

    #[test]
    fn pieces_have_a_fate() {
        use Role::{Assistant, Text, User};
        let turns = [(User, "q<s>"), (Assistant, "aé")];
        check(
            &turns,
            99,
            "(*<|im_start|>)(user\nq<s>)(*<|im_end|>)(\n)(*<|im_start|>)(assistant\n)[aé][*<|im_end|>](\n)",
        );
        check(
            &turns,
            12,
            "(*<|im_start|>)(user\nq){<s>}{*<|im_end|>}{\n}{*<|im_start|>}{assistant\n}[aé][*<|im_end|>](\n)",
        );
        check(&[(Text, "ab")], 9, "[ab][*<|im_end|>]");
    }
}
