//! A file or folder that a verb writes.

use std::path::Path;

use crate::ops::Error;

/// The folder that `out` will be in, if it may be written there: before any work is done.
pub(super) fn check(out: &Path, force: bool) -> Result<&Path, Error> {
    if out.exists() && !force {
        return Err(Error::Exists { path: out.into() });
    }
    let folder = parent(out);
    if folder.is_dir() { Ok(folder) } else { Err(Error::NoFolder { field: "out", folder: folder.into() }) }
}

pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
