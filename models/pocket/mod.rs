//! pocket, the embedded default: a tiny FLUX.1 of the same architecture that draws portraits, so that everything works
//! anywhere at once. How it was made and what it can do: the model card, `models/pocket/README.md`.

pub mod people;
pub mod probe;

use crate::bundle::{Blob, Bundle, ClipVocabulary, Files};

/// A file of the diffusers folder `weights`, inside the program.
macro_rules! embedded {
    ($name:literal) => {
        Blob::Embedded { name: concat!("pocket/", $name), bytes: include_bytes!(concat!("weights/", $name)) }
    };
}

/// As cards and requests call it.
pub const NAME: &str = "pocket";

/// Width and height, in pixels, that pocket was trained at.
pub const SIDE: usize = 128;

/// The embedded files.
#[must_use]
pub fn bundle() -> Bundle {
    let files = |weights, config| Files { weights: vec![weights], config: Some(config) };
    Bundle {
        transformer: files(embedded!("transformer/diffusion_pytorch_model.safetensors"), embedded!("transformer/config.json")),
        t5: files(embedded!("text_encoder_2/model.safetensors"), embedded!("text_encoder_2/config.json")),
        clip: files(embedded!("text_encoder/model.safetensors"), embedded!("text_encoder/config.json")),
        vae: files(embedded!("vae/diffusion_pytorch_model.safetensors"), embedded!("vae/config.json")),
        scheduler: Some(embedded!("scheduler/scheduler_config.json")),
        t5_tokenizer: embedded!("tokenizer_2/tokenizer.json"),
        t5_tokenizer_config: Some(embedded!("tokenizer_2/tokenizer_config.json")),
        clip_tokenizer: ClipVocabulary::VocabMerges {
            vocab: embedded!("tokenizer/vocab.json"),
            merges: embedded!("tokenizer/merges.txt"),
        },
    }
}
