//! Files that people get: written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};

use super::Error;

/// Of names of unfinished files.
const PREFIX: &str = ".darkroom-";
const SUFFIX: &str = ".part";

/// The folder that a file is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An error unless files can be made there.
pub(super) fn check_folder(field: &'static str, folder: &Path) -> Result<(), Error> {
    if !folder.is_dir() {
        return Err(Error::NoFolder { field, folder: folder.into() });
    }
    // Permissions, quotas and read-only mounts all show when a file is made.
    temporary(folder).map(drop).map_err(|source| Error::UnwritableFolder { field, folder: folder.into(), source })
}

/// Removes the unfinished files that a killed process left. Only for folders in which nobody else writes.
pub(super) fn sweep_up(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let left = |name: &str| name.starts_with(PREFIX) && name.ends_with(SUFFIX);
    for entry in entries.filter(|entry| left(&entry.file_name().to_string_lossy())) {
        // One that stays does no harm.
        let _ = fs::remove_file(entry.path());
    }
}

/// A file that is gone again unless it is finished.
pub(super) fn temporary(folder: &Path) -> io::Result<NamedTempFile> {
    unfinished(0o666).tempfile_in(folder)
}

/// The same of a folder.
pub(super) fn temporary_folder(folder: &Path) -> io::Result<TempDir> {
    unfinished(0o777).tempdir_in(folder)
}

/// With what the user's umask leaves of these permissions, as for any other file; temporary ones are private otherwise.
fn unfinished(permissions: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(permissions));
    }
    #[cfg(not(unix))]
    let _ = permissions;
    builder
}

/// Writes a file under another name in the same folder and renames it, so that nobody sees half of it.
pub(super) fn write(path: &Path, force: bool, bytes: &[u8]) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.into(), source };
    let mut file = temporary(folder_of(path)).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    finish(file, path, force)
}

/// Gives a temporary file in the folder of `path` that name, once all of it is on the disk.
pub(super) fn finish(file: NamedTempFile, path: &Path, force: bool) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.into(), source };
    file.as_file().sync_all().map_err(failed)?;
    let renamed = if force { file.persist(path) } else { file.persist_noclobber(path) };
    match renamed {
        Ok(_) => Ok(()),
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists { path: path.into() }),
        Err(e) => Err(failed(e.error)),
    }
}
