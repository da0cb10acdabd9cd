//! Replicate's error bodies.

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::jobs;

/// One faulty field.
#[derive(Debug, Clone, Serialize)]
pub(in crate::api) struct Invalid {
    #[serde(rename = "type")]
    kind: &'static str,
    field: String,
    description: String,
}

impl Invalid {
    pub(super) fn new(kind: &'static str, field: &str, description: String) -> Self {
        Self { kind, field: field.into(), description }
    }
}

/// What a client is told instead of an answer.
#[derive(Debug)]
pub(in crate::api) enum Problem {
    NotFound,
    Invalid(Vec<Invalid>),
    UnknownVersion,
    Media,
    /// Of the tenant's own making; seconds to wait.
    Throttled(u64),
    /// The server cannot; seconds to wait.
    Unavailable(&'static str, u64),
    Conflict,
    Internal,
}

impl Problem {
    pub(super) fn invalid(faults: Vec<Invalid>) -> Self {
        Self::Invalid(faults)
    }
}

impl From<jobs::Error> for Problem {
    fn from(error: jobs::Error) -> Self {
        match error {
            jobs::Error::TenantFull(_) => Self::Throttled(10),
            jobs::Error::Full(_) => Self::Unavailable("The queue is full.", 10),
            jobs::Error::Conflict => Self::Conflict,
            error => {
                tracing::error!(%error, "the store failed");
                Self::Internal
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut wait = None;
        let (status, body) = match self {
            // Replicate says no more than this.
            Self::NotFound => (404, json!({ "detail": "The requested resource could not be found." })),
            Self::Invalid(faults) => {
                let line = |fault: &Invalid| match fault.field.as_str() {
                    "" => format!("- {}\n", fault.description),
                    field => format!("- {field}: {}\n", fault.description),
                };
                let detail: String = faults.iter().map(line).collect();
                (422, json!({ "title": "Input validation failed", "detail": detail, "invalid_fields": faults }))
            }
            Self::UnknownVersion => {
                let detail = "The specified version does not exist (or perhaps you don't have permission to use it?)";
                (422, json!({ "title": "Invalid version or not permitted", "detail": detail }))
            }
            Self::Media => (415, json!({ "title": "Unsupported media type", "detail": "Send application/json." })),
            Self::Throttled(seconds) => {
                wait = Some(seconds);
                let detail = format!("Request was throttled. Your rate limit resets in ~{seconds}s.");
                (429, json!({ "title": "Request was throttled", "detail": detail }))
            }
            Self::Unavailable(detail, seconds) => {
                wait = Some(seconds);
                (503, json!({ "title": "Service unavailable", "detail": detail }))
            }
            Self::Conflict => {
                (422, json!({ "title": "Idempotency key reused", "detail": "The idempotency key was used for another request." }))
            }
            Self::Internal => (500, json!({ "title": "Internal error", "detail": "The server failed; its log says why." })),
        };
        let mut body = body;
        body["status"] = json!(status);
        let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response =
            (code, [(CONTENT_TYPE, "application/problem+json")], Json(body).into_response().into_body()).into_response();
        if let Some(seconds) = wait {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}
