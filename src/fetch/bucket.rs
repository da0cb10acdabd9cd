//! Objects of S3 and what speaks like it, with the operator's credentials.

use futures_util::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path as Key;
use object_store::{Error as StoreError, GetOptions, ObjectStore, RetryConfig};
use tokio::time::timeout;

use super::cache::Cache;
use super::download::{Outcome, Partial, Writer};
use super::{Error, Limits, Progress};
use crate::config::Secret;

/// Which object, and how to reach it: pairs such as `AWS_REGION` and its value.
pub(super) struct Object<'a> {
    pub(super) bucket: &'a str,
    pub(super) key: &'a str,
    pub(super) settings: &'a [(String, Secret)],
}

impl Object<'_> {
    fn what(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.key)
    }

    /// The store's errors without their text, which may hold a signed request.
    fn explain(&self, error: &StoreError) -> Error {
        let what = self.what();
        let text = error.to_string();
        match error {
            StoreError::NotFound { .. } => Error::NotFound { what, hint: "check bucket, key and AWS_REGION".into() },
            StoreError::Unauthenticated { .. } | StoreError::PermissionDenied { .. } => Error::Unauthorized {
                what,
                hint: "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and this machine's clock".into(),
            },
            _ if text.contains("169.254.169.254") || text.contains("redential") => Error::Unauthorized {
                what,
                hint: "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".into(),
            },
            _ => Error::Store { what, why: "check AWS_ENDPOINT_URL, AWS_REGION and the network".into() },
        }
    }

    pub(super) async fn download(
        &self,
        limits: &Limits,
        cache: &Cache,
        partial: &Partial,
        known: Option<&str>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Outcome, Error> {
        let retry =
            RetryConfig { max_retries: limits.attempts as usize, retry_timeout: limits.headers, ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new().with_bucket_name(self.bucket).with_retry(retry);
        for (name, value) in self.settings {
            if let Ok(name) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(name, value.reveal());
            }
        }
        let explain = |error: StoreError| self.explain(&error);
        let store = builder.build().map_err(explain)?;
        let options = GetOptions { if_none_match: known.map(str::to_owned), ..GetOptions::default() };
        let found = match store.get_opts(&Key::from(self.key), options).await {
            Err(StoreError::NotModified { .. }) if known.is_some() => return Ok(Outcome::Unchanged),
            found => found.map_err(explain)?,
        };
        let (total, etag) = (found.meta.size, found.meta.e_tag.clone());
        if total > limits.bytes {
            return Err(Error::TooLarge(limits.bytes));
        }
        cache.reserve(total)?;
        let writer = Writer::start(partial, 0);
        let (mut stream, mut done) = (found.into_stream(), 0);
        let stalled = || Error::Stalled { host: self.what(), seconds: limits.stall.as_secs() };
        while let Some(chunk) = timeout(limits.stall, stream.next()).await.map_err(|_| stalled())? {
            let chunk = chunk.map_err(explain)?;
            done += chunk.len() as u64;
            progress(Progress { done, total: Some(total) });
            if !writer.put(chunk).await {
                break;
            }
        }
        let (written, sha256) = writer.finish().await?;
        if written == total { Ok(Outcome::Whole { etag, sha256 }) } else { Err(Error::Broken(self.what())) }
    }
}
