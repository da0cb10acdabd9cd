//! A whole file: it has a report, whatever it is.
#![no_main]

use std::io::Write;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = tempfile::NamedTempFile::new_in("/dev/shm").or_else(|_| tempfile::NamedTempFile::new()) else { return };
    if file.write_all(bytes).is_ok() {
        let report = models::lora::Adapter::inspect(file.path());
        assert!(report.refused.is_some() || report.modules_matched > 0);
    }
});
