//! What a user calls an adapter.
#![no_main]

use darkroom::fetch::{Reference, shown};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(Reference::Hub { repo, revision, file }) = Reference::parse(text) {
        // These become paths of a link.
        for part in repo.split('/').chain([revision.as_str()]).chain(file.iter().flat_map(|file| file.split('/'))) {
            assert!(!part.is_empty() && part != "." && part != ".." && !part.contains(char::is_control), "{text:?}");
        }
    }
    assert!(!shown(text).contains(char::is_control));
});
