//! What bodies hold.

use serde_json::{Map, Value, json};

use crate::api::replicate::Served;
use crate::ops::serve::LONGEST_PROMPT;

/// A model's input, with its choices in place.
fn input(name: &str) -> Value {
    let openapi = Served::named("black-forest-labs", name).expect("it is in the table").openapi();
    let schemas = &openapi["components"]["schemas"];
    let mut input = schemas["Input"].clone();
    for (field, property) in input["properties"].as_object_mut().into_iter().flatten() {
        let Some(property) = property.as_object_mut() else { continue };
        property.remove("x-order");
        property.remove("x-cog-secret");
        // As this version of OpenAPI writes it.
        if property.remove("nullable").is_some()
            && let Some(kind) = property.get("type").cloned()
        {
            property.insert("type".into(), json!([kind, "null"]));
        }
        if property.remove("allOf").is_some() {
            property.insert("type".into(), json!("string"));
            property.insert("enum".into(), schemas[field]["enum"].clone());
        }
    }
    input
}

fn object(required: &[&str], properties: Value) -> Value {
    let mut object = json!({ "type": "object", "required": required });
    object["properties"] = properties;
    object
}

pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    let text = json!({ "type": "string" });
    let maybe = json!({ "type": ["string", "null"] });
    let any = json!({ "type": "object" });
    let events = json!({ "type": "array", "items": { "type": "string", "enum": ["start", "output", "logs", "completed"] } });
    let beside = |mut properties: Map<String, Value>| {
        properties.insert("webhook".into(), json!({ "type": ["string", "null"], "format": "uri" }));
        properties.insert("webhook_events_filter".into(), events.clone());
        properties.insert("stream".into(), json!({ "type": "boolean" }));
        Value::Object(properties)
    };
    let inputs = ["flux-dev-lora", "flux-dev", "flux-schnell-lora", "flux-schnell"].map(input);
    let [dev_lora, ..] = inputs.clone();
    let with_input = |more: Value| {
        let mut properties = more.as_object().cloned().unwrap_or_default();
        properties.insert("input".into(), json!({ "$ref": "#/components/schemas/Input" }));
        properties
    };
    let mut by_version = object(&["version", "input"], beside(with_input(json!({ "version": text }))));
    by_version["additionalProperties"] = json!(false);
    let mut of_model = object(&["input"], beside(with_input(json!({}))));
    of_model["additionalProperties"] = json!(false);
    let lora = object(&["weights"], json!({ "weights": text, "scale": { "type": "number", "minimum": -10, "maximum": 10 } }));
    let generation = json!({
        "model": { "type": "string", "enum": ["flux-dev-lora", "flux-dev", "flux-schnell-lora", "flux-schnell"] },
        "prompt": {
            // The limit is bytes, of which a character has one or more.
            "type": "string", "description": format!("At most {LONGEST_PROMPT} bytes of UTF-8."),
            "minLength": 1, "maxLength": LONGEST_PROMPT,
        },
        "n": { "type": "integer", "minimum": 1, "maximum": 10 },
        "size": { "type": "string", "examples": ["auto", "1024x768"] },
        "response_format": { "type": "string", "enum": ["b64_json", "url"] },
        "output_format": { "type": "string", "enum": ["png", "webp", "jpeg"] },
        "output_compression": { "type": "integer", "minimum": 0, "maximum": 100 },
        "stream": { "type": "boolean" },
        "partial_images": { "type": "integer", "minimum": 0, "maximum": 3 },
        "seed": { "type": "integer", "minimum": 0 },
        "guidance": { "type": "number", "minimum": 0, "maximum": 100 },
        "num_inference_steps": { "type": "integer", "minimum": 1, "maximum": 100 },
        "lora_weights": text,
        "lora_scale": { "type": "number", "minimum": -10, "maximum": 10 },
        "loras": { "type": "array", "items": lora, "maxItems": 8 },
        "on_lora_error": { "type": "string", "enum": ["fail", "base"] },
    });
    let mut edit = generation.clone();
    edit["image"] = json!({ "type": "string", "format": "binary" });
    edit["mask"] = json!({ "type": "string", "format": "binary" });
    edit["prompt_strength"] = json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 });
    let prediction = object(
        &[
            "id",
            "model",
            "version",
            "input",
            "output",
            "error",
            "status",
            "created_at",
            "urls",
            "logs",
            "metrics",
            "data_removed",
        ],
        json!({
            "id": text, "model": text, "version": text, "input": any,
            "output": { "type": ["array", "null"], "items": { "type": "string" } },
            "error": maybe, "error_code": text,
            "status": { "type": "string", "enum": ["starting", "processing", "succeeded", "failed", "canceled"] },
            "created_at": text, "started_at": maybe, "completed_at": maybe,
            "urls": any, "logs": text, "metrics": any, "data_removed": { "type": "boolean" }, "deadline": text, "source": text,
        }),
    );
    vec![
        ("Input", dev_lora),
        ("PredictionByVersion", by_version),
        ("PredictionOfModel", of_model),
        ("Prediction", prediction),
        (
            "NewModel",
            object(
                &["owner", "name", "visibility", "hardware"],
                json!({
                    "owner": text, "name": text, "visibility": { "type": "string", "enum": ["public", "private"] }, "hardware": text,
                    "description": text,
                }),
            ),
        ),
        (
            "CogRequest",
            object(
                &["input"],
                json!({
                    "id": text, "input": { "$ref": "#/components/schemas/Input" }, "webhook": { "type": ["string", "null"], "format": "uri" },
                    "webhook_events_filter": events,
                }),
            ),
        ),
        ("Generation", object(&["prompt"], generation)),
        ("Edit", object(&["prompt", "image"], edit)),
        (
            "Images",
            object(
                &["created", "data"],
                json!({
                    "created": { "type": "integer" },
                    "data": { "type": "array", "items": object(&[], json!({ "b64_json": text, "url": text })) },
                    "output_format": text, "size": text, "usage": any, "darkroom": any,
                }),
            ),
        ),
        (
            "Job",
            object(
                &["id", "status", "created_at", "urls"],
                json!({
                    "id": text,
                    "status": { "type": "string", "enum": ["queued", "running", "succeeded", "failed", "canceled", "aborted"] },
                    "ahead": { "type": "integer" },
                    "progress": { "type": ["object", "null"] },
                    "pictures": { "type": ["array", "null"], "items": { "type": "string" } },
                    "result": { "type": ["object", "null"] },
                    "error": { "type": ["object", "null"] },
                    "created_at": text, "started_at": maybe, "completed_at": maybe, "urls": any,
                }),
            ),
        ),
        (
            "Upload",
            object(
                &["content"],
                json!({
                    "content": { "type": "string", "format": "binary" }, "filename": text, "type": text, "metadata": text,
                }),
            ),
        ),
        (
            "File",
            object(
                &["id", "name", "content_type", "size", "etag", "checksums", "metadata", "created_at", "urls"],
                json!({
                    "id": text, "name": text, "content_type": text, "size": { "type": "integer" }, "etag": text, "checksums": any,
                    "metadata": any, "created_at": text, "expires_at": text, "urls": any,
                }),
            ),
        ),
        ("List", object(&["results"], json!({ "next": maybe, "previous": maybe, "results": { "type": "array", "items": any } }))),
        ("Object", any.clone()),
        (
            "Problem",
            object(
                &["detail", "status"],
                json!({
                    "title": text, "detail": text, "status": { "type": "integer" },
                    "invalid_fields": { "type": "array", "items": object(&["type", "field", "description"], json!({
                        "type": text, "field": text, "description": text,
                    })) },
                }),
            ),
        ),
        (
            "OpenAiError",
            object(
                &["error"],
                json!({
                    "error": object(&["message", "type"], json!({ "message": text, "type": text, "param": maybe, "code": maybe })),
                }),
            ),
        ),
    ]
}
