//! Prompt to token ids, for both encoders, as transformers 5.23.0 makes them.

mod clip;
mod t5;

use std::fmt;

use tokenizers::Tokenizer;

use crate::bundle::{Blob, Bundle};
use crate::weights::Error;

/// The ids of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// As many as asked for: the prompt, its end mark, padding.
    pub ids: Vec<u32>,
    /// The end of the prompt that did not fit, as it was typed.
    pub cut: Option<String>,
}

/// Both tokenizers of a model.
#[derive(Debug)]
pub struct Tokenizers {
    t5: Vocabulary,
    t5_limit: Option<usize>,
    clip: Vocabulary,
}

impl Tokenizers {
    /// Errors if a file is unreadable or lacks the marks that FLUX's encoders need.
    pub fn load(bundle: &Bundle) -> Result<Self, Error> {
        Ok(Self {
            t5: t5::vocabulary(&bundle.t5_tokenizer)?,
            t5_limit: t5::limit(bundle.t5_tokenizer_config.as_ref())?,
            clip: clip::vocabulary(&bundle.clip_tokenizer)?,
        })
    }

    /// Most tokens that the model's T5 was made for: `model_max_length` in its settings, at most 512. `None` if they do not say.
    #[must_use]
    pub fn t5_limit(&self) -> Option<usize> {
        self.t5_limit
    }

    /// `length` ids for T5: the prompt, `</s>`, then `<pad>`. A longer prompt is cut so that `</s>` stays last.
    /// Errors if `length` is 0.
    pub fn t5(&self, prompt: &str, length: usize) -> Result<Tokens, Error> {
        self.t5.encode(prompt, length)
    }

    /// CLIP's 77 ids: start mark, prompt, end mark, then end marks as padding. A longer prompt is cut so that an end mark stays last.
    pub fn clip(&self, prompt: &str) -> Result<Tokens, Error> {
        self.clip.encode(prompt, clip::LENGTH)
    }
}

/// A tokenizer whose encodings end with a mark, and its padding.
struct Vocabulary {
    tokenizer: Tokenizer,
    /// For messages.
    file: Blob,
    end: u32,
    padding: u32,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("file", &self.file.path()).finish_non_exhaustive()
    }
}

impl Vocabulary {
    fn new(mut tokenizer: Tokenizer, file: &Blob, end: &str, padding: &str) -> Result<Self, Error> {
        // Length is the caller's business; a file saved after use may carry settings of its own.
        tokenizer.with_truncation(None).map_err(|e| bad(file, &*e))?;
        tokenizer.with_padding(None);
        let id = |mark: &str| tokenizer.token_to_id(mark).ok_or_else(|| bad(file, &format!("has no token {mark}")));
        let (end, padding) = (id(end)?, id(padding)?);
        Ok(Self { tokenizer, file: file.clone(), end, padding })
    }

    fn encode(&self, prompt: &str, length: usize) -> Result<Tokens, Error> {
        let encoding = self.tokenizer.encode(prompt, true).map_err(|e| bad(&self.file, &*e))?;
        let mut ids = encoding.get_ids().to_vec();
        if length == 0 || ids.last() != Some(&self.end) {
            return Err(bad(&self.file, &format!("{length} ids were asked for, the last to be token {}", self.end)));
        }
        let cut = (ids.len() > length).then(|| {
            // The first token that makes room for the end mark; byte-level tokens may begin inside a character.
            let start = encoding.get_offsets()[length - 1].0;
            let start = (0..=start).rev().find(|i| prompt.is_char_boundary(*i)).unwrap_or_default();
            prompt[start..].trim_start().to_string()
        });
        if cut.is_some() {
            ids.truncate(length - 1);
            ids.push(self.end);
        }
        ids.resize(length, self.padding);
        Ok(Tokens { ids, cut })
    }
}

fn bad(file: &Blob, reason: &(impl fmt::Display + ?Sized)) -> Error {
    Error::Config { path: file.path(), reason: format!("this tokenizer cannot be used: {reason}") }
}

#[cfg(test)]
mod tests;
