//! A trainer's archive: nothing but one file is taken out, and never more than the limits allow.
#![no_main]

libfuzzer_sys::fuzz_target!(|archive: &[u8]| {
    let mut out = Vec::new();
    if let Ok(member) = darkroom::fetch::extract(archive, &mut out) {
        assert_eq!(member.bytes, out.len() as u64);
        assert!(!std::path::Path::new(&member.name).is_absolute() && !member.name.split('/').any(|part| part == ".."));
    }
});
