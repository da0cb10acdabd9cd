//! Files that clients send ahead of their predictions.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::multipart::MultipartError;
use axum::extract::{DefaultBodyLimit, Multipart, Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use chrono::DateTime;
use serde::Deserialize;
use serde_json::{Value, json};

use super::headers::value;
use super::{Answer, Page};
use crate::api::auth::Caller;
use crate::api::bodies::{self, Held, in_time};
use crate::api::outputs::{file, now};
use crate::api::problem::{Form, Problem, not_found};
use crate::api::submit::{Kept, UPLOAD_LIVES, upload_key};
use crate::api::{MOST_FORM, Server};
use crate::jobs::{JobId, Upload};

const MOST_FILE: usize = 100 << 20;

/// Names and types of files, in bytes.
const LONGEST_NAME: usize = 255;

/// For metadata, in bytes.
const MOST_METADATA: usize = 64 << 10;

const PAGE: i64 = 100;

pub(super) fn router() -> Router<Arc<Server>> {
    let limit = DefaultBodyLimit::max(MOST_FORM);
    Router::new()
        .route("/files", get(list).post(create).layer(limit))
        .route("/files/{id}", get(show).delete(remove))
        .route("/files/{id}/download", get(download))
}

/// Three dialects of one form: the name and type of the file are in its part, or fields of their own; metadata is a text, a part of
/// its own, or fields `metadata[key]`.
async fn create(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Form(form): Form) -> Answer {
    let mut held = Held::of(&caller.tenant);
    let Sent { content, name, kind, metadata } = in_time(read(form, &mut held)).await?;
    let Some(content) = content else { return Err(Problem::invalid("required", "content", "content is required")) };
    let name = name.unwrap_or_else(|| "file".into());
    let kind = kind.unwrap_or_else(|| "application/octet-stream".into());
    if name.len() > LONGEST_NAME || kind.len() > LONGEST_NAME {
        return Err(Problem::invalid("invalid", "filename", format!("Must be at most {LONGEST_NAME} bytes")));
    }
    let file = Kept { name: &name, kind: &kind, metadata, lives: UPLOAD_LIVES };
    let upload = server.keep(&caller, file, content, held).await?;
    Ok((StatusCode::CREATED, Json(describe(&server, &upload, &server.base(&headers)))).into_response())
}

#[derive(Default)]
struct Sent {
    content: Option<Vec<u8>>,
    name: Option<String>,
    kind: Option<String>,
    metadata: Value,
}

async fn read(mut multipart: Multipart, held: &mut Held) -> Result<Sent, Problem> {
    let mut form = Sent { metadata: json!({}), ..Sent::default() };
    let mut flat = BTreeMap::new();
    let broken = |error: MultipartError| {
        if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
            Problem::TooLarge(MOST_FILE)
        } else {
            Problem::invalid("invalid", "", format!("the form cannot be read: {}", error.body_text()))
        }
    };
    while let Some(field) = multipart.next_field().await.map_err(broken)? {
        let part = field.name().unwrap_or_default().to_owned();
        let (name, kind) = (field.file_name().map(str::to_owned), field.content_type().map(str::to_owned));
        let most = if part == "content" { MOST_FILE } else { MOST_METADATA };
        let bytes = bodies::whole(field, held, most, broken).await?;
        if part == "content" {
            // Fields of their own know better than the part.
            form.name = form.name.or(name);
            form.kind = form.kind.or(kind);
            form.content = Some(bytes);
            continue;
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match part.as_str() {
            "filename" => form.name = Some(text),
            "type" => form.kind = Some(text),
            "metadata" => {
                let object = value("metadata", &text)?.filter(Value::is_object);
                form.metadata = object.ok_or_else(|| Problem::invalid("invalid_type", "metadata", "must be a JSON object"))?;
            }
            _ => {
                if let Some(key) = part.strip_prefix("metadata[").and_then(|key| key.strip_suffix(']')) {
                    flat.insert(key.to_owned(), text);
                }
            }
        }
    }
    flat.into_iter().for_each(|(key, text)| form.metadata[key] = json!(text));
    if form.metadata.to_string().len() > MOST_METADATA {
        return Err(Problem::invalid("invalid", "metadata", format!("must be at most {MOST_METADATA} bytes of JSON in all")));
    }
    Ok(form)
}

async fn list(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, page: Page) -> Answer {
    let mut uploads = server.store.uploads(&caller.tenant, page.cursor()?.as_ref(), PAGE + 1).await?;
    let more = uploads.len() > PAGE as usize;
    uploads.truncate(PAGE as usize);
    let base = server.base(&headers);
    let next = uploads.last().filter(|_| more).map(|last| format!("{base}/v1/files?cursor={}", last.id));
    let results: Vec<Value> = uploads.iter().map(|upload| describe(&server, upload, &base)).collect();
    Ok(Json(json!({ "next": next, "previous": null, "results": results })).into_response())
}

async fn show(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Path(id): Path<String>) -> Answer {
    let id: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    let upload = server.store.upload(&caller.tenant, &id).await?.ok_or(Problem::NotFound)?;
    Ok(Json(describe(&server, &upload, &server.base(&headers))).into_response())
}

async fn remove(State(server): State<Arc<Server>>, caller: Caller, Path(id): Path<String>) -> Answer {
    let id: JobId = id.parse().map_err(|()| Problem::NotFound)?;
    if server.store.upload(&caller.tenant, &id).await?.is_none() {
        return Err(Problem::NotFound);
    }
    // First the file: what is not named any more is never removed.
    server.blobs.delete(&upload_key(&id)).await?;
    server.store.remove_upload(&caller.tenant, &id).await?;
    // It may have been written in between.
    server.blobs.delete(&upload_key(&id)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Debug, Deserialize)]
struct Permit {
    #[serde(default)]
    owner: String,
    #[serde(default)]
    expiry: String,
    #[serde(default)]
    signature: String,
}

/// The file itself. The link's signature is the permission.
async fn download(State(server): State<Arc<Server>>, Path(id): Path<String>, Query(permit): Query<Permit>) -> Answer {
    let Permit { owner, expiry, signature } = permit;
    let alive = expiry.parse::<u64>().is_ok_and(|expiry| expiry >= now());
    let Ok(known) = id.parse::<JobId>() else { return Ok(not_found().await) };
    if !alive || !server.secret.signed("files", &format!("{owner} {id} {expiry}"), &signature) {
        return Err(Problem::NotFound);
    }
    let upload = server.store.upload(&owner, &known).await?.ok_or(Problem::NotFound)?;
    let bytes = server.blobs.get(&upload_key(&known)).await?.ok_or(Problem::NotFound)?;
    Ok(file(harmless(&upload.content_type), bytes))
}

/// What a client says of a file, if browsers run nothing of that kind; exactly, since they read more into a type than is seen at once.
fn harmless(kind: &str) -> &'static str {
    const KINDS: [&str; 4] = ["image/png", "image/jpeg", "image/webp", "image/gif"];
    KINDS.into_iter().find(|harmless| *harmless == kind).unwrap_or("application/octet-stream")
}

impl Server {
    /// A link from which anybody can download a tenant's file for an hour.
    fn download_link(&self, base: &str, tenant: &str, id: &JobId) -> String {
        let expiry = now() + 3600;
        let signature = self.secret.sign("files", &format!("{tenant} {id} {expiry}"));
        let owner: String = url::form_urlencoded::byte_serialize(tenant.as_bytes()).collect();
        format!("{base}/v1/files/{id}/download?owner={owner}&expiry={expiry}&signature={signature}")
    }
}

fn describe(server: &Server, upload: &Upload, base: &str) -> Value {
    let time = |milliseconds| DateTime::from_timestamp_millis(milliseconds).unwrap_or_default().to_rfc3339();
    json!({
        "id": upload.id.as_str(),
        "name": upload.name,
        "content_type": upload.content_type,
        "size": upload.size,
        "etag": upload.sha256,
        "checksums": { "sha256": upload.sha256 },
        "metadata": upload.metadata,
        "created_at": time(upload.created_at),
        "expires_at": time(upload.expires_at),
        "urls": {
            "get": format!("{base}/v1/files/{}", upload.id),
            "download": server.download_link(base, &upload.tenant, &upload.id),
        },
    })
}
