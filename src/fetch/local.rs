//! Files and archives on this machine.

use std::fs::File;
use std::path::Path;

use super::sniff::{self, Kind};
use super::{Error, Fetched, archive, cache};

/// A user's own file; out of an archive, a temporary copy of the adapter in it.
pub fn local(path: &Path) -> Result<Fetched, Error> {
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

/// By content; an archive of the oldest kind has no mark, so that its name counts.
fn is_archive(path: &Path, head: &[u8]) -> bool {
    let named = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("tar"));
    match sniff::kind(head) {
        Kind::Archive => true,
        Kind::Unknown => named,
        _ => false,
    }
}
