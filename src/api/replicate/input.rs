//! A request's `input` against the model's table, and from there to what a worker is told.

use std::cmp::Reverse;
use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::schema::{Field, Kind, POLICY, Served};
use crate::api::Server;
use crate::api::problem::{Invalid, Problem, faulty};
use crate::ops::models::Model;
use crate::ops::serve::{Order, OrderedLora, Origin, Tokens};
use crate::ops::{AspectRatio, Megapixels, generate};

/// The checked input with its defaults; and what the client should know.
pub(in crate::api) struct Checked {
    pub(in crate::api) values: Map<String, Value>,
    pub(in crate::api) notes: Vec<String>,
}

/// Every fault at once. Fields that the model has not are dropped with a note, as Cog does.
pub(in crate::api) fn check(model: &Served, input: &Map<String, Value>) -> Result<Checked, Problem> {
    let mut values = Map::new();
    let mut faults = Vec::new();
    for field in model.fields.iter().chain(&[POLICY]) {
        match input.get(field.name) {
            None | Some(Value::Null) => match field.default {
                "" => faults.push(Invalid::new("required", "input", format!("{} is required", field.name))),
                default => drop(values.insert(field.name.into(), serde_json::from_str(default).unwrap_or(Value::Null))),
            },
            Some(value) => match fault(field, value) {
                Some(fault) => faults.push(fault),
                None => drop(values.insert(field.name.into(), value.clone())),
            },
        }
    }
    if !faults.is_empty() {
        return Err(Problem::Invalid(faults));
    }
    let unknown: Vec<&String> = input.keys().filter(|name| !takes(model, name)).collect();
    let note = |name: &&String| format!("the input {} is not one of this model's and was ignored", brief(name));
    let mut notes: Vec<String> = unknown.iter().take(MOST_NAMED).map(note).collect();
    if unknown.len() > MOST_NAMED {
        notes.push(format!("{} more inputs are not this model's and were ignored", unknown.len() - MOST_NAMED));
    }
    Ok(Checked { notes, values })
}

/// Whether the model has an input of this name.
pub(in crate::api) fn takes(model: &Served, name: &str) -> bool {
    model.fields.iter().chain(&[POLICY]).any(|field| field.name == name)
}

/// Inputs that a note names.
const MOST_NAMED: usize = 16;

/// A name of a client's own, as notes have it.
fn brief(name: &str) -> String {
    let brief: String = name.chars().take(80).collect();
    if brief.len() < name.len() { brief + "..." } else { brief }
}

fn fault(field: &Field, value: &Value) -> Option<Invalid> {
    let at = format!("input.{}", field.name);
    let wrong = |expected: &str| {
        let given = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        Some(Invalid::new("invalid_type", &at, format!("Invalid type. Expected: {expected}, given: {given}")))
    };
    let range = |number: f64, least: f64, most: f64| {
        if number < least || number.is_nan() {
            Some(Invalid::new("number_gte", &at, format!("Must be greater than or equal to {least}")))
        } else if number > most {
            Some(Invalid::new("number_lte", &at, format!("Must be less than or equal to {most}")))
        } else {
            None
        }
    };
    match (field.kind, value) {
        (Kind::Text | Kind::Uri | Kind::Secret, Value::String(_)) | (Kind::Bool, Value::Bool(_)) => None,
        (Kind::Text | Kind::Uri | Kind::Secret, _) => wrong("string"),
        (Kind::Bool, _) => wrong("boolean"),
        // 28.0 is a whole number to most languages.
        (Kind::Integer(limits), Value::Number(number)) if number.as_f64().is_some_and(|number| number.fract() == 0.0) => {
            let (least, most) = limits?;
            range(number.as_f64().unwrap_or(f64::NAN), least as f64, most as f64)
        }
        (Kind::Integer(_), _) => wrong("integer"),
        (Kind::Number(least, most), Value::Number(number)) => range(number.as_f64().unwrap_or(f64::NAN), least, most),
        (Kind::Number(..), _) => wrong("number"),
        (Kind::Choice(_) | Kind::Ratio, Value::String(text)) => {
            let choices = field.choices();
            let allowed: Vec<String> = choices.iter().map(|choice| format!("{choice:?}")).collect();
            let said = format!("{at} must be one of the following: {}", allowed.join(", "));
            (!choices.contains(&text.as_str())).then(|| Invalid::new("enum", &at, said))
        }
        (Kind::Choice(_) | Kind::Ratio, _) => wrong("string"),
    }
}

/// What the worker is told. `image` is where the picture to start from is kept.
pub(in crate::api) fn order(
    values: &Map<String, Value>,
    base: &Model,
    server: &Server,
    image: Option<&Origin>,
) -> Result<Order, Problem> {
    let text = |name: &str| values.get(name).and_then(Value::as_str).filter(|text| !text.trim().is_empty());
    let number = |name: &str| values.get(name).and_then(Value::as_f64);
    let whole = |name: &str| number(name).map(|number| number as usize);
    let native = (base.defaults.width, base.defaults.height);
    let ratio: AspectRatio =
        text("aspect_ratio").unwrap_or("1:1").parse().map_err(|e: String| faulty("input.aspect_ratio", &e))?;
    let megapixels = if text("megapixels") == Some("0.25") { Megapixels::Quarter } else { Megapixels::One };
    // At 0 the picture is kept: one step with next to no noise.
    let strength = number("prompt_strength").unwrap_or(generate::PROMPT_STRENGTH).max(1e-6);
    let mut loras = Vec::new();
    for (weights, scale) in [("lora_weights", "lora_scale"), ("hf_lora", "lora_scale"), ("extra_lora", "extra_lora_scale")] {
        if let Some(reference) = text(weights) {
            loras.push(OrderedLora::new(reference, number(scale).unwrap_or(1.0)));
        }
    }
    let token = |name: &str| text(name).map(|token| token.trim().to_owned());
    let tokens = Tokens { hub: token("hf_api_token"), civitai: token("civitai_api_token") };
    Ok(Order {
        prompt: values.get("prompt").and_then(Value::as_str).unwrap_or_default().into(),
        size: image.is_none().then(|| ratio.size(megapixels, native)),
        steps: whole("num_inference_steps").unwrap_or(base.defaults.steps),
        guidance: number("guidance").or(number("guidance_scale")),
        // 7.0 is a whole number to most languages.
        seed: number("seed").map_or_else(generate::random_seed, |seed| match values["seed"].as_i64() {
            Some(seed) => seed.unsigned_abs(),
            None => seed.abs() as u64,
        }),
        outputs: whole("num_outputs").unwrap_or(1),
        format: text("output_format").unwrap_or("webp").into(),
        quality: whole("output_quality").unwrap_or(80),
        without_lora: text("on_lora_error").map_or(server.without_lora, |policy| policy == "base"),
        fast: server.go_fast && values.get("go_fast").and_then(Value::as_bool).unwrap_or_default(),
        loras,
        image: image.cloned(),
        mask: None,
        prompt_strength: image.is_some().then_some(strength),
        previews: false,
        tokens: server.sealed(&tokens)?,
    })
}

/// Longest text of an input that is shown again, in bytes: files are sent inside requests.
const LONGEST_SHOWN: usize = 16 << 10;

/// All that is kept of an input, in bytes of JSON: rows of jobs are read again and again.
const MOST_SHOWN: usize = 64 << 10;

/// The input as it may be shown again: without secrets, also those that the model does not ask for, without whole files, and with a note
/// if it is cut because it is too long. What is not `known` is cut first, and of that the longest.
pub(in crate::api) fn shown(model: &Served, known: impl Fn(&str) -> bool, input: &Map<String, Value>) -> (Value, Option<String>) {
    let secret = |name: &str| {
        let name = name.to_ascii_lowercase();
        let said = model.fields.iter().any(|field| field.name == name && matches!(field.kind, Kind::Secret));
        said || ["token", "secret", "password", "api_key", "apikey", "auth"].iter().any(|part| name.contains(part))
    };
    let redacted = json!("[REDACTED]");
    let hidden = |name: &str, value: &Value| secret(name) && !value.is_null();
    // Measured before anything is copied: it may be megabytes.
    let mut parts = Vec::new();
    for (name, value) in input {
        let bytes = length(if hidden(name, value) { &redacted } else { value });
        parts.push((known(name), Reverse(quoted(name) + bytes + 2), name.as_str()));
    }
    parts.sort_unstable();
    let mut all: usize = 2 + parts.iter().map(|(_, bytes, _)| bytes.0).sum::<usize>();
    let mut cut = Vec::new();
    for (_, bytes, name) in parts {
        if all > MOST_SHOWN {
            all -= bytes.0;
            cut.push(name);
        }
    }
    let note = cut.first().map(|first| match cut.len() - 1 {
        0 => format!("the input {} is too long to be kept and is not shown", brief(first)),
        more => format!("the input {} and {more} more are too long to be kept and are not shown", brief(first)),
    });
    let cut: HashSet<&str> = cut.into_iter().collect();
    let kept = input.iter().filter(|(name, _)| !cut.contains(name.as_str()));
    let kept = kept.map(|(name, value)| {
        let value = if hidden(name, value) { redacted.clone() } else { shortened(value) };
        (name.clone(), value)
    });
    (Value::Object(kept.collect()), note)
}

/// Bytes of a name in JSON.
fn quoted(name: &str) -> usize {
    json!(name).to_string().len()
}

/// Bytes of a value once it is shortened, in JSON. Of what is too long in any case the rest is not counted.
fn length(value: &Value) -> usize {
    let mut bytes = 2;
    match value {
        Value::Array(list) => {
            for value in list {
                bytes += length(value) + 1;
                if bytes > MOST_SHOWN {
                    break;
                }
            }
        }
        Value::Object(map) => {
            for (name, value) in map {
                bytes += quoted(name) + length(value) + 2;
                if bytes > MOST_SHOWN {
                    break;
                }
            }
        }
        value => bytes = shortened(value).to_string().len(),
    }
    bytes
}

fn shortened(value: &Value) -> Value {
    match value {
        Value::String(text) if text.len() > LONGEST_SHOWN => {
            let head: String = text.chars().take(40).collect();
            json!(format!("{head}... ({} bytes)", text.len()))
        }
        Value::Array(list) => list.iter().map(shortened).collect(),
        Value::Object(map) => Value::Object(map.iter().map(|(key, value)| (key.clone(), shortened(value))).collect()),
        value => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_and_nothing_long_is_shown() {
        let schnell = Served::named("black-forest-labs", "flux-schnell").unwrap();
        let input = json!({
            "prompt": "x", "hf_api_token": "hf_canary", "auth": { "a": "canary" }, "civitai_api_token": null,
            "lora_weights": format!("data:;base64,{}", "A".repeat(100_000)), "loras": [{ "weights": "B".repeat(100_000) }],
        });
        let (shown, note) = shown(schnell, |name| takes(schnell, name), input.as_object().unwrap());
        assert_eq!(note, None);
        assert!(!shown.to_string().contains("canary") && shown.to_string().len() < 500, "{shown}");
        assert_eq!((shown["prompt"].as_str(), &shown["civitai_api_token"]), (Some("x"), &Value::Null));
    }

    #[test]
    fn what_is_unknown_and_long_is_cut_first() {
        let schnell = Served::named("black-forest-labs", "flux-schnell").unwrap();
        let cut = |input: &Value| shown(schnell, |name| takes(schnell, name), input.as_object().unwrap());
        let list = vec![1; 20_000];
        let (kept, note) = cut(&json!({ "prompt": "x", "small": 1, "junk": list, "more": list }));
        // One of the two is enough.
        assert_eq!(kept, json!({ "prompt": "x", "small": 1, "more": list }));
        assert_eq!(note.unwrap(), "the input junk is too long to be kept and is not shown");
        let many: Map<String, Value> = (0..10_000).map(|i| (format!("key{i}"), json!([[i]]))).collect();
        let prompt = "\u{1}".repeat(8 << 10);
        let mut input = json!({ "prompt": prompt, "go_fast": true });
        input.as_object_mut().unwrap().extend(many.clone());
        let (kept, note) = cut(&input);
        let bytes = kept.to_string().len();
        assert!(kept["prompt"] == prompt && bytes < MOST_SHOWN && bytes > MOST_SHOWN / 2, "{bytes}");
        assert!(note.unwrap().contains("more are too long"));
        // Names are kept too, and what is known can be too long as well.
        let (kept, note) = cut(&json!({ ("a".repeat(1 << 20)): 1, "prompt": "x", "seed": vec![0; 100_000] }));
        assert_eq!((kept, note.unwrap().len() < 200), (json!({ "prompt": "x" }), true));
        let mut input = json!({ "prompt": "x" });
        input.as_object_mut().unwrap().extend(many);
        let checked = check(schnell, input.as_object().unwrap()).unwrap();
        assert_eq!(checked.notes.len(), MOST_NAMED + 1, "{:?}", checked.notes.last());
    }
}
