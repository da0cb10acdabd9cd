//! The header of a safetensors file before anything is allocated for it.
#![no_main]

libfuzzer_sys::fuzz_target!(|header: &[u8]| {
    // With its length before it, so that mutations reach the JSON; and the bytes as they are.
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let _ = models::lora::precheck(&file);
    let _ = models::lora::precheck(header);
});
