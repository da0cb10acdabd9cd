//! A body onto the disk: resumed where it broke, checked, never too large.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH,
    IF_RANGE, RANGE,
};
use reqwest::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::cache::{self, Cache};
use super::client::{self, Ask, Client};
use super::{Error, Progress, peft};
use crate::hex::hex;

/// A file whose download began, and the ETag that allows to go on. Clones share the right to write it, which ends with the last: whoever
/// fetches may leave before whoever writes has written.
#[derive(Debug, Clone)]
pub(super) struct Partial(Arc<Turn>);

/// The right to download one file. When it ends, what broke off stays if it can be gone on with and the cache has room.
#[derive(Debug)]
struct Turn {
    path: PathBuf,
    lock: File,
    cache: Cache,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if begun(&self.path).is_none() {
            remove(&self.path);
        }
        let _ = self.lock.unlock();
        if self.path.exists() {
            self.cache.make_room();
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    etag: String,
}

fn notes(path: &Path) -> PathBuf {
    path.with_extension("json")
}

/// Length and ETag of what is there, if it can be gone on with.
fn begun(path: &Path) -> Option<(u64, String)> {
    let length = fs::metadata(path).ok()?.len();
    let Begun { etag } = cache::read_json(&notes(path))?;
    (length > 0).then_some((length, etag))
}

fn remove(path: &Path) {
    let _ = fs::remove_file(path);
    let _ = fs::remove_file(notes(path));
}

impl Partial {
    /// By whoever holds the lock beside it.
    pub(super) fn locked(path: PathBuf, lock: File, cache: Cache) -> Self {
        Self(Arc::new(Turn { path, lock, cache }))
    }

    /// No field, of which a closure would take the path and leave the right to it.
    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }

    /// Puts these settings into the file's header -> its SHA-256 then.
    pub(super) fn join(&self, settings: &[u8]) -> Result<String, Error> {
        let path = self.path();
        // From here on it is not the source's file, and must not be gone on with.
        let _ = fs::remove_file(notes(path));
        let mut file = File::options().read(true).write(true).open(path).map_err(Error::write(path))?;
        peft::join(&mut file, settings).map_err(Error::write(path))?;
        cache::digest(path).map_err(Error::write(path))
    }

    pub(super) fn remove(&self) {
        remove(self.path());
    }
}

/// How a download ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// What the cache has is still right.
    Unchanged,
    Whole {
        etag: Option<String>,
        sha256: String,
    },
}

/// Brings `ask` into `partial`. With `known`, the ETag of what the cache has, it may turn out to be unchanged.
pub(super) async fn download(
    client: &Client,
    cache: &Cache,
    ask: &Ask,
    partial: &Partial,
    known: Option<&str>,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Outcome, Error> {
    let mut failures = 0;
    loop {
        let begun = begun(partial.path());
        let before = begun.as_ref().map_or(0, |(length, _)| *length);
        match attempt(client, cache, ask, partial, begun, known, progress).await {
            Err(error) if error.is_passing() => {
                // As long as each attempt brings something, it is worth going on.
                let came_on = self::begun(partial.path()).is_some_and(|(length, _)| length > before);
                failures = if came_on { 1 } else { failures + 1 };
                if failures >= client.limits.attempts {
                    return Err(error);
                }
                client.pause(failures, None).await;
            }
            Ok(None) => partial.remove(),
            Ok(Some(outcome)) => return Ok(outcome),
            Err(error) => {
                partial.remove();
                return Err(error);
            }
        }
    }
}

/// One request. `None`: what was begun is of no use, so it must be begun anew.
async fn attempt(
    client: &Client,
    cache: &Cache,
    ask: &Ask,
    partial: &Partial,
    begun: Option<(u64, String)>,
    known: Option<&str>,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Option<Outcome>, Error> {
    let mut headers = HeaderMap::new();
    let mut set = |name: HeaderName, value: &str| HeaderValue::from_str(value).map(|value| headers.insert(name, value));
    match (&begun, known) {
        (Some((length, etag)), _) => {
            let _ = set(RANGE, &format!("bytes={length}-"));
            let _ = set(IF_RANGE, etag);
        }
        (None, Some(etag)) => {
            let _ = set(IF_NONE_MATCH, etag);
        }
        (None, None) => {}
    }
    let mut response = client.get(ask, &headers).await?;
    let host = client::host(response.url());
    let (begun, mark) = begun.unwrap_or_default();
    // Some heed Range and not If-Range: what follows must be of the same file.
    let same = client::header(&response, &ETAG).is_none_or(|etag| etag == mark);
    let start = match response.status() {
        StatusCode::NOT_MODIFIED if known.is_some() && begun == 0 => return Ok(Some(Outcome::Unchanged)),
        StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if begun > 0 && !same => return Ok(None),
        StatusCode::PARTIAL_CONTENT if begun > 0 && range(&response).is_some_and(|(start, _)| start == Some(begun)) => begun,
        StatusCode::RANGE_NOT_SATISFIABLE if begun > 0 && range(&response).is_some_and(|(_, total)| total == Some(begun)) => {
            let sha256 = whole(partial).await?;
            return Ok(Some(Outcome::Whole { etag: client::header(&response, &ETAG), sha256 }));
        }
        StatusCode::OK => 0,
        _ if begun > 0 => return Ok(None),
        _ => return Err(Error::Answer(host)),
    };
    if client::header(&response, &CONTENT_TYPE).is_some_and(|kind| kind.to_ascii_lowercase().starts_with("text/html")) {
        return Err(Error::WebPage(host));
    }
    if client::header(&response, &CONTENT_ENCODING).is_some_and(|coding| !coding.eq_ignore_ascii_case("identity")) {
        return Err(Error::Encoded(host));
    }
    let length: Option<u64> = client::header(&response, &CONTENT_LENGTH).and_then(|length| length.parse().ok());
    let total = length.map(|length| start.saturating_add(length));
    if total.is_some_and(|total| total > client.limits.bytes) {
        return Err(Error::TooLarge(client.limits.bytes));
    }
    cache.reserve(length.unwrap_or(0))?;

    let etag = client::header(&response, &ETAG);
    let notes = notes(partial.path());
    match etag.as_ref().filter(|etag| !etag.starts_with("W/")) {
        Some(etag) => cache::write_json(&notes, &Begun { etag: etag.clone() })?,
        // Without a strong mark nobody knows whether the rest belongs to the beginning.
        None => drop(fs::remove_file(&notes)),
    }
    let writer = Writer::start(partial, start);
    let received = receive(client, &mut response, &writer, start, total, progress).await;
    let (done, sha256) = writer.finish().await?;
    received?;
    if total.is_some_and(|total| total != done) {
        return Err(Error::Broken(host));
    }
    Ok(Some(Outcome::Whole { etag, sha256 }))
}

async fn receive(
    client: &Client,
    response: &mut Response,
    writer: &Writer,
    start: u64,
    total: Option<u64>,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<(), Error> {
    let mut done = start;
    while let Some(chunk) = client.chunk(response).await? {
        done += chunk.len() as u64;
        if done > client.limits.bytes {
            return Err(Error::TooLarge(client.limits.bytes));
        }
        progress(Progress { done, total });
        if !writer.put(chunk).await {
            // The writer says why when it is finished.
            break;
        }
    }
    Ok(())
}

/// `bytes 10-99/100` or `bytes */100`: the start and the total.
fn range(response: &Response) -> Option<(Option<u64>, Option<u64>)> {
    let text = client::header(response, &CONTENT_RANGE)?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-').and_then(|(start, _)| start.parse().ok()), total.parse().ok()))
}

async fn whole(partial: &Partial) -> Result<String, Error> {
    let writer = Writer::start(partial, fs::metadata(partial.path()).map_err(Error::write(partial.path()))?.len());
    Ok(writer.finish().await?.1)
}

/// Writes and hashes on a thread where waiting for a disk stops nobody.
pub(super) struct Writer {
    chunks: mpsc::Sender<Bytes>,
    task: JoinHandle<io::Result<(u64, Sha256)>>,
    path: PathBuf,
}

impl Writer {
    /// Keeps the first `start` bytes of the file.
    pub(super) fn start(partial: &Partial, start: u64) -> Self {
        let (chunks, mut receiver) = mpsc::channel::<Bytes>(16);
        let (path, to) = (partial.path().to_owned(), partial.clone());
        let task = spawn_blocking(move || {
            let (mut file, mut hasher) = resume(to.path(), start)?;
            let mut done = start;
            while let Some(chunk) = receiver.blocking_recv() {
                file.write_all(&chunk)?;
                hasher.update(&chunk);
                done += chunk.len() as u64;
            }
            Ok((done, hasher))
        });
        Self { chunks, task, path }
    }

    /// False once writing has failed.
    pub(super) async fn put(&self, chunk: Bytes) -> bool {
        self.chunks.send(chunk).await.is_ok()
    }

    /// Length and SHA-256 of the file.
    pub(super) async fn finish(self) -> Result<(u64, String), Error> {
        drop(self.chunks);
        let written = self.task.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        let (done, hasher) = written.map_err(Error::write(&self.path))?;
        Ok((done, hex(&hasher.finalize())))
    }
}

/// The file cut to `start` bytes, and their hash.
fn resume(path: &Path, start: u64) -> io::Result<(File, Sha256)> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    if file.metadata()?.len() < start {
        return Err(io::Error::other("the beginning of this download is gone"));
    }
    file.set_len(start)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((file, hasher)),
            n => hasher.update(&buffer[..n]),
        }
    }
}
