//! The adapter out of a trainer's archive.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::target;
use super::watch::{Stage, Told, Watched, tell};
use crate::fetch;
use crate::ops::{Error, files, shown};

#[derive(Debug, Clone, Serialize)]
pub struct Extracted {
    #[serde(serialize_with = "shown::path")]
    pub path: PathBuf,
    /// As the archive calls it.
    pub member: String,
    pub bytes: u64,
}

/// Writes the one `.safetensors` file of `archive` to `out`, which is there either whole or not at all.
pub fn extract(archive: &Path, out: &Path, force: bool, told: Told<'_>) -> Result<Extracted, Error> {
    let failed = |source| Error::Fetch { reference: archive.display().to_string(), source: Arc::new(source) };
    let write = |source| Error::Write { path: out.into(), source };
    let folder = target::check(out, force)?;
    let from = File::open(archive).map_err(|source| failed(fetch::Error::Read { path: archive.into(), source }))?;
    let mut file = files::temporary(folder).map_err(write)?;
    let mut from = Watched::new(from, told);
    let member = fetch::extract_file(&mut from, file.as_file_mut()).map_err(|error| from.cause(failed(error)))?;
    drop(from);
    tell(told, Stage::Finishing)?;
    let bytes = file.as_file().metadata().map_err(write)?.len();
    files::finish(file, out, force)?;
    Ok(Extracted { path: out.into(), member: member.name, bytes })
}
