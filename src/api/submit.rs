//! Accepting work, whatever the dialect that asks for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::HeaderMap;
use base64::Engine as _;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::auth::Caller;
use super::bodies::{Held, to_the_end};
use super::problem::{Problem, faulty};
use super::{Server, Unit};
use crate::blobs::Blobs;
use crate::failpoint::failpoint;
use crate::fetch::decode_picture;
use crate::hex::hex;
use crate::jobs::{Job, JobId, NewJob, NewUpload, Store, Upload, Webhook};
use crate::ops::generate::{Picture, prepare};
use crate::ops::serve::{LONGEST_REFERENCE, Order, Origin, Tokens, is_data};

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
    /// What came with it and is not kept yet.
    pub(super) files: Vec<File>,
    /// The room that the request takes.
    pub(super) held: Option<Arc<Held>>,
    /// A client's key, with the fingerprint of what it sent.
    pub(super) idempotency: Option<(String, String)>,
}

/// A picture that a request brings: where it is, or will be once its job is accepted, and its content if that is at hand.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) origin: Origin,
    pub(super) picture: Option<Picture>,
    /// What is shown of it later, where the input itself is too long.
    pub(super) shown: Option<String>,
    /// What is to be kept.
    pub(super) file: Option<File>,
}

impl Sent {
    /// A picture that came with its request.
    pub(super) fn with(caller: &Caller, field: &str, bytes: Vec<u8>) -> Self {
        let said = Kept { name: field, kind: "application/octet-stream", metadata: json!({}), lives: UPLOAD_LIVES };
        let picture = Picture { name: "the data sent".into(), bytes: bytes.clone() };
        let file = File::new(caller, said, bytes);
        Self { origin: Origin::Stored(upload_key(&file.id)), picture: Some(picture), shown: None, file: Some(file) }
    }
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

/// A file to be kept under a name that nobody else has.
#[derive(Debug)]
pub(super) struct File {
    id: JobId,
    said: NewUpload,
    bytes: Vec<u8>,
}

impl File {
    fn new(caller: &Caller, said: Kept<'_>, bytes: Vec<u8>) -> Self {
        let said = NewUpload {
            tenant: caller.tenant.clone(),
            name: said.name.into(),
            content_type: said.kind.into(),
            size: bytes.len() as i64,
            sha256: hex(&Sha256::digest(&bytes)),
            metadata: said.metadata,
            lives: said.lives,
        };
        Self { id: JobId::new(), said, bytes }
    }

    /// First the note: what is not noted is never removed, and what has no room is not written.
    async fn keep(self, store: &Store, blobs: &Blobs) -> Result<Upload, Problem> {
        let Self { id, said, bytes } = self;
        let upload = store.add_upload(&id, &said).await?;
        let written = blobs.put(&upload_key(&id), bytes).await;
        // Its owner may have deleted it while it was written.
        let noted = store.upload(&said.tenant, &id).await?.is_some();
        if written.is_err() || !noted {
            forget(store, blobs, &said.tenant, &id).await;
        }
        written?;
        if noted { Ok(upload) } else { Err(Problem::NotFound) }
    }
}

/// Removes a file that nobody is to find. If that fails its time ends it.
async fn forget(store: &Store, blobs: &Blobs, tenant: &str, id: &JobId) {
    if blobs.delete(&upload_key(id)).await.is_ok() {
        let _ = store.remove_upload(tenant, id).await;
    }
}

/// Keeps what came with a job, and accepts it. If no new job names the files they are removed.
async fn accept(store: Store, blobs: Blobs, new: NewJob, files: Vec<File>) -> Result<(Job, bool), Problem> {
    let ids: Vec<JobId> = files.iter().map(|file| file.id.clone()).collect();
    let mut kept = Ok(());
    for file in files {
        if kept.is_ok() {
            kept = file.keep(&store, &blobs).await.map(drop);
        }
    }
    let accepted = match kept {
        Err(refused) => Err(refused),
        Ok(()) => match store.submit(&new).await {
            // It may be accepted all the same, and names them then; if not, their time ends them.
            Err(error) if error.is_outage() => return Err(error.into()),
            accepted => accepted.map_err(Problem::from),
        },
    };
    if !matches!(accepted, Ok((_, true))) {
        for id in &ids {
            forget(&store, &blobs, &new.tenant, id).await;
        }
    }
    accepted
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
        let Submission { mut order, model, version, input, mut notes, within, webhook, mut files, held, idempotency } =
            submission;
        self.gate.create(&caller.tenant)?;
        if let Some(webhook) = &webhook {
            self.web.check(&webhook.url).map_err(|error| faulty("webhook", &error))?;
        }
        if let Some((key, body)) = &idempotency
            && let Some(earlier) = self.store.repeated(&caller.tenant, key, body).await?
        {
            return Ok((earlier, false));
        }
        for lora in order.loras.iter_mut().filter(|lora| is_data(&lora.reference)) {
            // Rows of jobs are read again and again, and should be short.
            let text = std::mem::take(&mut lora.reference).into_bytes();
            let said = Kept { name: "lora_weights", kind: "text/plain", metadata: json!({}), lives: LORA_LIVES };
            let file = File::new(caller, said, text);
            (lora.reference, lora.stored) = (format!("data:{}", file.said.sha256), Some(upload_key(&file.id)));
            files.push(file);
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
        let accepted = to_the_end(held, accept(self.store.clone(), self.blobs.clone(), new, files)).await?;
        let accepted = accepted.map_err(|problem| match problem {
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
        if is_data(text) {
            let bytes = decode_picture(text).map_err(|error| faulty(&at, &error))?;
            let mut sent = Sent::with(caller, field, bytes);
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
            return Ok(Sent { origin: Origin::Stored(upload_key(&id)), picture: Some(picture), shown: None, file: None });
        }
        brief(&at, text)?;
        self.web.check(text).map_err(|error| faulty(&at, &error))?;
        Ok(Sent { origin: Origin::Link(text.into()), picture: None, shown: None, file: None })
    }

    /// Tokens of a request as they lie in the database: unreadable there.
    pub(super) fn sealed(&self, tokens: &Tokens) -> Result<Option<String>, Problem> {
        if tokens.is_empty() {
            return Ok(None);
        }
        for (field, token) in [("input.hf_api_token", &tokens.hub), ("input.civitai_api_token", &tokens.civitai)] {
            brief(field, token.as_deref().unwrap_or_default())?;
        }
        let text = serde_json::to_string(tokens).map_err(|_| Problem::Internal)?;
        self.secret.seal(&text).map(Some).map_err(|_| Problem::Internal)
    }

    /// Keeps a file of a caller, which takes room until it is kept.
    pub(super) async fn keep(&self, caller: &Caller, said: Kept<'_>, bytes: Vec<u8>, held: Held) -> Result<Upload, Problem> {
        self.accepting()?;
        let (file, store, blobs) = (File::new(caller, said, bytes), self.store.clone(), self.blobs.clone());
        to_the_end(held, async move { file.keep(&store, &blobs).await }).await?
    }
}

/// Refuses what would make a job's row long.
fn brief(field: &str, text: &str) -> Result<(), Problem> {
    if text.len() > LONGEST_REFERENCE {
        let said = format!("is {} bytes long, and must be at most {LONGEST_REFERENCE}: give a shorter one", text.len());
        return Err(Problem::invalid("invalid", field, said));
    }
    Ok(())
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
