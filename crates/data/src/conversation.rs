//! What every data format is turned into: a list of messages, and the tools offered.

use serde_json::{Map, Value};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// Instructions of the application (`developer` in newer templates).
    Developer,
    /// The person.
    User,
    /// The model; what it says is trained on.
    Assistant,
    /// The result of a tool call.
    Tool,
    /// Nobody: a text without roles, trained as a whole and never rendered by a template.
    Text,
}

impl Role {
    /// The name templates know the role by.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::Developer => "developer",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
            Role::Text => "text",
        }
    }

    /// The role of a name as data sets write it (`user` or `human`, `assistant` or `gpt` …).
    pub fn from_name(name: &str) -> Option<Role> {
        Some(match name {
            "system" => Role::System,
            "developer" => Role::Developer,
            "user" | "human" => Role::User,
            "assistant" | "gpt" | "model" | "function_call" => Role::Assistant,
            "tool" | "observation" | "function" | "ipython" => Role::Tool,
            _ => return None,
        })
    }
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// Calls of tools, as OpenAI's `tool_calls` list.
    pub tool_calls: Option<Value>,
    /// Whether to train on this turn, where the data says so; assistant turns only.
    pub trained: Option<bool>,
    /// Further keys a template may read: `reasoning_content`, `name`, `tool_call_id` …
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of `role` that says `content`, and nothing else.
    pub fn new(role: Role, content: impl Into<String>) -> Message {
        Message { role, content: content.into(), tool_calls: None, trained: None, extra: Map::new() }
    }

    /// The object a chat template sees.
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("role".to_string(), Value::from(self.role.name()));
        fields.insert("content".to_string(), Value::from(self.content.as_str()));
        if let Some(calls) = &self.tool_calls {
            fields.insert("tool_calls".to_string(), calls.clone());
        }
        for (key, value) in &self.extra {
            fields.insert(key.clone(), value.clone());
        }
        Value::Object(fields)
    }
}

/// A conversation: one row of a data set, whatever its format was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The turns, in order.
    pub messages: Vec<Message>,
    /// The tools offered, as OpenAI's `tools` list.
    pub tools: Option<Value>,
    /// In preference data the answer to avoid, in place of the last message, which is the chosen one.
    pub rejected: Option<Message>,
    /// In KTO data whether the last message is a good answer.
    pub label: Option<bool>,
}

impl Conversation {
    /// What looks wrong with it, though it can be used.
    pub(crate) fn doubt(&self) -> Option<&'static str> {
        let silent = |message: &Message| {
            let trained = message.role == Role::Assistant && message.trained != Some(false);
            trained && message.content.trim().is_empty() && message.tool_calls.is_none()
        };
        self.messages.iter().chain(&self.rejected).any(silent).then_some("an answer without a word")
    }

    /// The list of objects a chat template sees; `default_system` comes first where there is no system turn.
    pub fn to_json(&self, default_system: Option<&str>) -> Vec<Value> {
        let system = |message: &Message| matches!(message.role, Role::System | Role::Developer);
        let default = default_system.filter(|_| !self.messages.iter().any(system));
        let default = default.map(|text| Message::new(Role::System, text).to_json());
        default.into_iter().chain(self.messages.iter().map(Message::to_json)).collect()
    }
}
