//! What a client is told instead of an answer: one list of problems, and the bodies of each dialect.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::MOST_BODY;
use super::auth::Caller;
use super::bodies::{Held, in_time, whole};
use crate::bytes::in_words;
use crate::{blobs, jobs};

/// One faulty field.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Invalid {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) field: String,
    pub(super) description: String,
}

impl Invalid {
    pub(super) fn new(kind: &'static str, field: &str, description: impl Into<String>) -> Self {
        Self { kind, field: field.into(), description: description.into() }
    }
}

#[derive(Debug)]
pub(super) enum Problem {
    NotFound,
    Unauthenticated,
    /// With the reason.
    Forbidden(&'static str),
    Invalid(Vec<Invalid>),
    UnknownVersion,
    Media,
    /// Nothing of a body for too long.
    Slow,
    /// More than so many bytes.
    TooLarge(usize),
    /// Of the tenant's own making; seconds to wait.
    Throttled(u64),
    /// The tenant's files take as many bytes as they may.
    FilesFull(u64),
    /// The server cannot; seconds to wait.
    Unavailable(&'static str, u64),
    Conflict,
    /// A job that was accepted and failed, or cannot be answered now: its code and message.
    Failed(String, String),
    /// What this server does not do.
    Unsupported(&'static str),
    Internal,
}

impl Problem {
    pub(super) fn invalid(kind: &'static str, field: &str, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Invalid::new(kind, field, description)])
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Invalid(_) | Self::UnknownVersion | Self::Conflict => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Media => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Throttled(_) => StatusCode::TOO_MANY_REQUESTS,
            // Of these, clients repeat neither at once nor by themselves.
            Self::FilesFull(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unavailable(..) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            // The picture cannot be had for a reason that is the request's, most often its LoRA.
            Self::Failed(code, _) if code.starts_with("lora_") || code.starts_with("image_") || code == "invalid_input" => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            Self::Failed(..) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn title(&self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Unauthenticated => "Unauthenticated",
            Self::Forbidden(_) => "Forbidden",
            Self::Invalid(_) => "Input validation failed",
            Self::UnknownVersion => "Invalid version or not permitted",
            Self::Media => "Unsupported media type",
            Self::Slow => "Timed out",
            Self::TooLarge(_) => "Too large",
            Self::Throttled(_) => "Request was throttled",
            Self::FilesFull(_) => "No room for more files",
            Self::Unavailable(..) => "Service unavailable",
            Self::Conflict => "Idempotency key reused",
            Self::Unsupported(_) => "Not implemented",
            Self::Failed(..) => "The job failed",
            Self::Internal => "Internal error",
        }
    }

    /// For people. Faults are lines of their own.
    pub(super) fn detail(&self) -> String {
        match self {
            Self::NotFound => "The requested resource could not be found.".into(),
            Self::Unauthenticated => "You did not pass a valid authentication token: send `Authorization: Bearer KEY`.".into(),
            Self::Forbidden(why) | Self::Unsupported(why) | Self::Unavailable(why, _) => (*why).into(),
            Self::Invalid(faults) => {
                let line = |fault: &Invalid| match fault.field.as_str() {
                    "" => format!("- {}\n", fault.description),
                    field => format!("- {field}: {}\n", fault.description),
                };
                faults.iter().map(line).collect()
            }
            Self::UnknownVersion => {
                "The specified version does not exist (or perhaps you don't have permission to use it?)".into()
            }
            Self::Media => "Send application/json.".into(),
            Self::Slow => "The body did not come, or broke off.".into(),
            Self::TooLarge(most) => format!("The body is larger than {} MB.", most >> 20),
            Self::Throttled(seconds) => format!("Request was throttled. Your rate limit resets in ~{seconds}s."),
            Self::FilesFull(most) => format!(
                "Your files would take more than the {} that they may (files_full): delete some, or wait until they expire.",
                in_words(*most)
            ),
            Self::Failed(_, message) => message.clone(),
            Self::Conflict => "The idempotency key was used for another request.".into(),
            Self::Internal => "The server failed; its log says why.".into(),
        }
    }

    fn wait(&self) -> Option<u64> {
        match self {
            Self::Throttled(seconds) | Self::Unavailable(_, seconds) => Some(*seconds),
            _ => None,
        }
    }

    /// Replicate's body.
    pub(super) fn replicate(&self) -> Value {
        let status = self.status().as_u16();
        match self {
            // Replicate says no more than this.
            Self::NotFound => json!({ "detail": self.detail(), "status": status }),
            Self::Invalid(faults) => {
                json!({ "title": self.title(), "detail": self.detail(), "status": status, "invalid_fields": faults })
            }
            _ => json!({ "title": self.title(), "detail": self.detail(), "status": status }),
        }
    }

    /// OpenAI's body.
    fn openai(&self) -> Value {
        let kind = match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let first = if let Self::Invalid(faults) = self { faults.first() } else { None };
        let param = first.map(|fault| fault.field.as_str()).filter(|field| !field.is_empty());
        let code = match self {
            Self::Unauthenticated => Some("invalid_api_key"),
            Self::NotFound => Some("not_found"),
            Self::Throttled(_) => Some("rate_limit_exceeded"),
            Self::FilesFull(_) => Some("files_full"),
            Self::Failed(code, _) => Some(code.as_str()),
            _ => first.map(|fault| fault.kind),
        };
        let detail = self.detail();
        let message = detail.trim_start_matches("- ").trim_end().replace("\n- ", "; ");
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }

    /// Cog's body: FastAPI's for faults.
    fn cog(&self) -> Value {
        match self {
            Self::Invalid(faults) => {
                let place = |fault: &Invalid| {
                    let field = fault.field.trim_start_matches("input").trim_start_matches('.').to_owned();
                    if field.is_empty() { json!(["body", "input"]) } else { json!(["body", "input", field]) }
                };
                let one = |fault: &Invalid| json!({ "loc": place(fault), "msg": fault.description, "type": fault.kind });
                json!({ "detail": faults.iter().map(one).collect::<Vec<_>>() })
            }
            _ => json!({ "error": self.detail(), "detail": self.detail(), "status": "failed" }),
        }
    }

    fn answer(&self, body: &Value, kind: &'static str, status: StatusCode) -> Response {
        let mut response = (status, [(CONTENT_TYPE, kind)], body.to_string()).into_response();
        if matches!(self, Self::Failed(..)) {
            // Sent again it fails again, or is a second job.
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if let Some(seconds) = self.wait() {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        if matches!(self, Self::Unauthenticated) {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.answer(&self.replicate(), "application/problem+json", self.status())
    }
}

/// The same for OpenAI's clients.
#[derive(Debug)]
pub(super) struct OpenAi(pub(super) Problem);

impl OpenAi {
    pub(super) fn body(&self) -> Value {
        self.0.openai()
    }
}

impl IntoResponse for OpenAi {
    fn into_response(self) -> Response {
        // What is wrong with a request is 400 there.
        let status = if self.0.status() == StatusCode::UNPROCESSABLE_ENTITY { StatusCode::BAD_REQUEST } else { self.0.status() };
        self.0.answer(&self.0.openai(), "application/json", status)
    }
}

/// The same for Cog's.
#[derive(Debug)]
pub(super) struct Cog(pub(super) Problem);

impl IntoResponse for Cog {
    fn into_response(self) -> Response {
        self.0.answer(&self.0.cog(), "application/json", self.0.status())
    }
}

impl<P: Into<Problem>> From<P> for OpenAi {
    fn from(problem: P) -> Self {
        Self(problem.into())
    }
}

impl<P: Into<Problem>> From<P> for Cog {
    fn from(problem: P) -> Self {
        Self(problem.into())
    }
}

/// A whole body with the room that it takes, or the problem with it in our words.
#[derive(Debug)]
pub(super) struct Body(pub(super) Bytes, pub(super) Arc<Held>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let caller = request.extensions().get::<Caller>().ok_or(Problem::Unauthenticated)?;
        let mut held = Held::of(&caller.tenant);
        let pieces = request.into_body().into_data_stream();
        let bytes = in_time(whole(pieces, &mut held, MOST_BODY, |_| Problem::Slow)).await?;
        Ok(Self(bytes.into(), Arc::new(held)))
    }
}

/// A form, or that it is none in our words.
#[derive(Debug)]
pub(super) struct Form(pub(super) Multipart);

impl<S: Send + Sync> FromRequest<S> for Form {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let form = Multipart::from_request(request, state).await;
        form.map(Self).map_err(|_| Problem::invalid("invalid", "", "the body is not multipart/form-data"))
    }
}

impl From<jobs::Error> for Problem {
    fn from(error: jobs::Error) -> Self {
        match error {
            jobs::Error::TenantFull(_) => Self::Throttled(10),
            jobs::Error::Full(_) => Self::Unavailable("The queue is full.", 10),
            jobs::Error::FilesFull(most) => Self::FilesFull(most.unsigned_abs()),
            jobs::Error::Conflict => Self::Conflict,
            jobs::Error::ModelsFull(most) => Self::invalid(
                "invalid",
                "name",
                format!("you have {most} models, as many as you may: delete one with DELETE /v1/models/OWNER/NAME"),
            ),
            // It may be back in a moment: nothing was accepted, and clients may try again.
            jobs::Error::Database(error) => {
                tracing::error!(%error, "the database fails");
                Self::Unavailable("The database does not answer.", 5)
            }
            jobs::Error::Failed(error) => {
                tracing::error!(%error, "the database fails");
                Self::Unavailable("The database does not answer.", 5)
            }
            error => {
                tracing::error!(%error, "the store failed");
                Self::Internal
            }
        }
    }
}

impl From<blobs::Error> for Problem {
    fn from(error: blobs::Error) -> Self {
        tracing::error!(%error, "the storage fails");
        Self::Unavailable("The storage has no room or does not answer.", 30)
    }
}

/// A problem of a value in the words of `ops`.
pub(super) fn faulty(field: &str, error: &dyn std::fmt::Display) -> Problem {
    Problem::invalid("invalid", field, error.to_string())
}

pub(super) async fn not_found() -> Response {
    Problem::NotFound.into_response()
}

pub(super) async fn wrong_method() -> Response {
    let body = json!({ "title": "Method not allowed", "detail": "This address has other methods.", "status": 405 });
    (StatusCode::METHOD_NOT_ALLOWED, [(CONTENT_TYPE, "application/problem+json")], Json(body).into_response().into_body())
        .into_response()
}
