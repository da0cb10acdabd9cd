//! Getting an adapter's file from where a user says it is. Knows nothing of models.
//!
//! ```text
//! Reference ─ locate ─ client (guard at every hop) ─ download ─ sniff, archive ─ cache ─ Fetched
//! ```
//!
//! Whatever a reference says, no private address is reached, nothing local is read but a path that the user gave, and what arrives is
//! neither larger than the limit nor kept before it is whole. Credentials go to the service that they are for and nowhere else.

mod address;
mod archive;
mod bucket;
mod cache;
mod client;
mod data;
mod download;
mod error;
mod fetcher;
mod guard;
mod local;
mod locate;
mod peft;
mod reference;
mod sniff;
mod web;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempPath;

use crate::config::Secret;

pub use archive::{Member, extract, extract_file};
pub use data::decode_picture;
pub use error::Error;
pub use fetcher::{Fetcher, shown};
pub use local::local;
pub use reference::Reference;
pub use web::{Web, shown_link};

/// A file in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// SHA-256.
    pub digest: String,
    pub bytes: u64,
    pub used: std::time::SystemTime,
}

/// The cache of fetched adapters in a folder, as its operator sees it: what is in it and how large it is, not where it came from.
#[derive(Debug, Clone)]
pub struct CacheView(cache::Cache);

impl CacheView {
    pub fn open(folder: PathBuf, bound: u64) -> Result<Self, Error> {
        cache::Cache::open(folder, bound).map(Self)
    }

    /// Least recently used first.
    #[must_use]
    pub fn list(&self) -> Vec<Cached> {
        let digest = |path: &Path| path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        self.0.blobs().into_iter().map(|(used, bytes, path)| Cached { digest: digest(&path), bytes, used }).collect()
    }

    /// `None` if there is no such file, `false` if it is in use.
    #[must_use]
    pub fn remove(&self, digest: &str) -> Option<bool> {
        let (.., path) = self.0.blobs().into_iter().find(|(.., path)| path.file_stem().is_some_and(|name| name == digest))?;
        Some(cache::remove_unused(&path))
    }
}

/// Whether a file of this name, in any folder, is one of weights. macOS puts a `._name` beside a file, which holds none of it.
fn names_weights(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.to_ascii_lowercase().ends_with(".safetensors") && !file.starts_with("._")
}

/// How far a download is, in bytes. `total` is what the server announces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub done: u64,
    pub total: Option<u64>,
}

/// What one asks as. Of one user or one operator: never of two at once.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    pub hub: Option<Secret>,
    pub civitai: Option<Secret>,
}

/// How much, how long and how often.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest file, in bytes.
    pub bytes: u64,
    pub connect: Duration,
    /// Until an answer begins.
    pub headers: Duration,
    /// Between two pieces of a body. There is no limit for the whole, which would cut large files on slow lines.
    pub stall: Duration,
    /// Attempts in a row that bring nothing.
    pub attempts: u32,
    /// Before the second attempt; doubled each time.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: MOST_BYTES,
            connect: Duration::from_secs(15),
            headers: Duration::from_secs(120),
            stall: Duration::from_secs(60),
            attempts: 4,
            pause: Duration::from_millis(500),
        }
    }
}

/// Larger than any adapter of FLUX.1, in bytes.
const MOST_BYTES: u64 = 4 << 30;

/// What the operator has set.
#[derive(Debug, Clone)]
pub struct Options {
    pub cache: PathBuf,
    /// Bound of the cache, in bytes.
    pub cache_bytes: u64,
    /// The hub's address.
    pub hub: String,
    /// CivitAI's address.
    pub civitai: String,
    /// Nothing is fetched; what the cache has is used.
    pub offline: bool,
    /// Links may lead into one's own network, and be http.
    pub private: bool,
    /// `AWS_...` and their values.
    pub store: Vec<(String, Secret)>,
    pub limits: Limits,
}

/// A safetensors file on this machine, which stays there as long as this lives.
#[derive(Debug, Clone)]
pub struct Fetched {
    path: PathBuf,
    digest: Option<String>,
    /// Keeps the file, or removes it at the end.
    _keep: Option<Arc<Keep>>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held for their Drop")]
enum Keep {
    Cached(cache::Held),
    Temporary(TempPath),
}

impl Fetched {
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The SHA-256 of what was fetched, in hexadecimal; `None` for a user's own file.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Whether content of this SHA-256 is what was fetched. True of a user's own file.
    #[must_use]
    pub fn is(&self, digest: &str) -> bool {
        self.digest.as_ref().is_none_or(|own| own == digest)
    }

    /// Reads the file to see whether the disk still holds what was fetched.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.digest.is_none() || cache::digest(&self.path).is_ok_and(|digest| self.is(&digest))
    }

    /// Removes a fetched file of no use from the cache, so that it is fetched anew when asked for again. A user's own file stays.
    pub fn forget(&self) {
        if self.digest.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// A file that goes when this does, with what `fill` writes into it.
    pub fn temporary(fill: impl FnOnce(&mut File) -> Result<(), Error>) -> Result<Self, Error> {
        let write = |source| Error::Write { path: std::env::temp_dir(), source };
        let mut file = tempfile::Builder::new().suffix(".safetensors").tempfile().map_err(write)?;
        fill(file.as_file_mut())?;
        let path = file.into_temp_path();
        Ok(Self { path: path.to_path_buf(), digest: None, _keep: Some(Arc::new(Keep::Temporary(path))) })
    }

    fn cached(held: cache::Held) -> Self {
        Self { path: held.path.clone(), digest: Some(held.digest.clone()), _keep: Some(Arc::new(Keep::Cached(held))) }
    }
}
