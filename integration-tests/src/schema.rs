//! Checks JSON against the schemas in `docs/schemas`.
//!
//! The part of JSON Schema that these files use, and nothing more: a keyword that this does not know fails the test, so
//! that no schema promises what nobody checks. (Validator crates cost more to compile than all of this workspace's own code.)

use std::path::Path;

use serde_json::Value;

/// Panics with all that does not fit where `value` is not what `docs/schemas/{name}.json` says.
pub fn assert_fits(value: &Value, name: &str) {
    let problems = problems(value, &load(&format!("{name}.json")));
    assert!(
        problems.is_empty(),
        "not as docs/schemas/{name}.json says:\n{}\nin {value}",
        problems.join("\n")
    );
}

fn load(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schemas").join(file);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What of `value` does not fit.
pub fn problems(value: &Value, schema: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(value, schema, "$", &mut found);
    found
}

fn check(value: &Value, schema: &Value, at: &str, found: &mut Vec<String>) {
    let Some(keywords) = schema.as_object() else { panic!("{at}: a schema is an object, not {schema}") };
    for (keyword, wanted) in keywords {
        let mut fail = |what: String| found.push(format!("{at}: {what}"));
        match keyword.as_str() {
            "$schema" | "title" | "description" => {}
            "$ref" => check(value, &load(text(wanted)), at, found),
            "type" => {
                let wanted = wanted.as_array().cloned().unwrap_or_else(|| vec![wanted.clone()]);
                if !wanted.iter().any(|name| is(value, text(name))) {
                    fail(format!("{value} is none of {wanted:?}"));
                }
            }
            "enum" => {
                if !list(wanted).contains(value) {
                    fail(format!("{value} is none of {wanted}"));
                }
            }
            "minimum" => {
                if value.as_f64().is_some_and(|number| number < wanted.as_f64().unwrap_or(f64::MAX)) {
                    fail(format!("{value} is below {wanted}"));
                }
            }
            "minItems" => {
                if value
                    .as_array()
                    .is_some_and(|items| (items.len() as u64) < wanted.as_u64().unwrap_or(u64::MAX))
                {
                    fail(format!("fewer than {wanted} items"));
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(item, wanted, &format!("{at}[{index}]"), found);
                }
            }
            "required" => {
                for name in list(wanted).iter().map(text) {
                    if value.is_object() && value.get(name).is_none() {
                        fail(format!("`{name}` is missing"));
                    }
                }
            }
            "properties" => {
                for (name, schema) in wanted.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        check(value, schema, &format!("{at}.{name}"), found);
                    }
                }
            }
            "additionalProperties" => {
                if wanted == &Value::Bool(false) {
                    for name in value.as_object().into_iter().flatten().map(|(name, _)| name) {
                        if schema["properties"].get(name).is_none() {
                            fail(format!("`{name}` is not in the schema"));
                        }
                    }
                }
            }
            "anyOf" => {
                if !list(wanted).iter().any(|schema| problems(value, schema).is_empty()) {
                    fail("fits none of the alternatives".to_owned());
                }
            }
            unknown => panic!("{at}: the schema uses `{unknown}`, which this check does not know"),
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string"))
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list"))
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        other => panic!("the schema names the type `{other}`"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_does_not_fit_is_found() {
        let schema = json!({
            "type": "object", "required": ["a"], "additionalProperties": false,
            "properties": {
                "a": { "type": ["integer", "null"], "minimum": 0 },
                "b": { "type": "array", "minItems": 1, "items": { "enum": ["x", "y"] } },
            },
        });
        let count = |value: Value| problems(&value, &schema).len();
        assert_eq!(count(json!({ "a": 1, "b": ["x", "y"] })), 0);
        assert_eq!(count(json!({ "a": null })), 0);
        for bad in [
            json!({}),
            json!([]),
            json!({ "a": -1 }),
            json!({ "a": 1.5 }),
            json!({ "a": 1, "b": [] }),
            json!({ "a": 1, "b": ["z"] }),
            json!({ "a": 1, "c": 1 }),
        ] {
            assert_eq!(count(bad.clone()), 1, "{bad}");
        }
    }

    #[test]
    #[should_panic(expected = "patternProperties")]
    fn a_keyword_that_nobody_checks_is_refused() {
        problems(&json!({}), &json!({ "patternProperties": {} }));
    }
}
