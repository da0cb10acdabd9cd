//! Places at which a test kills the process, to see what is lost. Nothing is there in a release build.

/// Ends the process at once, as a crash would, if `DARKROOM_FAIL` is `NAME=FILE` and the file is not there yet; it is then made, so that
/// the next process gets past this point.
pub(crate) fn failpoint(name: &str) {
    #[cfg(debug_assertions)]
    #[expect(clippy::disallowed_methods, reason = "for tests, and gone in release builds")]
    if let Ok(wish) = std::env::var("DARKROOM_FAIL")
        && let Some((wanted, file)) = wish.split_once('=')
        && wanted == name
        && std::fs::File::create_new(file).is_ok()
    {
        std::process::abort();
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}
