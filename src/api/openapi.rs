//! The OpenAPI document of everything that is served. Models' inputs come from the table by which requests are checked.

use serde_json::{Map, Value, json};
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathItem, Ref, RefOr, Required, ResponseBuilder,
    Schema, ServerBuilder,
};

use super::replicate::Served;

/// One address and method.
struct Route {
    method: HttpMethod,
    path: &'static str,
    dialect: &'static str,
    about: &'static str,
    /// Media type and schema of the body.
    body: Option<(&'static str, &'static str)>,
    /// Status, media type and schema of what can be answered; `""` for no schema.
    answers: &'static [(&'static str, &'static str, &'static str)],
}

const JSON: &str = "application/json";
const PROBLEM: &str = "application/problem+json";
const FORM: &str = "multipart/form-data";
const EVENTS: &str = "text/event-stream";

const GET: HttpMethod = HttpMethod::Get;
const POST: HttpMethod = HttpMethod::Post;

const fn route(
    method: HttpMethod,
    path: &'static str,
    dialect: &'static str,
    about: &'static str,
    body: Option<(&'static str, &'static str)>,
    answers: &'static [(&'static str, &'static str, &'static str)],
) -> Route {
    Route { method, path, dialect, about, body, answers }
}

/// What a create may be answered beside its prediction.
const CREATED: &[(&str, &str, &str)] = &[
    ("201", JSON, "Prediction"),
    ("202", JSON, "Prediction"),
    ("404", PROBLEM, "Problem"),
    ("413", PROBLEM, "Problem"),
    ("415", PROBLEM, "Problem"),
    ("422", PROBLEM, "Problem"),
    ("429", PROBLEM, "Problem"),
    ("503", PROBLEM, "Problem"),
];
const ONE: &[(&str, &str, &str)] = &[("200", JSON, "Prediction"), ("404", PROBLEM, "Problem")];
const LIST: &[(&str, &str, &str)] = &[("200", JSON, "List"), ("422", PROBLEM, "Problem")];
const OBJECT: &[(&str, &str, &str)] = &[("200", JSON, "Object"), ("404", PROBLEM, "Problem")];
const IMAGES: &[(&str, &str, &str)] = &[
    ("200", JSON, "Images"),
    ("400", JSON, "OpenAiError"),
    ("413", JSON, "OpenAiError"),
    ("415", JSON, "OpenAiError"),
    ("429", JSON, "OpenAiError"),
    ("500", JSON, "OpenAiError"),
    ("503", JSON, "OpenAiError"),
];
const COG: &[(&str, &str, &str)] = &[
    ("200", JSON, "Object"),
    ("201", JSON, "Prediction"),
    ("202", JSON, "Object"),
    ("404", JSON, "Object"),
    ("413", JSON, "Object"),
    ("415", JSON, "Object"),
    ("422", JSON, "Object"),
    ("429", JSON, "Object"),
    ("503", JSON, "Object"),
];
const STREAM: &[(&str, &str, &str)] = &[("200", EVENTS, ""), ("404", PROBLEM, "Problem")];

const ROUTES: &[Route] = &[
    route(
        POST,
        "/v1/predictions",
        "Replicate",
        "Create a prediction by version: a hash, owner/name, or owner/name:hash. `Prefer: wait[=n]` holds the answer for up to 60 s, \
         `Cancel-After` sets a deadline, `Idempotency-Key` makes a repetition the same prediction.",
        Some((JSON, "PredictionByVersion")),
        CREATED,
    ),
    route(GET, "/v1/predictions", "Replicate", "List predictions, newest first.", None, LIST),
    route(GET, "/v1/predictions/{id}", "Replicate", "A prediction.", None, ONE),
    route(POST, "/v1/predictions/{id}/cancel", "Replicate", "Stop a prediction.", None, ONE),
    route(
        POST,
        "/v1/models/{owner}/{name}/predictions",
        "Replicate",
        "Create a prediction of a model.",
        Some((JSON, "PredictionOfModel")),
        CREATED,
    ),
    route(
        POST,
        "/v1/deployments/{owner}/{name}/predictions",
        "Replicate",
        "The same for who calls deployments.",
        Some((JSON, "PredictionOfModel")),
        CREATED,
    ),
    route(GET, "/v1/models", "Replicate, OpenAI", "List the models, for clients of both.", None, LIST),
    route(POST, "/v1/models", "Replicate", "Not done here.", None, &[("501", PROBLEM, "Problem")]),
    route(GET, "/v1/models/{owner}/{name}", "Replicate", "A model.", None, OBJECT),
    route(GET, "/v1/models/{owner}/{name}/versions", "Replicate", "Versions of a model.", None, OBJECT),
    route(GET, "/v1/models/{owner}/{name}/versions/{id}", "Replicate", "A version, with its openapi_schema.", None, OBJECT),
    route(
        POST,
        "/v1/files",
        "Replicate",
        "Keep a file for a day, for the inputs of predictions.",
        Some((FORM, "Upload")),
        &[("201", JSON, "File"), ("413", PROBLEM, "Problem"), ("422", PROBLEM, "Problem"), ("503", PROBLEM, "Problem")],
    ),
    route(GET, "/v1/files", "Replicate", "List files, newest first.", None, LIST),
    route(
        GET,
        "/v1/files/{id}",
        "Replicate",
        "What is known of a file.",
        None,
        &[("200", JSON, "File"), ("404", PROBLEM, "Problem")],
    ),
    route(
        HttpMethod::Delete,
        "/v1/files/{id}",
        "Replicate",
        "Remove a file.",
        None,
        &[("204", "", ""), ("404", PROBLEM, "Problem")],
    ),
    route(
        GET,
        "/v1/files/{id}/download",
        "Replicate",
        "A file's content; the link's signature is the permission.",
        None,
        &[("200", "application/octet-stream", ""), ("404", PROBLEM, "Problem")],
    ),
    route(
        GET,
        "/v1/files/{id}/stream",
        "Replicate",
        "A prediction's events; the link's signature is the permission.",
        None,
        STREAM,
    ),
    route(GET, "/v1/account", "Replicate", "Whose key it is.", None, OBJECT),
    route(GET, "/v1/hardware", "Replicate", "This machine.", None, &[("200", JSON, "")]),
    route(GET, "/v1/collections", "Replicate", "None.", None, LIST),
    route(GET, "/v1/trainings", "Replicate", "None: this server does not train.", None, LIST),
    route(POST, "/v1/trainings", "Replicate", "Not done here.", None, &[("501", PROBLEM, "Problem")]),
    route(GET, "/v1/webhooks/default/secret", "Replicate", "The key with which webhooks are signed.", None, OBJECT),
    route(
        POST,
        "/v1/images/generations",
        "OpenAI",
        "Pictures from a prompt. Further keys: seed, guidance, num_inference_steps, lora_weights, lora_scale, loras, on_lora_error.",
        Some((JSON, "Generation")),
        IMAGES,
    ),
    route(POST, "/v1/images/edits", "OpenAI", "Pictures from a picture, with a mask or without.", Some((FORM, "Edit")), IMAGES),
    route(GET, "/v1/models/{name}", "OpenAI", "A model.", None, &[("200", JSON, "Object"), ("404", JSON, "OpenAiError")]),
    route(GET, "/", "Cog", "What is where.", None, OBJECT),
    route(POST, "/predictions", "Cog", "Predict, and answer when it is done.", Some((JSON, "CogRequest")), COG),
    route(
        HttpMethod::Put,
        "/predictions/{id}",
        "Cog",
        "Predict under a name of the client's; the same name is the same prediction.",
        Some((JSON, "CogRequest")),
        COG,
    ),
    route(GET, "/predictions", "Cog, Replicate", "List predictions, newest first.", None, LIST),
    route(GET, "/predictions/{id}", "Cog, Replicate", "A prediction, by its id or the client's own name for it.", None, ONE),
    route(GET, "/health-check", "Cog", "Whether the model is ready or busy; always 200.", None, OBJECT),
    route(GET, "/openapi.json", "Cog", "The model's inputs and outputs.", None, OBJECT),
    route(
        POST,
        "/darkroom/jobs",
        "darkroom",
        "Create a job with the keys of OpenAI's generations; answers at once. With \"stream\": true there are previews.",
        Some((JSON, "Generation")),
        &[
            ("202", JSON, "Job"),
            ("413", PROBLEM, "Problem"),
            ("415", PROBLEM, "Problem"),
            ("422", PROBLEM, "Problem"),
            ("429", PROBLEM, "Problem"),
            ("503", PROBLEM, "Problem"),
        ],
    ),
    route(
        GET,
        "/darkroom/jobs/{id}",
        "darkroom",
        "A job, of whatever dialect: its place in the queue, its progress, its result.",
        None,
        &[("200", JSON, "Job"), ("404", PROBLEM, "Problem")],
    ),
    route(GET, "/darkroom/jobs/{id}/events", "darkroom", "The job whenever it changes: `progress`, then `done`.", None, STREAM),
    route(
        GET,
        "/darkroom/jobs/{id}/preview",
        "darkroom",
        "What the picture will look like, an eighth of its size.",
        None,
        &[("200", "image/webp", ""), ("404", PROBLEM, "Problem")],
    ),
    route(GET, "/darkroom/queue", "darkroom", "How much is waiting, of all tenants together.", None, OBJECT),
    route(GET, "/darkroom/openapi.json", "darkroom", "This document.", None, &[("200", JSON, "")]),
    route(GET, "/health/live", "operation", "The service answers; never waits for a device.", None, OBJECT),
    route(
        GET,
        "/health/ready",
        "operation",
        "Every worker has its model and shows signs of life.",
        None,
        &[("200", JSON, "Object"), ("503", JSON, "Object")],
    ),
    route(
        GET,
        "/metrics",
        "operation",
        "Prometheus' numbers; for admin keys.",
        None,
        &[("200", "text/plain", ""), ("403", PROBLEM, "Problem")],
    ),
];

/// Addresses that need no key.
const OPEN: [&str; 5] = ["/health/live", "/health/ready", "/health-check", "/v1/files/{id}/download", "/v1/files/{id}/stream"];

pub(super) fn document() -> OpenApi {
    let mut paths = PathsBuilder::new();
    for route in ROUTES {
        paths = paths.path(route.path, PathItem::new(route.method.clone(), operation(route)));
    }
    let mut components = ComponentsBuilder::new().security_scheme(
        "key",
        SecurityScheme::Http(
            HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .description(Some("A key of `darkroom keys create`. While there are none, none is asked for."))
                .build(),
        ),
    );
    for (name, schema) in schemas() {
        components = components.schema(name, read(schema));
    }
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("darkroom")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(
                    "Pictures from prompts and LoRAs with FLUX.1, for clients of Replicate, OpenAI and Cog. What is under /v1 is under / and \
                     /v1/v1 as well.",
                ))
                .build(),
        )
        .servers(Some([ServerBuilder::new().url("/").build()]))
        .paths(paths.build())
        .components(Some(components.build()))
        .build()
}

fn operation(route: &Route) -> utoipa::openapi::path::Operation {
    let mut operation = OperationBuilder::new().tag(route.dialect).summary(Some(route.about));
    let method = match &route.method {
        HttpMethod::Get => "get",
        HttpMethod::Put => "put",
        HttpMethod::Delete => "delete",
        _ => "post",
    };
    let named = format!("{method} {}", route.path);
    operation = operation.operation_id(Some(named.replace(|c: char| !c.is_alphanumeric(), "_")));
    for name in route.path.split('{').skip(1).filter_map(|part| part.split('}').next()) {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).required(Required::True);
        operation = operation.parameter(parameter.schema(Some(read(json!({ "type": "string", "minLength": 1 })))));
    }
    if let Some((kind, schema)) = route.body {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(schema))).build();
        operation =
            operation.request_body(Some(RequestBodyBuilder::new().content(kind, content).required(Some(Required::True)).build()));
    }
    let mut answers: Vec<_> = route.answers.to_vec();
    if OPEN.contains(&route.path) {
        operation = operation.securities(Some(Vec::<SecurityRequirement>::new()));
    } else {
        operation = operation.security(SecurityRequirement::new("key", Vec::<String>::new()));
        let openai = route.path.contains("/images/");
        answers.push(if openai { ("401", JSON, "OpenAiError") } else { ("401", PROBLEM, "Problem") });
    }
    for (status, kind, schema) in answers {
        let mut response = ResponseBuilder::new().description(match status.as_bytes()[0] {
            b'2' => "done",
            _ => "not done, and why",
        });
        if !kind.is_empty() {
            let schema = if schema.is_empty() { None } else { Some(Ref::from_schema_name(schema)) };
            response = response.content(kind, ContentBuilder::new().schema(schema).build());
        }
        operation = operation.response(status, response.build());
    }
    operation.build()
}

fn read(schema: Value) -> RefOr<Schema> {
    serde_json::from_value(schema).expect("our schemas are schemas")
}

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

fn schemas() -> Vec<(&'static str, Value)> {
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
        "prompt": { "type": "string", "minLength": 1, "maxLength": 8192 },
        "n": { "type": "integer", "minimum": 1, "maximum": 10 },
        "size": { "type": "string", "examples": ["auto", "1024x768"] },
        "response_format": { "type": "string", "enum": ["b64_json", "url"] },
        "output_format": { "type": "string", "enum": ["png", "webp", "jpeg"] },
        "output_compression": { "type": "integer", "minimum": 0, "maximum": 100 },
        "stream": { "type": "boolean" },
        "partial_images": { "type": "integer", "minimum": 0, "maximum": 3 },
        "seed": { "type": "integer", "minimum": 0 },
        "guidance": { "type": "number", "minimum": 0, "maximum": 100 },
        "num_inference_steps": { "type": "integer", "minimum": 1, "maximum": 1000 },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        let now = serde_json::to_string_pretty(&document()).unwrap() + "\n";
        #[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
        if std::env::var("UPDATE_OPENAPI").is_ok() {
            std::fs::write(path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == now, "if this is meant, run the test with UPDATE_OPENAPI=1 and look at the difference");
    }
}
