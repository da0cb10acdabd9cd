//! Adapters on disk by the SHA-256 of their content. Several processes may share the folder.
//!
//! ```text
//! blobs/<digest>.safetensors   whole and checked; read locked while in use, so that nobody evicts it
//! sources/<key>.json           what a reference last gave
//! partial/<key>, <key>.json    a download that goes on where it stopped; <key>.lock: who does it
//! partial/unpacked...          what is taken out of an archive; locked meanwhile
//! ```

use std::fs::{self, File, FileTimes};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use crate::hex::hex;
use crate::replace::replace;

/// A download that nobody went on with for so long is dropped.
const STALE: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
    /// Whole and unfinished files together, in bytes; what is in use may exceed it.
    bound: u64,
}

/// What a reference gave last time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    /// What its source calls this state: an ETag, a commit.
    pub(super) version: Option<String>,
    pub(super) digest: String,
}

/// A file that stays as long as this lives.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) path: PathBuf,
    pub(super) digest: String,
    _lock: File,
}

impl Cache {
    pub(super) fn open(folder: PathBuf, bound: u64) -> Result<Self, Error> {
        for part in ["blobs", "sources", "partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(Error::write(&path))?;
        }
        let cache = Self { folder, bound };
        cache.drop_stale();
        Ok(cache)
    }

    pub(super) fn record(&self, key: &str) -> Option<Record> {
        read_json(&self.source(key))
    }

    pub(super) fn set_record(&self, key: &str, record: &Record) -> Result<(), Error> {
        write_json(&self.source(key), record)
    }

    /// The blob of this digest, if it is there and whole enough to be opened; counts as used now.
    pub(super) fn hold(&self, digest: &str) -> Option<Held> {
        let path = self.blob(digest);
        let lock = File::options().read(true).write(true).open(&path).ok()?;
        lock.try_lock_shared().ok()?;
        // Between open and lock another process may have evicted it.
        if !path.exists() {
            return None;
        }
        // Only the order of eviction depends on this.
        let _ = lock.set_times(FileTimes::new().set_modified(SystemTime::now()));
        Some(Held { path, digest: digest.into(), _lock: lock })
    }

    /// Makes a complete file the blob of `digest`, then makes room.
    pub(super) fn promote(&self, file: &Path, digest: &str) -> Result<Held, Error> {
        let path = self.blob(digest);
        let write = |source| Error::Write { path: path.clone(), source };
        File::open(file).and_then(|file| file.sync_all()).map_err(write)?;
        fs::rename(file, &path).map_err(write)?;
        // The new name is durable once its folder is.
        File::open(self.folder.join("blobs")).and_then(|folder| folder.sync_all()).map_err(write)?;
        let held = self.hold(digest).ok_or_else(|| write(io::Error::other("it was removed at once")))?;
        self.make_room();
        Ok(held)
    }

    /// When each was used last, its size and place, in this order.
    pub(super) fn blobs(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let mut blobs = self.files("blobs");
        blobs.sort();
        blobs
    }

    fn files(&self, part: &str) -> Vec<(SystemTime, u64, PathBuf)> {
        let entries = fs::read_dir(self.folder.join(part)).into_iter().flatten();
        let files = entries.filter_map(|entry| {
            let entry = entry.ok()?;
            let data = entry.metadata().ok()?;
            Some((data.modified().ok()?, data.len(), entry.path()))
        });
        files.collect()
    }

    /// Least recently used first, whole or not, and before them what does not fit at all; what somebody holds stays.
    pub(super) fn make_room(&self) {
        let mut files = self.files("blobs");
        // Locks, notes and files that become notes have a dot in their names. They are small, and go with their downloads or their age.
        let large = |path: &Path| path.file_name().is_some_and(|name| !name.to_string_lossy().contains('.'));
        files.extend(self.files("partial").into_iter().filter(|(.., path)| large(path)));
        files.sort_by_key(|(used, bytes, _)| (*bytes <= self.bound, *used));
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if total <= self.bound {
                break;
            }
            if remove_unused(&path) {
                tracing::debug!(path = %path.display(), "evicted");
                total -= bytes;
            }
        }
    }

    fn drop_stale(&self) {
        let Ok(entries) = fs::read_dir(self.folder.join("partial")) else { return };
        for entry in entries.flatten() {
            let age = entry.metadata().and_then(|data| data.modified()).map(|time| time.elapsed().unwrap_or_default());
            let unused = |path: &Path| File::open(path).map_or(true, |file| file.try_lock().is_ok());
            // Whoever downloads holds the lock beside it.
            let path = entry.path();
            if age.is_ok_and(|age| age > STALE) && unused(&path.with_extension("lock")) && unused(&path) {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{digest}.safetensors"))
    }

    fn source(&self, key: &str) -> PathBuf {
        self.folder.join("sources").join(format!("{key}.json"))
    }

    /// Where the download of `key` is made. Its folder is also the one for other temporary files.
    pub(super) fn partial(&self, key: &str) -> PathBuf {
        self.folder.join("partial").join(key)
    }

    /// Refuses to begin what the disk cannot hold.
    pub(super) fn reserve(&self, need: u64) -> Result<(), Error> {
        // Databases and pictures may live on the same disk.
        const MARGIN: u64 = 64 << 20;
        let have = fs4::available_space(&self.folder).unwrap_or(u64::MAX);
        let full = Error::DiskFull { folder: self.folder.clone(), need, have };
        if have < need.saturating_add(MARGIN) { Err(full) } else { Ok(()) }
    }
}

/// Removes a blob that nobody holds, or an unfinished download that nobody goes on with.
pub(super) fn remove_unused(path: &Path) -> bool {
    // Whoever downloads holds a file beside it.
    let beside = File::open(path.with_extension("lock"));
    if beside.as_ref().is_ok_and(|lock| lock.try_lock().is_err()) {
        return false;
    }
    let removed = File::options().read(true).write(true).open(path).is_ok_and(|file| {
        // The lock ends with the file, after the name is gone.
        file.try_lock().is_ok() && fs::remove_file(path).is_ok()
    });
    if removed {
        let _ = fs::remove_file(path.with_extension("json"));
    }
    removed
}

/// SHA-256 of a file.
pub(super) fn digest(path: &Path) -> io::Result<String> {
    let (mut file, mut hasher, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// A name for a text: no reference may choose a path.
pub(super) fn key(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hex(&hasher.finalize())
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whole or not at all.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    serde_json::to_vec(value).map_err(io::Error::from).and_then(|text| replace(path, &text)).map_err(Error::write(path))
}

/// The first bytes of a file, at most `length`.
pub(super) fn head(path: &Path, length: usize) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(length);
    File::open(path)?.take(length as u64).read_to_end(&mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(cache: &Cache, name: &str, bytes: usize) -> Held {
        let file = cache.partial(name);
        fs::write(&file, vec![7; bytes]).unwrap();
        cache.promote(&file, name).unwrap()
    }

    #[test]
    fn the_least_recently_used_goes_and_what_is_held_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("loras"), 250).unwrap();
        let mut held = vec![put(&cache, "a", 100), put(&cache, "b", 100)];
        let old = SystemTime::now() - Duration::from_secs(60);
        for digest in ["a", "b"] {
            File::options().write(true).open(cache.blob(digest)).unwrap().set_modified(old).unwrap();
        }
        drop(held.pop());
        drop(put(&cache, "c", 100));
        assert!(cache.hold("b").is_none(), "b was not in use");
        assert!(cache.hold("a").is_some() && cache.hold("c").is_some());
        drop(held);
        drop(put(&cache, "d", 200));
        assert!(cache.hold("a").is_none() && cache.hold("d").is_some());
    }

    #[test]
    fn a_thousand_adapters_through_a_small_cache() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().into(), 5000).unwrap();
        for i in 0..1000 {
            drop(put(&cache, &format!("{i:04}"), 100));
        }
        let left: u64 = fs::read_dir(folder.path().join("blobs")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(left <= 5000, "{left}");
        assert_eq!(fs::read_dir(folder.path().join("partial")).unwrap().count(), 0);
    }

    /// What nobody goes on with counts and goes; what somebody downloads or unpacks stays.
    #[test]
    fn unfinished_downloads_are_within_the_bound() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().into(), 250).unwrap();
        let begin = |name: &str, bytes: usize, age: u64| {
            let file = cache.partial(name);
            fs::write(&file, vec![7; bytes]).unwrap();
            fs::write(file.with_extension("json"), b"{}").unwrap();
            let used = SystemTime::now() - Duration::from_secs(age);
            File::options().write(true).open(&file).unwrap().set_modified(used).unwrap();
            file
        };
        let held = begin("held", 100, 90);
        let lock = File::create(held.with_extension("lock")).unwrap();
        lock.try_lock().unwrap();
        let unpacked = begin("unpacked", 50, 80);
        let open = File::open(&unpacked).unwrap();
        open.try_lock_shared().unwrap();
        let old = begin("old", 40, 70);
        drop(put(&cache, "whole", 30));
        let new = begin("new", 60, 10);
        // More than all together may have: it goes first, although it is the newest.
        let huge = begin("huge", 300, 0);
        cache.make_room();
        assert!(!huge.exists() && !old.exists() && held.exists() && unpacked.exists() && new.exists());
        assert!(!old.with_extension("json").exists() && new.with_extension("json").exists(), "notes go with their files");
        assert!(cache.hold("whole").is_some());
        // Once they are left, they go like all else.
        drop((lock, open));
        drop(put(&cache, "next", 160));
        assert!(!held.exists() && !unpacked.exists() && new.exists() && cache.hold("whole").is_some());
    }

    /// What is old goes when the cache is opened, but no download that somebody goes on with, and no lock that is held.
    #[test]
    fn old_downloads_that_go_on_stay() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().into(), 1000).unwrap();
        let old =
            |path: &Path| File::options().write(true).open(path).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
        let [held, left] = ["held", "left"].map(|name| {
            let file = cache.partial(name);
            fs::write(&file, b"begun").unwrap();
            fs::write(file.with_extension("lock"), b"").unwrap();
            file
        });
        let lock = File::open(held.with_extension("lock")).unwrap();
        lock.try_lock().unwrap();
        for file in [&held, &left] {
            old(file);
            old(&file.with_extension("lock"));
        }
        Cache::open(folder.path().into(), 1000).unwrap();
        assert!(held.exists() && held.with_extension("lock").exists() && !left.exists() && !left.with_extension("lock").exists());
    }

    #[test]
    fn records_and_keys() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().into(), 1).unwrap();
        let k = key(&["../../etc/passwd", "x"]);
        assert!(k.len() == 64 && k != key(&["../../etc/passwdx", ""]));
        assert!(cache.record(&k).is_none());
        cache.set_record(&k, &Record { version: Some("v".into()), digest: "d".into() }).unwrap();
        assert_eq!(cache.record(&k).unwrap().digest, "d");
        assert!(matches!(cache.reserve(u64::MAX / 2), Err(Error::DiskFull { .. })));
        cache.reserve(1).unwrap();
    }
}
