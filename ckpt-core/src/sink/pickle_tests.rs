use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
    process::{Command, Stdio},
};

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// What CPython makes of the pickles, or `None` where there is no Python. CI has one: there its absence is a failure.
pub(in crate::sink) fn loaded_by_python(pickles: &[Vec<u8>]) -> Option<Vec<serde_json::Value>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/pickle/load.py");
    let mut python =
        match Command::new("python3").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Ok(python) => python,
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "this check needs python3: {error}");
                eprintln!("not checked against CPython: python3 cannot be started ({error})");
                return None;
            }
        };
    let lines: String =
        pickles.iter().map(|p| p.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n").collect();
    let mut stdin = python.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = python.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "python failed, see above");
    let text = String::from_utf8(output.stdout).unwrap();
    Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool(bool),
    Int(i128),
    Str(String),
    Bytes(Vec<u8>),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(BTreeMap<String, Value>),
    Global(String),
    Exception(String),
}

type Memos = HashMap<String, Option<Memo>>;

fn write(p: &mut Pickler, memos: &mut Memos, value: &Value) {
    match value {
        Value::None => p.none(),
        Value::Bool(b) => p.bool(*b),
        Value::Int(i) => p.int(*i),
        Value::Str(s) => p.shared(memos.entry(s.clone()).or_default(), |p| p.str(s)),
        Value::Bytes(b) => p.bytes(b),
        Value::Tuple(items) => {
            let short = ShortTuple::of(items.len());
            if short.is_none() {
                p.begin();
            }
            items.iter().for_each(|v| write(p, memos, v));
            match short {
                Some(len) => p.short_tuple(len),
                None => p.end_tuple(),
            }
        }
        Value::List(items) => {
            p.list();
            p.begin();
            items.iter().for_each(|v| write(p, memos, v));
            p.end_list();
        }
        Value::Dict(items) => {
            p.dict();
            p.begin();
            for (k, v) in items {
                p.shared(memos.entry(k.clone()).or_default(), |p| p.str(k));
                write(p, memos, v);
            }
            p.end_dict();
        }
        Value::Global(name) => p.global("torch", name),
        Value::Exception(text) => {
            p.global("builtins", "RuntimeError");
            p.str(text);
            p.short_tuple(ShortTuple::One);
            p.call();
        }
    }
}

fn pickle(value: &Value) -> Vec<u8> {
    let mut p = Pickler::new(0);
    write(&mut p, &mut Memos::new(), value);
    p.finish()
}

fn expected(value: &Value) -> serde_json::Value {
    let all = |items: &[Value]| items.iter().map(expected).collect::<Vec<_>>();
    match value {
        Value::None => json!(["none"]),
        Value::Bool(b) => json!(["bool", b]),
        Value::Int(i) => json!(["int", i.to_string()]),
        Value::Str(s) => json!(["str", s]),
        Value::Bytes(b) => json!(["bytes", b.iter().map(|b| format!("{b:02x}")).collect::<String>()]),
        Value::Tuple(items) => json!(["tuple", all(items)]),
        Value::List(items) => json!(["list", all(items)]),
        Value::Dict(items) => {
            json!(["dict", items.iter().map(|(k, v)| json!([["str", k], expected(v)])).collect::<Vec<_>>()])
        }
        Value::Global(name) => json!(["global", format!("torch.{name}")]),
        Value::Exception(text) => json!(["exception", "RuntimeError", [["str", text]]]),
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i128>().prop_map(Value::Int),
        (any::<i128>(), 0_u32..127).prop_map(|(i, shift)| Value::Int(i >> shift)),
        any::<String>().prop_map(Value::Str),
        "[ab]{1,2}".prop_map(Value::Str),
        "x{250,300}".prop_map(Value::Str),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Value::Bytes),
        "[a-z][a-z0-9_]{0,9}".prop_map(Value::Global),
        any::<String>().prop_map(Value::Exception),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Tuple),
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::List),
            prop::collection::btree_map("[ab]{0,3}", inner, 0..5).prop_map(Value::Dict),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn python_sees_what_was_written(values in prop::collection::vec(any_value(), 150)) {
        let pickles: Vec<_> = values.iter().map(pickle).collect();
        if let Some(seen) = loaded_by_python(&pickles) {
            prop_assert_eq!(seen.len(), values.len());
            for (value, seen) in values.iter().zip(seen) {
                prop_assert_eq!(expected(value), seen);
            }
        }
    }
}

#[test]
fn edges_of_every_integer_and_length_form() {
    let mut values: Vec<Value> = Vec::new();
    for bit in 0..127_u32 {
        for value in [1_i128 << bit, (1 << bit) - 1, -(1_i128 << bit), -(1_i128 << bit) - 1] {
            values.push(Value::Int(value));
        }
    }
    values.extend([i128::MIN, i128::MAX].map(Value::Int));
    for len in [0, 255, 256, 70_000] {
        values.push(Value::Str("\u{e9}".repeat(len)));
        values.push(Value::Bytes(vec![7; len]));
    }
    // More memos than a byte counts, each used twice.
    let names: Vec<Value> = (0..300).map(|i| Value::Str(format!("n{i}"))).collect();
    values.push(Value::List([names.clone(), names].concat()));
    let pickles: Vec<_> = values.iter().map(pickle).collect();
    if let Some(seen) = loaded_by_python(&pickles) {
        assert_eq!(seen, values.iter().map(expected).collect::<Vec<_>>());
    }
}

/// Bytes that CPython's own pickletools printed opcode by opcode when this was written.
#[test]
fn golden_opcodes() {
    let golden: [(Value, &[u8]); 7] = [
        (Value::Int(255), b"\x80\x04K\xff."),
        (Value::Int(256), b"\x80\x04M\x00\x01."),
        (Value::Int(-1), b"\x80\x04J\xff\xff\xff\xff."),
        (Value::Int(1 << 31), b"\x80\x04\x8a\x05\x00\x00\x00\x80\x00."),
        (Value::Int(-(1 << 31) - 1), b"\x80\x04\x8a\x05\xff\xff\xff\x7f\xff."),
        (
            Value::List(vec![Value::Str("a".into()), Value::Str("a".into())]),
            b"\x80\x04](\x8c\x01a\x94h\x00e.",
        ),
        (Value::Exception("no".into()), b"\x80\x04cbuiltins\nRuntimeError\n\x8c\x02no\x85R."),
    ];
    for (value, bytes) in golden {
        assert_eq!(pickle(&value), bytes, "{value:?}");
    }
}
