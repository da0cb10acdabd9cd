//! A file or folder that a verb writes.

use std::path::Path;

use crate::ops::{Error, files};

/// The folder that `out` will be in, if it may be written there: before any work is done.
pub(super) fn check(out: &Path, force: bool) -> Result<&Path, Error> {
    if out.exists() && !force {
        return Err(Error::Exists { path: out.into() });
    }
    let folder = files::folder_of(out);
    files::check_folder("out", folder)?;
    Ok(folder)
}
