//! Fetching a model from the hub into the hub's own cache.
//!
//! hf-hub transfers and lays out the files. It does not look at the status, length or digest of what arrives, nor at the
//! free disk, so that is done here: sizes are asked for first, every file is compared afterwards, and a wrong one is thrown
//! away. A broken download of a plain file begins anew; chunked (Xet) transfers keep what they have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFClientSync, HFError};
use serde::Serialize;

use super::store::{Found, compare, locate};
use super::{Card, Error, File, hub, store};
use crate::config::{Config, Hub};

/// A connection that sends nothing for so long is dead. There is no limit on the whole download.
const STALLED: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(30);

/// A body that breaks off is asked for anew this often.
const ATTEMPTS: usize = 3;

/// Another process that fetches the same file holds its lock; it is looked at again after this time.
const LOCKED_PAUSE: Duration = Duration::from_secs(2);

/// Room that stays free beside the model: logs, the digest cache, other programs.
const SPARE_BYTES: u64 = 256 << 20;

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pulling {
    /// A file begins: the `index`-th (from 1) of `count` to fetch.
    File { name: String, bytes: u64, index: usize, count: usize },
    /// Bytes of it that have arrived.
    Arrived(u64),
    /// Its digest is compared; bytes read so far.
    Checking(u64),
    /// Another process is fetching it.
    Waiting,
}

/// A pulled model.
#[derive(Debug, Clone, Serialize)]
pub struct Pulled {
    pub name: String,
    /// Files that were fetched now, and those that were there.
    pub fetched: usize,
    pub present: usize,
    pub bytes: u64,
}

/// Hears of progress, from other threads too.
pub type Watcher = Arc<dyn Fn(Pulling) + Send + Sync>;

/// Fetches every file of a card that is not here, and checks it.
pub fn pull(name: &str, config: &Config, told: &Watcher) -> Result<Pulled, Error> {
    let card = store::card(name)?;
    if card.embedded {
        return Err(Error::Embedded { name: card.name, action: "pulled" });
    }
    let wanted: Vec<(&str, &File)> = card.hub_files().filter(|(_, file)| locate(&card, file, config).is_none()).collect();
    let present = card.files.len() - wanted.len();
    if wanted.is_empty() {
        return Ok(Pulled { name: card.name.clone(), fetched: 0, present, bytes: 0 });
    }
    if config.hub.offline {
        return Err(Error::Offline { name: card.name.clone(), missing: wanted.len() });
    }
    let fetcher = Fetcher { card: &card, hub: &config.hub, client: client(&config.hub)?, told };
    let sizes = fetcher.sizes(&wanted)?;
    let need: u64 = wanted.iter().filter_map(|(repo, file)| sizes.get(&(*repo, file.path.as_str()))).sum();
    check_disk(&config.hub.cache, need)?;
    for (i, (repo, file)) in wanted.iter().enumerate() {
        let bytes = sizes[&(*repo, file.path.as_str())];
        told(Pulling::File { name: format!("{repo}/{}", file.path), bytes, index: i + 1, count: wanted.len() });
        fetcher.fetch(repo, file, bytes)?;
    }
    Ok(Pulled { name: card.name.clone(), fetched: wanted.len(), present, bytes: need })
}

/// Fails if the disk under `folder` has no room for `need` bytes.
fn check_disk(folder: &Path, need: u64) -> Result<(), Error> {
    let there = folder.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("."));
    let unknown = |source| Error::Read { path: there.into(), source };
    let have = fs4::available_space(there).map_err(unknown)?;
    let need = need.saturating_add(SPARE_BYTES);
    if need > have { Err(Error::DiskFull { folder: folder.into(), need, have }) } else { Ok(()) }
}

fn client(hub: &Hub) -> Result<HFClientSync, Error> {
    let agent = concat!("darkroom/", env!("CARGO_PKG_VERSION"));
    let http = reqwest::Client::builder().user_agent(agent).connect_timeout(CONNECT).read_timeout(STALLED).build();
    let http = http.map_err(|source| Error::Client { endpoint: hub.endpoint.clone(), source: Box::new(source) })?;
    let mut builder = HFClient::builder().endpoint(&hub.endpoint).cache_dir(&hub.cache).client(http).user_agent(agent);
    if let Some(token) = &hub.token {
        builder = builder.token(token.reveal());
    }
    builder.build_sync().map_err(|source| Error::Client { endpoint: hub.endpoint.clone(), source: Box::new(source) })
}

struct Fetcher<'a> {
    card: &'a Card,
    hub: &'a Hub,
    client: HFClientSync,
    told: &'a Watcher,
}

impl<'a> Fetcher<'a> {
    /// The size of each wanted file, as the hub states it. Where the card states it too, they must agree.
    fn sizes(&self, wanted: &[(&'a str, &'a File)]) -> Result<BTreeMap<(&'a str, &'a str), u64>, Error> {
        let mut by_repo: BTreeMap<&str, Vec<&File>> = BTreeMap::new();
        for (repo, file) in wanted {
            by_repo.entry(repo).or_default().push(file);
        }
        let mut sizes = BTreeMap::new();
        for (repo, files) in by_repo {
            let (owner, name) = hf_hub::split_id(repo);
            let paths = files.iter().map(|file| file.path.clone()).collect();
            let entries = self.client.model(owner, name).get_paths_info().paths(paths).revision(hub::REVISION).send();
            let entries = entries.map_err(|error| self.explain(repo, "", error))?;
            for file in files {
                let stated = entries.iter().find_map(|entry| match entry {
                    RepoTreeEntry::File { path, size, .. } if *path == file.path => Some(*size),
                    _ => None,
                });
                let size = stated.ok_or_else(|| Error::NotInRepo { repo: repo.into(), path: file.path.clone() })?;
                if let Some(expected) = file.bytes.filter(|expected| *expected != size) {
                    return Err(Error::Changed { repo: repo.into(), path: file.path.clone(), expected, found: size });
                }
                sizes.insert((repo, file.path.as_str()), size);
            }
        }
        Ok(sizes)
    }

    fn fetch(&self, repo: &str, file: &File, bytes: u64) -> Result<(), Error> {
        let mut attempt = 1;
        loop {
            match self.transfer(repo, file) {
                Ok(path) => match self.check(repo, file, &path, bytes) {
                    Err(Error::Wrong { .. }) if attempt < ATTEMPTS => attempt += 1,
                    result => return result,
                },
                Err(HFError::CacheLockTimeout { .. }) => {
                    (self.told)(Pulling::Waiting);
                    std::thread::sleep(LOCKED_PAUSE);
                }
                Err(HFError::Request { source, .. }) if attempt < ATTEMPTS && (source.is_body() || source.is_decode()) => {
                    attempt += 1
                }
                Err(error) => return Err(self.explain(repo, &file.path, error)),
            }
        }
    }

    fn transfer(&self, repo: &str, file: &File) -> Result<PathBuf, HFError> {
        let (owner, name) = hf_hub::split_id(repo);
        let progress = Arc::new(Arrivals(self.told.clone()));
        self.client.model(owner, name).download_file().filename(&file.path).revision(hub::REVISION).progress(progress).send()
    }

    /// Compares what arrived; throws it away if it is wrong.
    fn check(&self, repo: &str, file: &File, path: &Path, bytes: u64) -> Result<(), Error> {
        let found = compare(path, file, Some(bytes), &mut |_, done, _| (self.told)(Pulling::Checking(done)))?;
        if found.is_good() {
            return Ok(());
        }
        let removed = hub::evict(&self.hub.cache, repo, &file.path);
        removed.map_err(|source| Error::Remove { path: path.into(), source })?;
        let reason = match found {
            Found::WrongSize { expected, found } => format!("{found} bytes arrived of {expected}"),
            Found::WrongDigest { expected, found } => format!("its SHA-256 is {found}, but {expected} is published"),
            Found::Sound | Found::NoDigest | Found::Missing => "it is not there".into(),
        };
        Err(Error::Wrong { repo: repo.into(), path: file.path.clone(), reason })
    }

    /// An error of the hub in words that help. Its own text may hold signed addresses and is not shown.
    fn explain(&self, repo: &str, path: &str, error: HFError) -> Error {
        let (repo, page) = (repo.to_owned(), format!("{}/{repo}", self.hub.endpoint));
        let tokens = format!("{}/settings/tokens", self.hub.endpoint);
        let name = self.card.name.clone();
        match error {
            HFError::AuthRequired { .. } if self.hub.token.is_some() => Error::TokenRefused { repo, tokens },
            HFError::AuthRequired { .. } => Error::TokenNeeded { name, repo, page, tokens },
            HFError::Forbidden { .. } => Error::LicenceNotAccepted { name, repo, page, licence: self.card.licence.clone() },
            HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } | HFError::EntryNotFound { .. } => {
                Error::NotInRepo { repo, path: path.into() }
            }
            HFError::RateLimited { retry_after, .. } => {
                let seconds = retry_after.map_or_else(|| "some".into(), |wait| wait.as_secs().to_string());
                Error::Hub { repo, reason: format!("too many requests; try again in {seconds} seconds") }
            }
            HFError::Http { context } => Error::Hub { repo, reason: format!("the hub answered {}", context.status) },
            HFError::Request { source, .. } => {
                Error::Connection { endpoint: self.hub.endpoint.clone(), source: Box::new(source.without_url()) }
            }
            HFError::Io(source) => Error::Write { path: self.hub.cache.clone(), source },
            HFError::MalformedResponse { what, .. } => Error::Hub { repo, reason: format!("its answer is incomplete: {what}") },
            HFError::Xet { operation, .. } => {
                Error::Hub { repo, reason: format!("the chunked transfer broke off ({operation}); run it again") }
            }
            _ => Error::Hub { repo, reason: "the transfer failed; run it again".into() },
        }
    }
}

/// Passes on how much of the current file has arrived.
struct Arrivals(Watcher);

impl ProgressHandler for Arrivals {
    fn on_progress(&self, event: &ProgressEvent) {
        match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                if let Some(file) = files.last() {
                    (self.0)(Pulling::Arrived(file.bytes_completed));
                }
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                (self.0)(Pulling::Arrived(*bytes_completed));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_refused_before_anything_is_fetched() {
        let folder = tempfile::tempdir().unwrap();
        // Where the cache will be need not exist yet.
        let cache = folder.path().join("not/yet/there");
        check_disk(&cache, 1).unwrap();
        for need in [1 << 60, u64::MAX] {
            let error = check_disk(&cache, need).unwrap_err();
            assert!(matches!(error, Error::DiskFull { need: stated, have, .. } if stated >= need && have < stated), "{error}");
        }
        assert!(!cache.exists());
    }
}
