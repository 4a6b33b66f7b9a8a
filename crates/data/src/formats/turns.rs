//! What the formats of turns have in common: order, system text, pairs of answers.

use serde_json::Value;

use super::{Row, kind};
use crate::conversation::{Message, Role};
use crate::error::Result;

/// Whether results of tools may come one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToolResults {
    /// Each is answered.
    OneAtATime,
    /// Several are answered together.
    Several,
}

/// Puts the text of a system column first, unless the conversation begins with one of its own.
pub(super) fn insert_system(messages: &mut Vec<Message>, system: &str) {
    if !system.is_empty() && !messages.first().is_some_and(is_system) {
        messages.insert(0, Message::new(Role::System, system));
    }
}

fn is_system(message: &Message) -> bool {
    matches!(message.role, Role::System | Role::Developer)
}

/// Adds the chosen answer of a pair to the conversation; gives the rejected one.
pub(super) fn push_pair(
    row: &Row,
    messages: &mut Vec<Message>,
    columns: Option<&[String; 2]>,
    read: impl Fn(usize, &Value) -> Result<Message>,
) -> Result<Option<Message>> {
    let Some([chosen, rejected]) = columns else { return Ok(None) };
    let index = messages.len();
    let answer = |column: &str| {
        let turn = row.object(column)?;
        let message = read(index, &turn)?;
        match message.role {
            Role::Assistant => Ok(message),
            other => {
                Err(row.error(format!("column `{column}` is of the {}, expected an answer", other.name())))
            }
        }
    };
    messages.push(answer(chosen)?);
    Ok(Some(answer(rejected)?))
}

/// Questions (a person, or a tool's result) and answers must take turns, and an answer must be last.
pub(super) fn check_turns(
    row: &Row,
    messages: &[Message],
    [questions, answers]: [&str; 2],
    tools: ToolResults,
) -> Result<()> {
    let first = usize::from(messages.first().is_some_and(is_system));
    let mut answer = false;
    for (index, message) in messages.iter().enumerate().skip(first) {
        let again = tools == ToolResults::Several
            && message.role == Role::Tool
            && index > first
            && messages[index - 1].role == Role::Tool;
        if again {
            continue;
        }
        if answer != (message.role == Role::Assistant) || is_system(message) {
            return Err(row.error(format!(
                "turn {index} is {}, expected {}; {questions} and {answers} must take turns",
                message.role.name(),
                if answer { "an answer" } else { "a question" },
            )));
        }
        answer = !answer;
    }
    if messages.len() < first + 2 || answer {
        return Err(row.error(format!(
            "the conversation has {} turns and must end with an answer ({}): there is nothing to train on",
            messages.len() - first,
            answers.replace('/', " or "),
        )));
    }
    Ok(())
}

/// Whether the data says that a turn is trained on: `train`, or a weight that isn't 0.
pub(super) fn trained(turn: &Value) -> Option<bool> {
    let said = ["train", "weight", "loss_weight"].into_iter().find_map(|key| turn.get(key))?;
    said.as_bool().or_else(|| Some(said.as_f64()? != 0.0))
}

/// A value that must be an object, for messages.
pub(super) fn not_an_object(row: &Row, column: &str, found: &Value) -> crate::Error {
    row.error(format!("expected a message in column `{column}`, found {}", kind(found)))
}
