//! Files and archives on this machine.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::sniff::{self, Kind};
use super::{Error, Fetched, archive, cache, names_weights, peft};

/// A user's own file, or the one in a folder; out of an archive, a temporary copy of the adapter in it.
pub fn local(path: &Path) -> Result<Fetched, Error> {
    let inside = if path.is_dir() { Some(in_folder(path)?) } else { None };
    let path = inside.as_deref().unwrap_or(path);
    let read = |source| Error::Read { path: path.into(), source };
    let head = cache::head(path, sniff::HEAD).map_err(read)?;
    if !is_archive(path, &head) {
        return Ok(Fetched { path: path.into(), digest: None, _keep: None });
    }
    Fetched::temporary(|file| {
        let member = archive::extract_file(File::open(path).map_err(read)?, file)?;
        tracing::debug!(member = member.name, bytes = member.bytes, "extracted");
        Ok(())
    })
}

/// PEFT's file, which is read with the settings beside it, else the only one with weights.
fn in_folder(folder: &Path) -> Result<PathBuf, Error> {
    let read = |source| Error::Read { path: folder.into(), source };
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        names.push(entry.map_err(read)?.file_name());
    }
    names.sort();
    let is_weights = |name: &&OsString| names_weights(&name.to_string_lossy()) && folder.join(name).is_file();
    let weights: Vec<&OsString> = names.iter().filter(is_weights).collect();
    let listed = |names: &[&OsString]| names.iter().map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>();
    match weights.as_slice() {
        [only] => Ok(folder.join(only)),
        [] => Err(Error::NoFileInFolder { folder: folder.into(), files: listed(&names.iter().collect::<Vec<_>>()) }),
        _ if weights.iter().any(|name| name.as_os_str() == peft::WEIGHTS) => Ok(folder.join(peft::WEIGHTS)),
        several => Err(Error::SeveralInFolder { folder: folder.into(), files: listed(several) }),
    }
}

/// By content; an archive of the oldest kind has no mark, so that its name counts.
fn is_archive(path: &Path, head: &[u8]) -> bool {
    let named = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("tar"));
    match sniff::kind(head) {
        Kind::Archive => true,
        Kind::Unknown => named,
        _ => false,
    }
}
