//! The JSON form of filters, and its errors.

use serde::{Deserialize, Serialize};

use crate::event::Severity;
use crate::event::filter::{Attribute, Filter, FilterNode, Severities, TextTest};

/// Maximum number of levels of a tree.
const MAX_DEPTH: usize = 4;
/// Maximum number of nodes of a tree.
const MAX_NODES: usize = 32;
/// Maximum number of values of one comparison.
const MAX_VALUES: usize = 64;
/// Maximum length of a value, in bytes.
const MAX_TEXT: usize = 256;

/// An invalid filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", if path.is_empty() { String::new() } else { format!("{path} ") })]
pub struct InvalidFilter {
    /// The place in the tree, such as `nodes[1].cmp`; empty for the whole filter.
    pub path: String,
    /// The fault and the allowed values.
    pub problem: String,
}

/// A node in JSON. Unknown properties are errors, because an unknown condition must not be ignored.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonNode {
    op: Option<String>,
    nodes: Option<Vec<Self>>,
    key: Option<String>,
    cmp: Option<String>,
    val: Option<String>,
    vals: Option<Vec<String>>,
}

impl Filter {
    /// Parses a filter from its JSON form.
    ///
    /// | node | passes if |
    /// |---|---|
    /// | `{"op":"and","nodes":[…]}` | every node passes |
    /// | `{"op":"or","nodes":[…]}` | at least one node passes |
    /// | `{"op":"not","nodes":[…]}` | its one node does not pass |
    /// | `{"key":K,"cmp":"eq","val":V}`, `neq` | `K` is `V`, is not |
    /// | `{"key":K,"cmp":"in","vals":[…]}`, `nin` | `K` is one of these, is none of these |
    /// | `{"key":K,"cmp":"exists"}` | there is a `K` |
    /// | `{"key":K,"cmp":"prefix","val":V}`, `contains` | `K` begins with `V`, contains it; not for `severity` |
    /// | `{"key":"severity","cmp":"gte","val":V}`, `lte` | the severity is at least, at most `V` |
    ///
    /// `K` is `severity`, `source`, `category`, `tenant`, `type`, `title` or `technique`. A missing attribute equals
    /// nothing. At most 4 levels, 32 nodes, 64 values of a comparison, and 256 bytes of a value.
    pub fn parse(json: &str) -> Result<Self, InvalidFilter> {
        let node = serde_json::from_str(json).map_err(|error| invalid("", format!("is not a filter: {error}")))?;
        let mut budget = MAX_NODES;
        compile(node, "", 1, &mut budget).map(Self::new)
    }

    /// Parses a tree that is a JSON value already, or a text that contains it.
    pub fn from_value<T: Serialize>(value: &T) -> Result<Self, InvalidFilter> {
        let refuse = |error| invalid("", format!("is not a filter: {error}"));
        let json = serde_json::to_string(value).map_err(refuse)?;
        if json.starts_with('"') {
            Self::parse(&serde_json::from_str::<String>(&json).map_err(refuse)?)
        } else {
            Self::parse(&json)
        }
    }
}

fn invalid(path: &str, problem: impl Into<String>) -> InvalidFilter {
    InvalidFilter { path: path.to_owned(), problem: problem.into() }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn compile(node: JsonNode, path: &str, depth: usize, budget: &mut usize) -> Result<FilterNode, InvalidFilter> {
    if depth > MAX_DEPTH {
        return Err(invalid(path, format!("must have at most {MAX_DEPTH} levels")));
    }
    *budget = budget.checked_sub(1).ok_or_else(|| invalid("", format!("must have at most {MAX_NODES} nodes")))?;
    match node {
        JsonNode { op: Some(op), nodes: Some(nodes), key: None, cmp: None, val: None, vals: None } => {
            let inner = |(index, node)| compile(node, &join(path, &format!("nodes[{index}]")), depth + 1, budget);
            let mut nodes = nodes.into_iter().enumerate().map(inner).collect::<Result<Vec<FilterNode>, _>>()?;
            match (op.as_str(), nodes.len()) {
                ("and" | "or", 0) => Err(invalid(&join(path, "nodes"), "must not be empty")),
                ("and", _) => Ok(FilterNode::all(nodes)),
                ("or", _) => Ok(FilterNode::any(nodes)),
                ("not", 1) => Ok(FilterNode::Not(Box::new(nodes.remove(0)))),
                ("not", _) => Err(invalid(&join(path, "nodes"), "of `not` must have one node")),
                _ => Err(invalid(&join(path, "op"), "must be and, or or not")),
            }
        }
        JsonNode { op: None, nodes: None, key: Some(key), cmp: Some(cmp), val, vals } => {
            let operand = Operand { path, val, vals };
            if key == "severity" { severity(&cmp, operand) } else { text(&key, &cmp, operand) }
        }
        _ => Err(invalid(path, "must have either op and nodes, or key, cmp and val or vals")),
    }
}

/// The values of a comparison.
struct Operand<'a> {
    path: &'a str,
    val: Option<String>,
    vals: Option<Vec<String>>,
}

impl Operand<'_> {
    fn none(self) -> Result<(), InvalidFilter> {
        match (self.val, self.vals) {
            (None, None) => Ok(()),
            _ => Err(invalid(self.path, "must have neither val nor vals with this cmp")),
        }
    }

    fn one(self) -> Result<String, InvalidFilter> {
        match (self.val, self.vals) {
            (Some(val), None) => sized(val, &join(self.path, "val")),
            _ => Err(invalid(self.path, "must have val and not vals with this cmp")),
        }
    }

    fn many(self) -> Result<Vec<String>, InvalidFilter> {
        let (None, Some(vals)) = (self.val, self.vals) else {
            return Err(invalid(self.path, "must have vals and not val with this cmp"));
        };
        let path = join(self.path, "vals");
        if !(1..=MAX_VALUES).contains(&vals.len()) {
            return Err(invalid(&path, format!("must have 1 to {MAX_VALUES} values")));
        }
        vals.into_iter().enumerate().map(|(index, val)| sized(val, &format!("{path}[{index}]"))).collect()
    }

    fn cmp(&self) -> String {
        join(self.path, "cmp")
    }
}

fn sized(value: String, path: &str) -> Result<String, InvalidFilter> {
    let is_sized = (1..=MAX_TEXT).contains(&value.len());
    if is_sized { Ok(value) } else { Err(invalid(path, format!("must have 1 to {MAX_TEXT} bytes"))) }
}

fn severity(cmp: &str, operand: Operand<'_>) -> Result<FilterNode, InvalidFilter> {
    let path = operand.path;
    let word = |val: String| val.parse::<Severity>().map_err(|error| invalid(path, error.to_string()));
    let one = |operand: Operand<'_>| word(operand.one()?);
    let union = |operand: Operand<'_>| {
        let mut each = operand.many()?.into_iter().map(|val| word(val).map(|word| Severities::only(Some(word)).0));
        each.try_fold(0, |all, one| Ok(all | one?)).map(Severities)
    };
    Ok(match cmp {
        "eq" => FilterNode::Severity(Severities::only(Some(one(operand)?))),
        "neq" => FilterNode::Severity(Severities(!Severities::only(Some(one(operand)?)).0)),
        "in" => FilterNode::Severity(union(operand)?),
        "nin" => FilterNode::Severity(Severities(!union(operand)?.0)),
        "gte" => FilterNode::Severity(Severities::at_least(one(operand)?)),
        "lte" => FilterNode::Severity(Severities::at_most(one(operand)?)),
        "exists" => {
            operand.none()?;
            FilterNode::Severity(Severities(!Severities::only(None).0))
        }
        _ => return Err(invalid(&operand.cmp(), "of severity must be eq, neq, in, nin, gte, lte or exists")),
    })
}

fn text(key: &str, cmp: &str, operand: Operand<'_>) -> Result<FilterNode, InvalidFilter> {
    let Some((_, attribute)) = Attribute::NAMES.into_iter().find(|(name, _)| *name == key) else {
        let names = Attribute::NAMES.map(|(name, _)| name).join(", ");
        return Err(invalid(&join(operand.path, "key"), format!("must be severity or one of {names}")));
    };
    let one_of = |mut texts: Vec<String>| {
        texts.sort_unstable();
        TextTest::OneOf(texts.into_iter().map(Into::into).collect())
    };
    let (test, is_negated) = match cmp {
        "eq" | "neq" => (one_of(vec![operand.one()?]), cmp == "neq"),
        "in" | "nin" => (one_of(operand.many()?), cmp == "nin"),
        "prefix" => (TextTest::StartsWith(operand.one()?.into()), false),
        "contains" => (TextTest::Contains(operand.one()?.into()), false),
        "exists" => {
            operand.none()?;
            (TextTest::Exists, false)
        }
        _ => return Err(invalid(&operand.cmp(), "must be eq, neq, in, nin, exists, prefix or contains")),
    };
    let node = FilterNode::Text(attribute, test);
    Ok(if is_negated { FilterNode::Not(Box::new(node)) } else { node })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::event::Fields;
    use crate::event::filter::Tags;

    fn passes(filter: &str, payload: &str) -> bool {
        let filter = Filter::parse(filter).expect("a filter");
        filter.matches(&Tags::declared(&Fields::default()).completed(payload.as_bytes()))
    }

    #[test]
    fn every_comparison_matches_as_documented() {
        let alert = r#"{"severity":"high","source":"zeek","title":"Odd modbus write","mitre_techniques":["T0855"]}"#;
        let cases = [
            (r#"{"key":"severity","cmp":"eq","val":"high"}"#, true),
            (r#"{"key":"severity","cmp":"neq","val":"high"}"#, false),
            (r#"{"key":"severity","cmp":"in","vals":["low","high"]}"#, true),
            (r#"{"key":"severity","cmp":"nin","vals":["low","high"]}"#, false),
            (r#"{"key":"severity","cmp":"gte","val":"critical"}"#, false),
            (r#"{"key":"severity","cmp":"lte","val":"high"}"#, true),
            (r#"{"key":"severity","cmp":"exists"}"#, true),
            (r#"{"key":"source","cmp":"eq","val":"zeek"}"#, true),
            (r#"{"key":"source","cmp":"neq","val":"zeek"}"#, false),
            (r#"{"key":"source","cmp":"in","vals":["zeek","a","z"]}"#, true),
            (r#"{"key":"source","cmp":"nin","vals":["a"]}"#, true),
            (r#"{"key":"tenant","cmp":"exists"}"#, false),
            (r#"{"key":"tenant","cmp":"neq","val":"a"}"#, true),
            (r#"{"key":"title","cmp":"prefix","val":"Odd"}"#, true),
            (r#"{"key":"title","cmp":"contains","val":"modbus"}"#, true),
            (r#"{"key":"technique","cmp":"prefix","val":"T08"}"#, true),
            (r#"{"op":"not","nodes":[{"key":"technique","cmp":"exists"}]}"#, false),
            (
                r#"{"op":"or","nodes":[{"key":"type","cmp":"exists"},
                    {"op":"and","nodes":[{"key":"source","cmp":"eq","val":"zeek"},
                                         {"key":"severity","cmp":"gte","val":"medium"}]}]}"#,
                true,
            ),
        ];
        for (filter, expected) in cases {
            assert_eq!(passes(filter, alert), expected, "{filter}");
        }
    }

    #[test]
    fn unknown_severity_matches_no_comparison() {
        let alert = r#"{"severity":"urgent"}"#;
        assert!(!passes(r#"{"key":"severity","cmp":"exists"}"#, alert));
        assert!(!passes(r#"{"key":"severity","cmp":"lte","val":"critical"}"#, alert));
        assert!(passes(r#"{"key":"severity","cmp":"neq","val":"high"}"#, alert));
    }

    #[test]
    fn invalid_filters_are_refused_with_their_place() {
        let deep = r#"{"op":"not","nodes":[{"op":"not","nodes":[{"op":"not","nodes":[{"op":"not","nodes":[]}]}]}]}"#;
        let wide = format!(r#"{{"op":"or","nodes":[{}]}}"#, [r#"{"key":"source","cmp":"exists"}"#; 32].join(","));
        let cases = [
            ("5", ""),
            ("{}", ""),
            (r#"{"key":"source","cmp":"eq","val":"a","extra":1}"#, ""),
            (r#"{"op":"xor","nodes":[]}"#, "op"),
            (r#"{"op":"and","nodes":[]}"#, "nodes"),
            (r#"{"op":"and","nodes":[{"key":"sauce","cmp":"eq","val":"a"}]}"#, "nodes[0].key"),
            (r#"{"op":"not","nodes":[{"key":"source","cmp":"gte","val":"a"}]}"#, "nodes[0].cmp"),
            (r#"{"key":"severity","cmp":"prefix","val":"h"}"#, "cmp"),
            (r#"{"key":"severity","cmp":"eq","val":"bad"}"#, ""),
            (r#"{"key":"source","cmp":"eq","val":""}"#, "val"),
            (r#"{"key":"source","cmp":"eq","vals":["a"]}"#, ""),
            (r#"{"key":"source","cmp":"in","vals":[]}"#, "vals"),
            (r#"{"key":"source","cmp":"in","vals":["a",""]}"#, "vals[1]"),
            (r#"{"key":"source","cmp":"exists","val":"a"}"#, ""),
            (deep, "nodes[0].nodes[0].nodes[0].nodes"),
            (&wide, ""),
        ];
        for (filter, path) in cases {
            assert_eq!(Filter::parse(filter).map_err(|invalid| invalid.path), Err(path.to_owned()), "{filter}");
        }
        let too_deep =
            format!(r#"{{"op":"not","nodes":[{}]}}"#, deep.replace("[]", r#"[{"key":"source","cmp":"exists"}]"#));
        assert!(Filter::parse(&too_deep).is_err_and(|invalid| invalid.problem.contains("4 levels")));
    }

    #[test]
    fn tree_and_its_text_are_the_same_filter() {
        let text = r#"{"op":"not","nodes":[{"key":"source","cmp":"in","vals":["a","b"]}]}"#;
        let (tree, filter) = (serde_json::from_str::<Value>(text).expect("JSON"), Filter::parse(text));
        assert!(filter.is_ok());
        assert_eq!(Filter::from_value(&tree), filter);
        assert_eq!(Filter::from_value(&Value::from(text)), filter);
        for senseless in [Value::Null, Value::from(true), Value::from(""), json!([]), json!({})] {
            assert!(Filter::from_value(&senseless).is_err(), "{senseless}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in any::<String>()) {
            prop_assert!(Filter::parse(&text).is_err());
        }
    }
}
