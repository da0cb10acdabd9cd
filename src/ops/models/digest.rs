//! SHA-256 of files, and of a model as a whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use models::bundle::{Blob, Bundle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::hub;
use crate::hex::hex;
use crate::replace::replace;

const CHUNK_BYTES: usize = 1 << 20;

/// The digest of a file's content. `told` hears how many bytes were read, and may stop it with `false`.
pub(super) fn of_file(path: &Path, told: &mut dyn FnMut(u64) -> bool) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut hasher, mut chunk, mut done) = (Sha256::new(), vec![0; CHUNK_BYTES], 0);
    loop {
        let read = file.read(&mut chunk)?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&chunk[..read]);
        done += read as u64;
        if !told(done) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
}

/// The digest of a model: that of its weight file if there is one, else that of the digests of all weight files, one to a
/// line, in the order transformer, T5, CLIP, autoencoder. Digests are kept in `cache` and taken from the hub's blob names,
/// so that tens of gigabytes are read at most once.
pub(in crate::ops) fn of_model(bundle: &Bundle, cache: Option<&Path>) -> io::Result<String> {
    let mut known = Known::open(cache);
    let components = [&bundle.transformer, &bundle.t5, &bundle.clip, &bundle.vae];
    let mut seen: Vec<PathBuf> = Vec::new();
    let mut digests = Vec::new();
    for blob in components.into_iter().flat_map(|files| &files.weights) {
        // One file may hold several components.
        if seen.contains(&blob.path()) {
            continue;
        }
        seen.push(blob.path());
        digests.push(match blob {
            Blob::Embedded { bytes, .. } => hex(&Sha256::digest(bytes)),
            Blob::File(path) => match hub::stated_sha256(path) {
                Some(digest) => digest,
                None => known.digest(path)?,
            },
        });
    }
    known.save();
    match digests.as_slice() {
        [one] => Ok(one.clone()),
        many => Ok(hex(&Sha256::digest(many.join("\n")))),
    }
}

/// Digests of files that have not changed since they were read.
struct Known {
    file: Option<PathBuf>,
    entries: BTreeMap<PathBuf, Entry>,
    changed: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
    sha256: String,
}

impl Known {
    /// A cache that cannot be read is an empty one.
    fn open(cache: Option<&Path>) -> Self {
        let file = cache.map(|cache| cache.join("digests.json"));
        let text = file.as_ref().and_then(|file| fs::read(file).ok());
        let entries = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, entries, changed: false }
    }

    fn digest(&mut self, path: &Path) -> io::Result<String> {
        let path = fs::canonicalize(path)?;
        let meta = fs::metadata(&path)?;
        let modified = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        if let Some(entry) = self.entries.get(&path)
            && (entry.bytes, entry.modified) == (meta.len(), modified)
        {
            return Ok(entry.sha256.clone());
        }
        let sha256 = of_file(&path, &mut |_| true)?;
        self.entries.insert(path, Entry { bytes: meta.len(), modified, sha256: sha256.clone() });
        self.changed = true;
        Ok(sha256)
    }

    /// Another process may write at the same time. If it fails the digest is computed again.
    fn save(&self) {
        let Some(file) = self.file.as_ref().filter(|_| self.changed) else { return };
        let text = serde_json::to_vec_pretty(&self.entries).map_err(io::Error::from);
        if let Err(error) = text.and_then(|text| replace(file, &text)) {
            tracing::warn!(%error, file = %file.display(), "digests are not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn files_have_the_digest_of_their_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, b"abc").unwrap();
        assert_eq!(of_file(&path, &mut |_| true).unwrap(), ABC);
        assert!(of_file(&path, &mut |_| false).is_err());
    }

    #[test]
    fn a_digest_is_kept_until_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, b"abc").unwrap();
        let mut known = Known::open(Some(folder.path()));
        assert_eq!(known.digest(&path).unwrap(), ABC);
        known.save();
        let mut again = Known::open(Some(folder.path()));
        // Proves that the kept one is used.
        again.entries.values_mut().for_each(|entry| entry.sha256 = "kept".into());
        assert_eq!(again.digest(&path).unwrap(), "kept");
        fs::write(&path, b"abcd").unwrap();
        assert_ne!(again.digest(&path).unwrap(), "kept");
    }
}
