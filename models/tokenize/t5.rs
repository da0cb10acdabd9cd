//! T5's tokenizer: a `tokenizer.json`, read as it stands.

use tokenizers::Tokenizer;

use super::{Vocabulary, bad};
use crate::bundle::Blob;
use crate::weights::Error;

/// The longest prompt that FLUX.1 was trained with.
const MAX_TOKENS: usize = 512;

pub(super) fn vocabulary(file: &Blob) -> Result<Vocabulary, Error> {
    let tokenizer = Tokenizer::from_bytes(file.read()?).map_err(|e| bad(file, &*e))?;
    Vocabulary::new(tokenizer, file, "</s>", "<pad>")
}

/// `model_max_length` of tokenizer_config.json, at most [`MAX_TOKENS`]: files without a limit of their own write 1e30 there.
pub(super) fn limit(file: Option<&Blob>) -> Result<Option<usize>, Error> {
    let Some(file) = file else { return Ok(None) };
    let settings: serde_json::Value = serde_json::from_slice(&file.read()?).map_err(|e| bad(file, &e))?;
    let length = settings.get("model_max_length").and_then(serde_json::Value::as_f64);
    Ok(length.filter(|length| *length >= 1.0).map(|length| length.min(MAX_TOKENS as f64) as usize))
}
