//! From what a user calls an adapter to the adapter.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use models::lora::{Adapter, Report};

use super::Lora;
use crate::config::Config;
use crate::engine::Selected;
use crate::fetch::{self, Credentials, Fetched, Fetcher, Limits, Options, Progress, Reference};
use crate::ops::Error;

const CIVITAI: &str = "https://civitai.com";

/// Where adapters come from, with this machine's credentials. Nothing is set up before something must be fetched.
#[derive(Debug)]
pub struct Sources {
    options: Option<Options>,
    /// This machine's; `None` where requests are strangers': theirs come with them.
    credentials: Option<Credentials>,
    fetcher: OnceLock<Fetcher>,
    /// Adapters that were read, the last used last: the same content is not read again.
    recent: Mutex<Vec<Arc<Adapter>>>,
}

/// A LoRA that came with the program: pocket's people, by name.
#[cfg(feature = "pocket")]
fn shipped(reference: &str) -> Option<&'static [u8]> {
    models::pocket::people::lora(reference.trim())
}

#[cfg(not(feature = "pocket"))]
fn shipped(_reference: &str) -> Option<&'static [u8]> {
    None
}

/// Refuses what a stranger may not ask for, or what nobody can have: files of this machine, and no reference at all.
pub fn check_foreign(reference: &str) -> Result<(), Error> {
    if shipped(reference).is_some() {
        return Ok(());
    }
    let failed = |error| Error::Fetch { reference: fetch::shown(reference), source: Arc::new(error) };
    Reference::foreign(reference).map(drop).map_err(failed)
}

/// Adapters that are kept in memory; hundreds of megabytes each at most.
const RECENT: usize = 8;

type Told<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

impl Sources {
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let options = config.cache.as_ref().map(|cache| Options {
            cache: cache.join("loras"),
            cache_bytes: config.lora_cache_bytes,
            hub: config.hub.endpoint.clone(),
            civitai: CIVITAI.into(),
            offline: config.hub.offline,
            private: config.private_urls,
            store: config.store.clone(),
            limits: Limits::default(),
        });
        let credentials = Credentials { hub: config.hub.token.clone(), civitai: config.civitai_token.clone() };
        Self { options, credentials: Some(credentials), fetcher: OnceLock::new(), recent: Mutex::default() }
    }

    /// For requests of others: no local files, no bucket, and none of this machine's credentials.
    #[must_use]
    pub fn for_strangers(config: &Config) -> Self {
        Self { credentials: None, ..Self::new(config) }
    }

    /// Fetches, reads and checks all adapters, each once. `told` hears of downloads and may stop them.
    pub fn open(&self, loras: &[Lora], told: Told) -> Result<Vec<Selected>, Error> {
        self.open_as(loras, &Credentials::default(), told)
    }

    /// As [`Self::open`], for one who has these credentials.
    pub fn open_as(&self, loras: &[Lora], sent: &Credentials, told: Told) -> Result<Vec<Selected>, Error> {
        let mut opened: Vec<(&str, Arc<Adapter>)> = Vec::new();
        let mut selected = Vec::new();
        for Lora { reference, scales } in loras {
            let known = opened.iter().find(|(name, _)| name == reference).map(|(_, adapter)| adapter.clone());
            let adapter = match known {
                Some(adapter) => adapter,
                None => {
                    let adapter = self.adapter(reference, sent, told)?;
                    opened.push((reference, adapter.clone()));
                    adapter
                }
            };
            selected.push(Selected { adapter, scales: scales.clone() });
        }
        Ok(selected)
    }

    /// What is in an adapter's file, also if it cannot be used.
    pub fn inspect(&self, reference: &str, told: Told) -> Result<Report, Error> {
        Ok(Adapter::inspect(self.file(reference, told)?.path()))
    }

    fn adapter(&self, reference: &str, sent: &Credentials, told: Told) -> Result<Arc<Adapter>, Error> {
        let mut file = self.file_as(reference, sent, told)?;
        // Only of fetched files the content is known without reading.
        if let Some(known) = file.digest().and_then(|digest| self.recent(digest)) {
            return Ok(known);
        }
        let mut result = Adapter::open(file.path());
        let intact = result.as_ref().map_or_else(|_| file.is_intact(), |adapter| file.is(adapter.digest()));
        if !intact {
            tracing::warn!(reference = fetch::shown(reference), "the copy in the cache is damaged; fetching it again");
            file.forget();
            file = self.file_as(reference, sent, told)?;
            result = Adapter::open(file.path());
        }
        if result.is_err() {
            file.forget();
        }
        let refused = |source| Error::Lora { reference: fetch::shown(reference), source: Box::new(source) };
        let adapter = Arc::new(result.map_err(refused)?);
        if file.digest().is_some() {
            self.note(adapter.clone());
        }
        Ok(adapter)
    }

    /// The adapter of this content, if it was used a moment ago. It is then the last to be forgotten.
    fn recent(&self, digest: &str) -> Option<Arc<Adapter>> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let at = recent.iter().position(|adapter| adapter.digest() == digest)?;
        let adapter = recent.remove(at);
        recent.push(adapter.clone());
        Some(adapter)
    }

    fn note(&self, adapter: Arc<Adapter>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have read the same meanwhile.
        recent.retain(|other| other.digest() != adapter.digest());
        if recent.len() >= RECENT {
            recent.remove(0);
        }
        recent.push(adapter);
    }

    /// The adapter's safetensors file on this machine.
    pub(super) fn file(&self, reference: &str, told: Told) -> Result<Fetched, Error> {
        self.file_as(reference, &Credentials::default(), told)
    }

    fn file_as(&self, reference: &str, sent: &Credentials, told: Told) -> Result<Fetched, Error> {
        let own = self.credentials.is_some();
        let parse = if own { Reference::parse } else { Reference::foreign };
        let credentials = self.credentials.as_ref().unwrap_or(sent);
        let failed = |source| Error::Fetch { reference: fetch::shown(reference), source };
        // A user's own file of that name comes first.
        if let Some(bytes) = shipped(reference).filter(|_| !own || !Path::new(reference.trim()).is_file()) {
            let written = Fetched::temporary(|file| {
                let write = |source| fetch::Error::Write { path: std::env::temp_dir(), source };
                file.write_all(bytes).map_err(write)
            });
            return written.map_err(|error| failed(Arc::new(error)));
        }
        match parse(reference).map_err(|error| failed(Arc::new(error)))? {
            Reference::File(path) => fetch::local(&path).map_err(|error| failed(Arc::new(error))),
            remote => self.fetcher().map_err(|e| failed(Arc::new(e)))?.get_blocking(&remote, credentials, told).map_err(failed),
        }
    }

    fn fetcher(&self) -> Result<&Fetcher, fetch::Error> {
        if self.fetcher.get().is_none() {
            let options = self.options.clone().ok_or(fetch::Error::NoCache)?;
            let _ = self.fetcher.set(Fetcher::new(options)?);
        }
        self.fetcher.get().ok_or(fetch::Error::NoCache)
    }
}
