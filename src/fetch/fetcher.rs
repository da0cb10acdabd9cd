//! One fetcher for all who need adapters: each file is downloaded once, however many wait for it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use url::Url;

use super::bucket::Object;
use super::cache::{self, Cache, Held, Record};
use super::client::Client;
use super::download::{self, Outcome, Partial};
use super::guard::{Guard, redacted};
use super::locate::Services;
use super::sniff::{self, Kind};
use super::{Credentials, Error, Fetched, Limits, Options, Progress, Reference, archive, data, local};
use crate::config::Secret;
use crate::hex::hex;

/// How often a download is looked after.
const LOOK: Duration = Duration::from_millis(100);

/// A download, shared by those who wait for it. It ends when the last of them leaves.
type Flight = Shared<BoxFuture<'static, Result<Fetched, Arc<Error>>>>;
type WeakFlight = WeakShared<BoxFuture<'static, Result<Fetched, Arc<Error>>>>;

/// Fetches adapters, guarded, into a cache. Clones share everything.
#[derive(Debug, Clone)]
pub struct Fetcher {
    shared: Arc<Inner>,
}

struct Inner {
    client: Client,
    cache: Cache,
    services: Services,
    offline: bool,
    store: Vec<(String, Secret)>,
    flights: Mutex<HashMap<String, (WeakFlight, watch::Receiver<Progress>)>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the store's settings, which hold secrets.
        f.debug_struct("Inner").field("cache", &self.cache).field("services", &self.services).finish_non_exhaustive()
    }
}

impl Fetcher {
    pub fn new(options: Options) -> Result<Self, Error> {
        let trusted = [&options.hub, &options.civitai].into_iter().filter_map(|address| Url::parse(address).ok()).collect();
        let guard = Guard { private: options.private, trusted };
        Ok(Self {
            shared: Arc::new(Inner {
                client: Client::new(guard, options.limits)?,
                cache: Cache::open(options.cache, options.cache_bytes)?,
                services: Services { hub: options.hub, civitai: options.civitai },
                offline: options.offline,
                store: options.store,
                flights: Mutex::default(),
            }),
        })
    }

    /// The adapter's file. `told` hears ten times a second how far it is, and may stop waiting. Those who ask for the same with the same credentials share one download.
    pub async fn get(
        &self,
        reference: &Reference,
        credentials: &Credentials,
        mut told: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Fetched, Arc<Error>> {
        if let Reference::File(path) = reference {
            let path = path.clone();
            return blocking(move || local(&path)).await.map_err(Arc::new);
        }
        let (mut flight, news) = self.join(reference, credentials);
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                biased;
                result = &mut flight => return result,
                _ = ticks.tick() => {}
            }
            let now = *news.borrow();
            if told(now).is_break() {
                return Err(Arc::new(Error::Cancelled));
            }
        }
    }

    /// As [`Self::get`], for callers without a runtime.
    pub fn get_blocking(
        &self,
        reference: &Reference,
        credentials: &Credentials,
        told: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Fetched, Arc<Error>> {
        let runtime = runtime().map_err(|source| Arc::new(Error::Own("a download cannot be begun", source)))?;
        runtime.block_on(self.get(reference, credentials, told))
    }

    fn join(&self, reference: &Reference, credentials: &Credentials) -> (Flight, watch::Receiver<Progress>) {
        let key = key(reference, credentials);
        let mut flights = self.shared.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, (flight, _)| flight.upgrade().is_some_and(|flight| flight.peek().is_none()));
        if let Some((flight, news)) = flights.get(&key)
            && let Some(flight) = flight.upgrade()
        {
            return (flight, news.clone());
        }
        let (sender, news) = watch::channel(Progress::default());
        let (shared, reference, credentials, of) = (self.shared.clone(), reference.clone(), credentials.clone(), key.clone());
        let report = move |progress| {
            sender.send_replace(progress);
        };
        let flight =
            async move { shared.fetch(&of, &reference, &credentials, &report).await.map(Fetched::cached).map_err(Arc::new) };
        let flight = flight.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key, (weak, news.clone()));
        }
        (flight, news)
    }
}

/// What a request is filed under. The token is part of it: what one may see is not answered to another.
fn key(reference: &Reference, credentials: &Credentials) -> String {
    let reveal = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.reveal().to_owned()).unwrap_or_default();
    let token = match reference {
        Reference::Hub { .. } => reveal(&credentials.hub),
        Reference::CivitaiVersion(_) | Reference::CivitaiModel(_) => reveal(&credentials.civitai),
        Reference::Link(_) => reveal(&credentials.civitai),
        _ => String::new(),
    };
    cache::key(&[&format!("{reference:?}"), &token])
}

impl Inner {
    async fn fetch(
        &self,
        key: &str,
        reference: &Reference,
        credentials: &Credentials,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Held, Error> {
        if let Reference::Data(text) = reference {
            let text = text.clone();
            let bytes = blocking(move || data::decode(&text)).await?;
            let partial = self.lock(key).await?;
            std::fs::write(partial.path(), &bytes).map_err(Error::write(partial.path()))?;
            let mut hasher = Sha256::new();
            hasher.update(&bytes);
            return self.keep(&partial, hex(&hasher.finalize())).await;
        }
        if self.offline {
            return self.known(key).map(|(held, _)| held).ok_or_else(|| Error::Offline(named(reference)));
        }
        let partial = self.lock(key).await?;
        match self.current(key, &partial, reference, credentials, progress).await {
            // The source is down, not the file: what it gave last time still serves.
            Err(error) if error.is_passing() => match self.known(key) {
                Some((held, _)) => {
                    tracing::warn!(source = named(reference), %error, "using the copy in the cache");
                    Ok(held)
                }
                None => Err(error),
            },
            result => result,
        }
    }

    /// What the cache has.
    fn known(&self, key: &str) -> Option<(Held, Record)> {
        self.cache.record(key).and_then(|record| Some((self.cache.hold(&record.digest)?, record)))
    }

    /// The file in its newest state: from the cache if that is what it has.
    async fn current(
        &self,
        key: &str,
        partial: &Partial,
        reference: &Reference,
        credentials: &Credentials,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Held, Error> {
        let known = self.known(key);
        let limits: &Limits = &self.client.limits;
        let version = known.as_ref().and_then(|(_, record)| record.version.clone());
        let (outcome, version) = if let Reference::S3 { bucket, key } = reference {
            let object = Object { bucket, key, settings: &self.store };
            (object.download(limits, &self.cache, partial, version.as_deref(), progress).await?, None)
        } else {
            let located = self.services.locate(&self.client, reference, credentials).await?;
            if located.bytes.is_some_and(|bytes| bytes > limits.bytes) {
                return Err(Error::TooLarge(limits.bytes));
            }
            if located.gated {
                self.client.reach(&located.ask).await?;
            }
            match known {
                Some((held, record)) if located.version.is_some() && located.version == record.version => return Ok(held),
                _ => {}
            }
            let settings = match &located.config {
                Some(ask) => Some(self.client.text(ask).await?),
                None => None,
            };
            // With settings in its header the file is another one than the hub's.
            let known = located.sha256.as_ref().filter(|_| settings.is_none());
            if let Some(held) = known.and_then(|digest| self.cache.hold(digest)) {
                let record = Record { version: located.version, digest: held.digest.clone() };
                self.cache.set_record(key, &record)?;
                return Ok(held);
            }
            // A commit's file has another ETag space than a record's version.
            let etag = if located.version.is_some() { None } else { version.as_deref() };
            let mut again = true;
            let mut outcome = loop {
                let outcome = download::download(&self.client, &self.cache, &located.ask, partial, etag, progress).await?;
                match (&outcome, &located.sha256) {
                    (Outcome::Whole { sha256, .. }, Some(stated)) if !stated.eq_ignore_ascii_case(sha256) => {
                        partial.remove();
                        if !std::mem::take(&mut again) {
                            return Err(Error::Altered(redacted(&located.ask.url)));
                        }
                    }
                    _ => break outcome,
                }
            };
            if let (Some(settings), Outcome::Whole { sha256, .. }) = (settings, &mut outcome) {
                let partial = partial.clone();
                *sha256 = blocking(move || partial.join(&settings)).await?;
            }
            (outcome, located.version)
        };
        match outcome {
            Outcome::Unchanged => {
                known_or_gone(self.cache.record(key).and_then(|record| self.cache.hold(&record.digest)), reference)
            }
            Outcome::Whole { etag, sha256 } => {
                let held = self.keep(partial, sha256).await?;
                self.cache.set_record(key, &Record { version: version.or(etag), digest: held.digest.clone() })?;
                Ok(held)
            }
        }
    }

    /// Checks what arrived, takes the adapter out of it if it is an archive, and puts it into the cache.
    async fn keep(&self, partial: &Partial, sha256: String) -> Result<Held, Error> {
        let (cache, arrived) = (self.cache.clone(), partial.clone());
        let held = blocking(move || {
            let from = arrived.path();
            let head = cache::head(from, sniff::HEAD).map_err(Error::write(from))?;
            match sniff::kind(&head) {
                Kind::Safetensors => cache.promote(from, &sha256),
                Kind::Archive => unpack(&cache, from),
                Kind::WebPage => Err(Error::Foreign("a web page, perhaps to log in")),
                Kind::Foreign(what) => Err(Error::Foreign(what)),
                Kind::Unknown => Err(Error::Foreign("an unknown kind of file")),
            }
        });
        let held = held.await;
        partial.remove();
        held
    }

    /// Waits until no other process downloads the same.
    async fn lock(&self, key: &str) -> Result<Partial, Error> {
        let path = self.cache.partial(key).with_extension("lock");
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(Error::write(&path))?;
        while let Err(error) = file.try_lock() {
            match error {
                std::fs::TryLockError::WouldBlock => tokio::time::sleep(LOOK).await,
                std::fs::TryLockError::Error(source) => return Err(Error::Write { path, source }),
            }
        }
        Ok(Partial::locked(self.cache.partial(key), file, self.cache.clone()))
    }
}

/// Whoever waits for a download may leave, and others go on with it: its sockets and clocks are nobody's.
fn runtime() -> io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let made = tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("downloads").enable_all().build()?;
    Ok(RUNTIME.get_or_init(|| made))
}

fn unpack(cache: &Cache, from: &Path) -> Result<Held, Error> {
    let folder = from.parent().unwrap_or(Path::new("."));
    let write = Error::write(folder);
    let mut out = tempfile::Builder::new().prefix("unpacked").tempfile_in(folder).map_err(write)?;
    // So that nobody who makes room takes it for left behind.
    out.as_file().lock_shared().map_err(Error::write(out.path()))?;
    archive::extract_file(File::open(from).map_err(Error::write(from))?, out.as_file_mut())?;
    let (_lock, file) = out.into_parts();
    let head = cache::head(&file, sniff::HEAD).map_err(Error::write(&file))?;
    match sniff::kind(&head) {
        Kind::Safetensors => {
            let digest = cache::digest(&file).map_err(Error::write(&file))?;
            cache.promote(&file, &digest)
        }
        Kind::Archive => Err(Error::Foreign("an archive in an archive")),
        Kind::WebPage => Err(Error::Foreign("a web page")),
        Kind::Foreign(what) => Err(Error::Foreign(what)),
        Kind::Unknown => Err(Error::Foreign("an unknown kind of file")),
    }
}

/// The cache said that it has it, the source that it is unchanged.
fn known_or_gone(held: Option<Held>, reference: &Reference) -> Result<Held, Error> {
    held.ok_or_else(|| Error::Broken(named(reference)))
}

/// What a user gave as a reference, without what signs it: for messages, reports and logs.
#[must_use]
pub fn shown(text: &str) -> String {
    match Reference::parse(text) {
        Ok(Reference::Link(url)) => redacted(&url),
        Ok(Reference::Data(_)) => "data URI".into(),
        _ => text.chars().filter(|c| !c.is_control()).collect(),
    }
}

/// The reference as it may be shown.
fn named(reference: &Reference) -> String {
    match reference {
        Reference::Link(url) => redacted(url),
        Reference::Hub { repo, .. } => repo.clone(),
        Reference::CivitaiModel(id) | Reference::CivitaiVersion(id) => format!("civitai:{id}"),
        Reference::S3 { bucket, key } => format!("s3://{bucket}/{key}"),
        Reference::File(path) => path.display().to_string(),
        Reference::Data(_) => "data URI".into(),
    }
}

async fn blocking<R: Send + 'static>(work: impl FnOnce() -> Result<R, Error> + Send + 'static) -> Result<R, Error> {
    let panicked = |error| Err(Error::Own("the work on a file broke off", io::Error::other(error)));
    spawn_blocking(work).await.unwrap_or_else(panicked)
}
