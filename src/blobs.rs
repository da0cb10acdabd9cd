//! Where pictures and uploads are: a folder of this machine, or a bucket that several machines share.
//!
//! Keys are made by us alone, such as `outputs/JOB/out-0.webp`; nothing of a request gets into one.

use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt};

use crate::config::Secret;

/// Where our keys begin. Whoever names the folder may have others in it.
const FOLDERS: [&str; 3] = ["outputs", "previews", "uploads"];

/// Writers take seconds: what one has not touched for so long it left.
const LEFT: Duration = Duration::from_secs(24 * 3600);

/// Why a picture or an upload could not be kept or had. Without the store's own text, which may hold a signed request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the storage {0:?} is neither a folder nor s3://bucket or s3://bucket/prefix")]
    Address(String),
    #[error("the storage cannot be opened; check the folder, or the bucket, AWS_REGION and AWS_ENDPOINT_URL")]
    Open,
    #[error("the storage has no room or does not answer ({0})")]
    Failed(&'static str),
}

/// The pictures and uploads of a service. Clones share it.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    /// On this machine. In a bucket there are no folders.
    root: Option<PathBuf>,
}

impl Blobs {
    /// A folder, which is made, or `s3://bucket/prefix` with these settings, such as `AWS_REGION`.
    pub fn open(address: &str, settings: &[(String, Secret)]) -> Result<Self, Error> {
        let store: Arc<dyn ObjectStore> = match address.split_once("://") {
            Some(("s3", place)) => {
                let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
                if bucket.is_empty() {
                    return Err(Error::Address(address.into()));
                }
                let mut builder = AmazonS3Builder::new().with_bucket_name(bucket);
                for (name, value) in settings {
                    if let Ok(name) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                        builder = builder.with_config(name, value.reveal());
                    }
                }
                Arc::new(PrefixStore::new(builder.build().map_err(|_| Error::Open)?, prefix.trim_matches('/')))
            }
            Some(_) => return Err(Error::Address(address.into())),
            None => {
                std::fs::create_dir_all(Path::new(address)).map_err(|_| Error::Open)?;
                // Told to a client is on the disk.
                Arc::new(LocalFileSystem::new_with_prefix(address).map_err(|_| Error::Open)?.with_fsync(true))
            }
        };
        let root = (!address.contains("://")).then(|| PathBuf::from(address));
        Ok(Self { store, root })
    }

    /// Keeps `bytes` under `key`, all or nothing, in the place of what was there.
    pub async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.store.put(&Key::from(key), Bytes::from(bytes).into()).await.map(drop).map_err(|error| failed(&error))
    }

    /// What is under `key`.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        match self.store.get(&Key::from(key)).await {
            Ok(found) => found.bytes().await.map(Some).map_err(|error| failed(&error)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Removes `folder`, such as `outputs/JOB`, and what is in it. The store could remove empty folders itself, but would not stop at
    /// `outputs`.
    pub async fn remove(&self, folder: &str) -> Result<(), Error> {
        let below = self.store.list_with_delimiter(Some(&Key::from(folder))).await.map_err(|error| failed(&error))?;
        for object in below.objects {
            self.delete(object.location.as_ref()).await?;
        }
        if let Some(root) = &self.root {
            // One that is not empty, or not there, is left.
            let _ = std::fs::remove_dir(root.join(folder));
        }
        Ok(())
    }

    /// Removes what is under `key`, if there is anything.
    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        match self.store.delete(&Key::from(key)).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Removes what writers that were killed left beside their keys. In a bucket there is nothing of that kind.
    pub fn sweep(&self) {
        for folder in self.root.iter().flat_map(|root| FOLDERS.map(|folder| root.join(folder))) {
            sweep(&folder);
        }
    }
}

/// In a folder and those in it. Whether there was anything.
fn sweep(folder: &Path) -> bool {
    let mut swept = false;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if sweep(&path) {
                // One that is not empty is left.
                let _ = std::fs::remove_dir(path);
            }
        } else if is_left(&entry) {
            swept |= std::fs::remove_file(path).is_ok();
        }
    }
    swept
}

/// The store writes to `KEY#1`, or the next that is free, and renames that; it never lists them.
fn is_left(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let number = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, number)| number);
    let age = || entry.metadata().and_then(|about| about.modified()).map(|time| time.elapsed().unwrap_or_default());
    number.is_some_and(|number| number.parse::<u32>().is_ok()) && age().is_ok_and(|age| age > LEFT)
}

fn failed(error: &StoreError) -> Error {
    Error::Failed(match error {
        StoreError::Unauthenticated { .. } | StoreError::PermissionDenied { .. } => "no permission",
        StoreError::NotFound { .. } => "not there",
        _ => "it failed",
    })
}

#[cfg(test)]
impl Blobs {
    /// A bucket that hears everything and answers nothing, while the listener is there.
    pub(crate) fn silent() -> (Self, std::net::TcpListener) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("its address"));
        let settings = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), Secret::new(value)));
        (Self::open("s3://bucket", &settings).expect("its settings"), listener)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn what_killed_writers_left_goes_and_what_is_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().to_str().unwrap(), &[]).unwrap();
        let write = |key: &str, age: Duration| {
            let path = folder.path().join(key);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            File::create(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
            path
        };
        let left =
            ["outputs/a/0.png#1", "outputs/b/0.png#12", "previews/a.webp#1", "uploads/a#2"].map(|key| write(key, 2 * LEFT));
        let kept = ["outputs/a/0.png", "outputs/c/x#y", "uploads/b", "others/a#1"].map(|key| write(key, 2 * LEFT));
        let written = ["outputs/d/0.png#1", "uploads/a#1"].map(|key| write(key, LEFT / 2));
        blobs.sweep();
        assert!(left.iter().all(|path| !path.exists()));
        assert!(kept.iter().chain(&written).all(|path| path.exists()));
        assert!(!folder.path().join("outputs/b").exists(), "nothing else was in it");
        assert!(folder.path().join("previews").exists(), "the folder of all stays");
    }

    #[tokio::test]
    async fn what_is_kept_is_there_until_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("new").to_str().unwrap(), &[]).unwrap();
        assert_eq!(blobs.get("outputs/a/0.png").await.unwrap(), None);
        blobs.put("outputs/a/0.png", vec![1, 2]).await.unwrap();
        blobs.put("outputs/a/0.png", vec![3]).await.unwrap();
        blobs.put("outputs/b/0.png", vec![4]).await.unwrap();
        assert_eq!(blobs.get("outputs/a/0.png").await.unwrap().unwrap().as_ref(), [3]);
        blobs.remove("outputs/a").await.unwrap();
        blobs.delete("uploads/none").await.unwrap();
        assert_eq!(blobs.get("outputs/a/0.png").await.unwrap(), None);
        assert!(blobs.get("outputs/b/0.png").await.unwrap().is_some());
        let outputs = folder.path().join("new/outputs");
        assert!(!outputs.join("a").exists() && outputs.join("b").exists(), "no empty folders are left");
        blobs.remove("outputs/b").await.unwrap();
        blobs.remove("outputs/none").await.unwrap();
        assert_eq!(std::fs::read_dir(&outputs).unwrap().count(), 0, "the folder of all stays");
        for wrong in ["gs://x", "s3://", "https://bucket"] {
            assert!(matches!(Blobs::open(wrong, &[]), Err(Error::Address(_))), "{wrong}");
        }
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(matches!(Blobs::open(file.to_str().unwrap(), &[]), Err(Error::Open)));
    }
}
