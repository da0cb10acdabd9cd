//! One key of an adapter: any text is a module's or is not.
#![no_main]

libfuzzer_sys::fuzz_target!(|key: &str| {
    if let Some(module) = models::lora::module_of(key) {
        // What was found has a tensor, whose name is the key's own module.
        assert!(module.weight().starts_with(&module.name));
    }
});
