//! Why an adapter is refused. Nothing was changed when one of these is returned.

use std::path::PathBuf;

use crate::weights;

/// Longest list of names in one message.
const SHOWN: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is no LoRA: {looks_like}")]
    Foreign { path: PathBuf, looks_like: String },
    #[error("{path} is refused before it is read: {reason}")]
    Limit { path: PathBuf, reason: String },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("this is {what}; this engine applies LoRAs made for FLUX.1")]
    WrongBase { what: String },
    #[error("this is {what}, which is not supported{}", some(" (", keys, ")"))]
    Unsupported { what: String, keys: Vec<String> },
    #[error("none of its {tensors} tensors belongs to a module of FLUX.1; for example {}", some("", keys, ""))]
    NothingMatched { tensors: usize, keys: Vec<String> },
    #[error("{unmatched} of its {modules} modules are none of FLUX.1's, more than half; for example {}", some("", keys, ""))]
    MostlyUnmatched { unmatched: usize, modules: usize, keys: Vec<String> },
    #[error("{module}: {reason}")]
    Module { module: String, reason: String },
    #[error(
        "tensor {key} holds values that are not numbers (NaN or infinity); the training failed, so use an earlier step of it"
    )]
    NotFinite { key: String },
    #[error("it does not fit this base model: {}", some("", misfits, ""))]
    Misfit { misfits: Vec<String> },
    #[error(transparent)]
    Weights(#[from] weights::Error),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// A stable name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "unreadable",
            Self::Foreign { .. } => "not_safetensors",
            Self::Limit { .. } => "over_limit",
            Self::Damaged { .. } => "damaged",
            Self::WrongBase { .. } => "wrong_base",
            Self::Unsupported { .. } => "unsupported",
            Self::NothingMatched { .. } => "nothing_matched",
            Self::MostlyUnmatched { .. } => "mostly_unmatched",
            Self::Module { .. } => "bad_module",
            Self::NotFinite { .. } => "not_finite",
            Self::Misfit { .. } => "misfit",
            Self::Weights(_) | Self::Candle(_) => "failed",
        }
    }
}

pub(super) fn some(before: &str, names: &[String], after: &str) -> String {
    if names.is_empty() {
        return String::new();
    }
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{before}{}{more}{after}", names[..names.len().min(SHOWN)].join(", "))
}

impl From<weights::Error> for Box<Error> {
    fn from(error: weights::Error) -> Self {
        Self::new(error.into())
    }
}
