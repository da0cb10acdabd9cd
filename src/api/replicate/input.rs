//! A request's `input` against the model's table, and from there to what a worker is told.

use serde_json::{Map, Value, json};

use super::error::{Invalid, Problem};
use super::schema::{Field, Kind, Served};
use crate::image::{Limits, decode_picture};
use crate::ops::models::Model;
use crate::ops::serve::{Order, OrderedLora, picture};
use crate::ops::{AspectRatio, Megapixels, generate};

/// Longest side of a picture to start from, in pixels; larger ones are shrunk.
const LONGEST: u32 = 1440;

/// The checked input with its defaults; and what the client should know.
pub(super) struct Checked {
    pub(super) values: Map<String, Value>,
    pub(super) notes: Vec<String>,
}

/// Every fault at once. Fields that the model has not are dropped with a note, as Cog does.
pub(super) fn check(model: &Served, input: &Map<String, Value>) -> Result<Checked, Problem> {
    let mut values = Map::new();
    let mut faults = Vec::new();
    for field in model.fields {
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
        return Err(Problem::invalid(faults));
    }
    let known = |name: &&String| !model.fields.iter().any(|field| field.name == name.as_str());
    let notes = input.keys().filter(known).map(|name| format!("the input {name} is not one of this model's and was ignored"));
    Ok(Checked { notes: notes.collect(), values })
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

/// What the worker is told. Everything that can be found wrong without the device is found here.
pub(super) fn order(values: &Map<String, Value>, base: &Model) -> Result<Order, Problem> {
    let text = |name: &str| values.get(name).and_then(Value::as_str).filter(|text| !text.trim().is_empty());
    let number = |name: &str| values.get(name).and_then(Value::as_f64);
    let whole = |name: &str| number(name).map(|number| number as usize);
    let faulty = |field: &str, error: &dyn std::fmt::Display| {
        Problem::invalid(vec![Invalid::new("invalid", &format!("input.{field}"), error.to_string())])
    };
    for secret in ["hf_api_token", "civitai_api_token"] {
        if text(secret).is_some() {
            return Err(faulty(secret, &"tokens of requests are not supported yet: make the LoRA reachable without one"));
        }
    }
    let image = text("image").map(str::to_owned);
    let native = (base.defaults.width, base.defaults.height);
    let (width, height) = match &image {
        Some(uri) => {
            let given = picture("image", uri).map_err(|error| faulty("image", &error))?;
            let limits = Limits { side: 4096, bytes: 128 << 20 };
            let (width, height) = decode_picture(&given.bytes, limits).map_err(|error| faulty("image", &error))?.dimensions();
            follow(width, height)
        }
        None => {
            let ratio: AspectRatio =
                text("aspect_ratio").unwrap_or("1:1").parse().map_err(|e: String| faulty("aspect_ratio", &e))?;
            let quarter = text("megapixels") == Some("0.25");
            ratio.size(if quarter { Megapixels::Quarter } else { Megapixels::One }, native)
        }
    };
    // At 0 the picture is kept: one step with next to no noise.
    let strength = number("prompt_strength").unwrap_or(0.8).max(1e-6);
    let mut loras = Vec::new();
    for (weights, scale) in [("lora_weights", "lora_scale"), ("hf_lora", "lora_scale"), ("extra_lora", "extra_lora_scale")] {
        if let Some(reference) = text(weights) {
            loras.push(OrderedLora { reference: reference.into(), scale: number(scale).unwrap_or(1.0) });
        }
    }
    let order = Order {
        prompt: values.get("prompt").and_then(Value::as_str).unwrap_or_default().into(),
        width,
        height,
        steps: whole("num_inference_steps").unwrap_or(base.defaults.steps),
        guidance: number("guidance").or(number("guidance_scale")).unwrap_or(base.defaults.guidance),
        seed: values.get("seed").and_then(Value::as_i64).map_or_else(generate::random_seed, i64::unsigned_abs),
        outputs: whole("num_outputs").unwrap_or(1),
        format: text("output_format").unwrap_or("webp").into(),
        quality: whole("output_quality").unwrap_or(80),
        loras,
        prompt_strength: image.is_some().then_some(strength),
        image,
    };
    let request = order.request().map_err(|error| faulty("image", &error))?;
    generate::prepare(&request, base).map_err(|error| faulty("prompt", &error))?;
    Ok(order)
}

/// The size of the output for a picture of this size: within 1440 a side, multiples of 16.
fn follow(width: u32, height: u32) -> (usize, usize) {
    let longest = width.max(height);
    let fit = |side: u32| {
        if longest > LONGEST { (f64::from(side) * f64::from(LONGEST) / f64::from(longest)).floor() } else { f64::from(side) }
    };
    // The nearest, half to even, as Python rounds.
    let near = |side: f64| ((side / 16.0).round_ties_even() as usize * 16).max(16);
    (near(fit(width)), near(fit(height)))
}

/// The input as it may be shown again: without secrets.
pub(super) fn shown(model: &Served, input: &Map<String, Value>) -> Value {
    let secret = |name: &str| model.fields.iter().any(|field| field.name == name && matches!(field.kind, Kind::Secret));
    let shown = |(name, value): (&String, &Value)| {
        (name.clone(), if secret(name) && !value.is_null() { json!("[REDACTED]") } else { value.clone() })
    };
    Value::Object(input.iter().map(shown).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_to_start_from_set_the_size() {
        for ((width, height), size) in [
            ((1600, 1000), (1440, 896)),
            ((500, 333), (496, 336)),
            ((4000, 3000), (1440, 1088)),
            ((1080, 1920), (816, 1440)),
            ((3, 5), (16, 16)),
        ] {
            assert_eq!(follow(width, height), size, "{width} x {height}");
        }
    }
}
