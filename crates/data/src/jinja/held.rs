//! What a name may hold, so that no template can build a value that ends the program.
//!
//! minijinja 3.1 charges fuel for texts, not for lists that share their parts or that are computed when looked at, and
//! it prints, compares and drops values by recursion. So every value is looked at when it gets a name
//! ([`super::rewrite`] puts `__held` or `__kept` there): how deep it is, how much it is when written out, and that no
//! namespace comes to hold itself. Without names, one expression makes at most [`super::LONGEST_TAG`] levels.

use minijinja::value::{DynObject, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest value that has a name; JSON that is read has at most 128 levels.
const DEEPEST: usize = 200;
/// Most values within one that has a name, each counted as often as it is there.
const MOST: u64 = 1 << 18;

/// The value of a name: anything, where lists and maps within are finite.
pub(super) fn held(state: &State, value: Value) -> Result<Value, Error> {
    match value.as_object() {
        Some(object) if object.type_name().ends_with("::Namespace") => {
            for key in value.try_iter()? {
                kept(state, value.get_item(&key)?)?;
            }
            Ok(value)
        }
        Some(object) if !is_data(&value, object) => Ok(value),
        _ => kept(state, value),
    }
}

/// The value of a namespace's attribute: data only.
pub(super) fn kept(state: &State, value: Value) -> Result<Value, Error> {
    let mut walk = Walk { visited: 0 };
    let written_out = walk.written_out(&value, 0)?;
    state.consume_fuel(walk.visited / 8)?;
    Ok(written_out.unwrap_or(value))
}

/// Whether an object is a list or a map of any make, not something of the engine.
fn is_data(value: &Value, object: &DynObject) -> bool {
    let of_engine = ["Namespace", "Loop", "Macro", "Closure", "Module"];
    let name = object.type_name().rsplit("::").next().unwrap_or_default();
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
        && !of_engine.contains(&name)
}

struct Walk {
    visited: u64,
}

impl Walk {
    /// The value with what is computed from other lists written out, as Python has it at once; none where it is all
    /// written out.
    fn written_out(&mut self, value: &Value, depth: usize) -> Result<Option<Value>, Error> {
        self.visited += 1;
        let refused = |what: &str| Err(Error::new(ErrorKind::InvalidOperation, what.to_string()));
        if depth > DEEPEST {
            return refused("a value nests too deep");
        }
        if self.visited > MOST {
            return refused("a value is too large");
        }
        let Some(object) = value.as_object() else { return Ok(None) };
        if !is_data(value, object) {
            return refused("a namespace, a loop or a macro can't be within another value");
        }
        let is_list = value.downcast_object_ref::<Vec<Value>>().is_some();
        let mut changed = !(is_list || value.is_tuple() || object.type_name().starts_with("indexmap::"));
        let mut part = |part: Value| -> Result<Value, Error> {
            let written_out = self.written_out(&part, depth + 1)?;
            changed |= written_out.is_some();
            Ok(written_out.unwrap_or(part))
        };
        if value.kind() == ValueKind::Map {
            let mut pairs = Vec::new();
            for key in value.try_iter()? {
                pairs.push((part(key.clone())?, part(value.get_item(&key)?)?));
            }
            return Ok(changed.then(|| Value::from_pairs(pairs)));
        }
        let items = value.try_iter()?.map(part).collect::<Result<Vec<_>, Error>>()?;
        Ok(changed
            .then(|| if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) }))
    }
}
