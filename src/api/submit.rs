//! Accepting work, whatever the dialect that asks for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::HeaderMap;
use base64::Engine as _;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::auth::Caller;
use super::problem::{Problem, faulty};
use super::{Server, Unit};
use crate::failpoint::failpoint;
use crate::fetch::decode_picture;
use crate::hex::hex;
use crate::jobs::{Job, JobId, NewJob, NewUpload, Upload, Webhook};
use crate::ops::generate::{Picture, prepare};
use crate::ops::serve::{Order, Origin, Tokens};

/// Free bytes that the disk must have for a job to be accepted.
const RESERVE: u64 = 512 << 20;

/// Milliseconds that an upload is kept.
pub(super) const UPLOAD_LIVES: i64 = 24 * 3600 * 1000;

/// And a LoRA that came inside its request, which its job may wait long to use.
const LORA_LIVES: i64 = 30 * UPLOAD_LIVES;

/// A checked wish of a caller.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) order: Order,
    /// As the client names the model: `owner/name` and a version.
    pub(super) model: String,
    pub(super) version: String,
    /// The request's input as it may be shown again.
    pub(super) input: Value,
    pub(super) notes: Vec<String>,
    /// Milliseconds from now within which it must have ended.
    pub(super) within: Option<i64>,
    pub(super) webhook: Option<Webhook>,
    /// A client's key, with the fingerprint of what it sent.
    pub(super) idempotency: Option<(String, String)>,
}

/// A picture that a request brings: where it is kept, and its content if that is at hand.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) origin: Origin,
    pub(super) picture: Option<Picture>,
    /// What is shown of it later, where the input itself is too long.
    pub(super) shown: Option<String>,
}

/// What is said of a file that is kept.
#[derive(Debug)]
pub(super) struct Kept<'a> {
    pub(super) name: &'a str,
    /// Its media type.
    pub(super) kind: &'a str,
    pub(super) metadata: Value,
    /// Milliseconds.
    pub(super) lives: i64,
}

/// Text of a data URI that is stored with its job; longer ones are shown as a link.
const LONG: usize = 64 << 10;

impl Server {
    /// Whether new work can be taken at all.
    fn accepting(&self) -> Result<(), Problem> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Problem::Unavailable("The server is stopping.", 30));
        }
        if fs4::available_space(&self.data).is_ok_and(|free| free < RESERVE) {
            return Err(Problem::Unavailable("The server's disk is full (storage_full).", 60));
        }
        Ok(())
    }

    /// Accepts a job: when this answers it is committed. `false` if an idempotency key named an earlier one.
    pub(super) async fn submit(
        &self,
        caller: &Caller,
        unit: &Unit,
        headers: &HeaderMap,
        submission: Submission,
    ) -> Result<(Job, bool), Problem> {
        self.accepting()?;
        let Submission { mut order, model, version, input, mut notes, within, webhook, idempotency } = submission;
        self.gate.create(&caller.tenant)?;
        if let Some(webhook) = &webhook {
            self.web.check(&webhook.url).map_err(|error| faulty("webhook", &error))?;
        }
        let mut sent = Vec::new();
        for lora in order.loras.iter_mut().filter(|lora| lora.reference.starts_with("data:")) {
            // Rows of jobs are read again and again, and should be short.
            let text = std::mem::take(&mut lora.reference).into_bytes();
            let file = Kept { name: "lora_weights", kind: "text/plain", metadata: json!({}), lives: LORA_LIVES };
            let stored = self.keep(caller, file, text).await?;
            sent.push(stored.id.clone());
            (lora.reference, lora.stored) = (format!("data:{}", stored.sha256), Some(upload_key(&stored.id)));
        }
        if unit.model.name == "pocket" {
            notes.push(
                "this server runs pocket, the tiny model for trying it out, at its own sizes; give it FLUX.1 with --model".into(),
            );
        }
        let new = NewJob {
            tenant: caller.tenant.clone(),
            base: unit.model.name.clone(),
            affinity: order.affinity(),
            request: json!({
                "order": order,
                "input": input,
                "model": model.clone(),
                "version": version,
                "notes": notes,
                "address": self.base(headers),
            }),
            within,
            webhook,
            idempotency,
        };
        failpoint("accepting");
        let accepted = self.store.submit(&new).await;
        if !matches!(accepted, Ok((_, true))) {
            // No job names them.
            for id in &sent {
                let _ = self.store.remove_upload(&caller.tenant, id).await;
                let _ = self.blobs.delete(&upload_key(id)).await;
            }
        }
        let accepted = accepted.map_err(|error| match Problem::from(error) {
            Problem::Throttled(_) => Problem::Throttled(self.seconds_of_work()),
            Problem::Unavailable("The queue is full.", _) => Problem::Unavailable("The queue is full.", self.seconds_of_work()),
            problem => problem,
        })?;
        tracing::info!(job = %accepted.0.id, tenant = caller.tenant, model, "accepted");
        failpoint("accepted");
        unit.wake();
        Ok(accepted)
    }

    /// What can be found wrong without the device, found now.
    pub(super) fn check(unit: &Unit, order: &Order, image: Option<Picture>, mask: Option<Picture>) -> Result<(), Problem> {
        let field = |error: &crate::ops::Error| match error {
            crate::ops::Error::Invalid { field, .. } | crate::ops::Error::Combination { field, .. } => format!("input.{field}"),
            crate::ops::Error::UnreadablePicture { field, .. } => format!("input.{field}"),
            crate::ops::Error::Fetch { .. } => "input.lora_weights".into(),
            _ => "input".into(),
        };
        let refuse = |error: crate::ops::Error| faulty(&field(&error), &error.told());
        order.check().map_err(refuse)?;
        // A link is followed when the job runs; all else can be tried now.
        let linked = |origin: &Option<Origin>| matches!(origin, Some(Origin::Link(_)));
        if linked(&order.image) || linked(&order.mask) {
            return Ok(());
        }
        let request = order.request(image, mask).map_err(refuse)?;
        prepare(&request, &unit.model).map(drop).map_err(refuse)
    }

    /// A picture in a request: a data URI, a file that was uploaded before, or a link.
    pub(super) async fn sent(&self, caller: &Caller, base: &str, field: &str, text: &str) -> Result<Sent, Problem> {
        let at = format!("input.{field}");
        if text.starts_with("data:") {
            let bytes = decode_picture(text).map_err(|error| faulty(&at, &error))?;
            let mut sent = self.sent_bytes(caller, field, bytes).await?;
            if text.len() > LONG
                && let Origin::Stored(key) = &sent.origin
            {
                sent.shown = Some(format!("{base}/v1/files/{}", key.trim_start_matches("uploads/")));
            }
            return Ok(sent);
        }
        if let Some(id) = own_file(base, text) {
            let gone = || faulty(&at, &"names a file that is not there (any more)");
            let upload = self.store.upload(&caller.tenant, &id).await?.ok_or_else(gone)?;
            let bytes = self.blobs.get(&upload_key(&id)).await?.ok_or_else(gone)?;
            let picture = Picture { name: upload.name, bytes: bytes.to_vec() };
            return Ok(Sent { origin: Origin::Stored(upload_key(&id)), picture: Some(picture), shown: None });
        }
        self.web.check(text).map_err(|error| faulty(&at, &error))?;
        Ok(Sent { origin: Origin::Link(text.into()), picture: None, shown: None })
    }

    /// A picture that came with its request, kept until its job has run.
    pub(super) async fn sent_bytes(&self, caller: &Caller, field: &str, bytes: Vec<u8>) -> Result<Sent, Problem> {
        let file = Kept { name: field, kind: "application/octet-stream", metadata: json!({}), lives: UPLOAD_LIVES };
        let stored = self.keep(caller, file, bytes.clone()).await?;
        let picture = Picture { name: "the data sent".into(), bytes };
        Ok(Sent { origin: Origin::Stored(upload_key(&stored.id)), picture: Some(picture), shown: None })
    }

    /// Tokens of a request as they lie in the database: unreadable there.
    pub(super) fn sealed(&self, tokens: &Tokens) -> Result<Option<String>, Problem> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let text = serde_json::to_string(tokens).map_err(|_| Problem::Internal)?;
        self.secret.seal(&text).map(Some).map_err(|_| Problem::Internal)
    }

    /// Keeps a file of a caller.
    pub(super) async fn keep(&self, caller: &Caller, file: Kept<'_>, bytes: Vec<u8>) -> Result<Upload, Problem> {
        self.accepting()?;
        let new = NewUpload {
            tenant: caller.tenant.clone(),
            name: file.name.into(),
            content_type: file.kind.into(),
            size: bytes.len() as i64,
            sha256: hex(&Sha256::digest(&bytes)),
            metadata: file.metadata,
            lives: file.lives,
        };
        let id = JobId::new();
        // First the bytes: what the store names is there.
        self.blobs.put(&upload_key(&id), bytes).await?;
        let added = self.store.add_upload(&id, &new).await;
        if added.is_err() {
            // Nothing names it.
            let _ = self.blobs.delete(&upload_key(&id)).await;
        }
        Ok(added?)
    }
}

pub(super) fn upload_key(id: &JobId) -> String {
    format!("uploads/{id}")
}

/// The file that a link of our own names.
fn own_file(base: &str, text: &str) -> Option<JobId> {
    let path = text.strip_prefix(base)?;
    let id = path.trim_start_matches("/v1").strip_prefix("/files/")?;
    id.trim_end_matches('/').parse().ok()
}

/// Of a request: the model that it is to, and its body, whatever the order of its keys.
pub(super) fn fingerprint(model: &str, body: &Map<String, Value>) -> String {
    hex(&Sha256::new().chain_update(model).chain_update([0]).chain_update(Value::Object(body.clone()).to_string()).finalize())
}

/// A picture's bytes as a data URI's content.
pub(super) fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Pictures that are decoded at once, of all callers: each takes up to 256 MiB and a core for seconds.
static DECODED: Semaphore = Semaphore::const_new(2);

/// What can be found wrong without the device, found now; pictures are decoded for it.
pub(super) async fn check_order(unit: &Arc<Unit>, order: &Order, [image, mask]: [Option<Picture>; 2]) -> Result<(), Problem> {
    let (unit, order, pictures) = (unit.clone(), order.clone(), image.is_some() || mask.is_some());
    let check = move || Server::check(&unit, &order, image, mask);
    // Whoever sends none waits for nobody else's.
    if pictures { decoding(check).await? } else { check() }
}

/// Does what decodes pictures where nobody else waits for it, when its turn has come.
pub(super) async fn decoding<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let place = DECODED.acquire().await.map_err(|_| Problem::Internal)?;
    let work = move || {
        // Held to the end, also if the caller goes away.
        let _place = place;
        work()
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| Problem::Internal)
}
