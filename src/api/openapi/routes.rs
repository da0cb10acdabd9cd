//! Every address, method, and what it may answer.

use utoipa::openapi::path::HttpMethod;

/// One address and method.
pub(super) struct Route {
    pub(super) method: HttpMethod,
    pub(super) path: &'static str,
    pub(super) dialect: &'static str,
    pub(super) about: &'static str,
    /// Media type and schema of the body.
    pub(super) body: Option<(&'static str, &'static str)>,
    /// Status, media type and schema of what can be answered; `""` for no schema.
    pub(super) answers: &'static [(&'static str, &'static str, &'static str)],
}

pub(super) const JSON: &str = "application/json";
pub(super) const PROBLEM: &str = "application/problem+json";
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

pub(super) const ROUTES: &[Route] = &[
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
    route(GET, "/v1/deployments", "Replicate", "List the models, as deployments of themselves.", None, LIST),
    route(GET, "/v1/deployments/{owner}/{name}", "Replicate", "A model, as a deployment of itself.", None, OBJECT),
    route(
        POST,
        "/v1/deployments/{owner}/{name}/predictions",
        "Replicate",
        "The same for who calls deployments.",
        Some((JSON, "PredictionOfModel")),
        CREATED,
    ),
    route(GET, "/v1/models", "Replicate, OpenAI", "List the models, for clients of both.", None, LIST),
    route(
        POST,
        "/v1/models",
        "Replicate",
        "Note the name of a model of one's own, as training scripts do.",
        Some((JSON, "NewModel")),
        &[("201", JSON, "Object"), ("413", PROBLEM, "Problem"), ("415", PROBLEM, "Problem"), ("422", PROBLEM, "Problem")],
    ),
    route(
        HttpMethod::Delete,
        "/v1/models/{owner}/{name}",
        "Replicate",
        "Forget it.",
        None,
        &[("204", "", ""), ("404", PROBLEM, "Problem")],
    ),
    route(GET, "/v1/models/{owner}/{name}", "Replicate", "A model.", None, OBJECT),
    route(GET, "/v1/models/{owner}/{name}/versions", "Replicate", "Versions of a model.", None, OBJECT),
    route(GET, "/v1/models/{owner}/{name}/versions/{id}", "Replicate", "A version, with its openapi_schema.", None, OBJECT),
    route(
        POST,
        "/v1/models/{owner}/{name}/versions/{id}/trainings",
        "Replicate",
        "Not done here.",
        None,
        &[("501", PROBLEM, "Problem")],
    ),
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
    route(
        GET,
        "/outputs/{job}/{name}",
        "Replicate, OpenAI, darkroom",
        "A picture; the link's signature is the permission.",
        None,
        &[("200", "image/*", ""), ("404", PROBLEM, "Problem")],
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
    route(POST, "/v1/images/variations", "OpenAI", "Not done here.", None, &[("501", JSON, "OpenAiError")]),
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
    route(
        GET,
        "/darkroom/jobs/{id}/events",
        "darkroom",
        "The job whenever it changes: `progress`, then `done`; `error` if it is gone.",
        None,
        STREAM,
    ),
    route(
        GET,
        "/darkroom/jobs/{id}/preview",
        "darkroom",
        "What the picture will look like, an eighth of its size.",
        None,
        &[("200", "image/webp", ""), ("404", PROBLEM, "Problem")],
    ),
    route(
        GET,
        "/darkroom/loras",
        "darkroom",
        "Fetched LoRAs that are kept; for admin keys.",
        None,
        &[("200", JSON, "Object"), ("403", PROBLEM, "Problem"), ("404", PROBLEM, "Problem")],
    ),
    route(
        HttpMethod::Delete,
        "/darkroom/loras/{digest}",
        "darkroom",
        "Remove one; for admin keys.",
        None,
        &[("204", "", ""), ("403", PROBLEM, "Problem"), ("404", PROBLEM, "Problem"), ("422", PROBLEM, "Problem")],
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

/// What lists may be asked for: address, and names of queries.
pub(super) const QUERIES: &[(&str, &[&str])] = &[
    ("/v1/predictions", &["cursor", "created_after", "created_before"]),
    ("/predictions", &["cursor", "created_after", "created_before"]),
    ("/v1/files", &["cursor"]),
    ("/v1/models", &["cursor"]),
];
