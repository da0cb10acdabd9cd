//! The hub's cache on disk, laid out as `huggingface_hub` does: `models--owner--name/{blobs,refs,snapshots}`, where a snapshot
//! is a tree of links to blobs and a blob's name is the hub's ETag: for large files the SHA-256 of the content.

use std::fs;
use std::path::{Path, PathBuf};

/// The revision that cards mean.
pub(super) const REVISION: &str = "main";

/// The folder of a repository.
pub(super) fn repo_folder(cache: &Path, repo: &str) -> PathBuf {
    cache.join(format!("models--{}", repo.replace('/', "--")))
}

/// Where a file of a repository is, if it is there: in the snapshot that `main` was last seen at, else in any other, since
/// the hub adds commits that change only texts.
pub(super) fn cached(cache: &Path, repo: &str, path: &str) -> Option<PathBuf> {
    let folder = repo_folder(cache, repo);
    let snapshots = folder.join("snapshots");
    let main = fs::read_to_string(folder.join("refs").join(REVISION)).ok();
    let main = main.map(|commit| snapshots.join(commit.trim()));
    let others = fs::read_dir(&snapshots).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    main.into_iter().chain(others).map(|snapshot| snapshot.join(path)).find(|file| file.is_file())
}

/// The blob behind a file of a snapshot. On systems without links that is the file itself.
pub(super) fn blob(file: &Path) -> PathBuf {
    fs::canonicalize(file).unwrap_or_else(|_| file.into())
}

/// The SHA-256 that the hub states for a file, if it is one of those that it keeps by content.
pub(super) fn stated_sha256(file: &Path) -> Option<String> {
    let name = blob(file).file_name()?.to_str()?.to_owned();
    is_sha256(&name).then_some(name)
}

pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Takes a file out of the cache: every link to its blob in the repository, the blob, and what a broken download left.
/// Returns the bytes that became free.
pub(super) fn evict(cache: &Path, repo: &str, path: &str) -> std::io::Result<u64> {
    let Some(file) = cached(cache, repo, path) else { return Ok(0) };
    let blob = blob(&file);
    let freed = fs::metadata(&blob)?.len();
    for snapshot in fs::read_dir(repo_folder(cache, repo).join("snapshots"))? {
        let snapshot = snapshot?.path();
        let link = snapshot.join(path);
        if fs::canonicalize(&link).is_ok_and(|target| target == blob) {
            fs::remove_file(&link)?;
            // Only empty folders go.
            let inside = link.ancestors().skip(1).take_while(|folder| folder.starts_with(&snapshot));
            let _ = inside.map(fs::remove_dir).take_while(Result::is_ok).count();
        }
    }
    for left in [blob.clone(), PathBuf::from(format!("{}.incomplete", blob.display()))] {
        match fs::remove_file(left) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(freed)
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_and_evicted_through_links() {
        let cache = tempfile::tempdir().unwrap();
        let folder = repo_folder(cache.path(), "a/b");
        let digest = "0".repeat(64);
        for part in ["blobs", "refs", "snapshots/c1/vae", "snapshots/c2"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        fs::write(folder.join("blobs").join(&digest), b"weights").unwrap();
        fs::write(folder.join("refs/main"), "c2").unwrap();
        std::os::unix::fs::symlink(format!("../../../blobs/{digest}"), folder.join("snapshots/c1/vae/x")).unwrap();

        assert_eq!(cached(cache.path(), "a/b", "y"), None);
        let file = cached(cache.path(), "a/b", "vae/x").expect("an older snapshot has it");
        assert_eq!(stated_sha256(&file), Some(digest.clone()));
        assert_eq!(evict(cache.path(), "a/b", "vae/x").unwrap(), 7);
        assert!(!folder.join("blobs").join(&digest).exists() && !folder.join("snapshots/c1").exists());
        assert_eq!(evict(cache.path(), "a/b", "vae/x").unwrap(), 0);
    }
}
