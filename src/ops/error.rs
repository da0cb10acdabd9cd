//! Everything that can go wrong with what a user asked for, in words that say what to do.

use std::path::PathBuf;

use crate::{bytes, engine, fetch, image};

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that is never right.
    #[error("{field} is {value}, but must be {allowed}{hint}")]
    Invalid { field: &'static str, value: String, allowed: String, hint: String },
    /// Two fields that do not go together, or one that needs another.
    #[error("{field} {problem}; {hint}")]
    Combination { field: &'static str, problem: String, hint: String },
    #[error("model is {value:?}, which is no model's name, no folder and no file; {hint}")]
    UnknownModel { value: String, hint: String },
    #[error("the model {name} is not on this machine ({missing} of its files are missing); run: darkroom models pull {name}")]
    NotPulled { name: String, missing: usize },
    #[error("{field} {path} cannot be read")]
    UnreadableFile {
        field: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{field} {name} cannot be used")]
    UnreadablePicture {
        field: &'static str,
        name: String,
        #[source]
        source: image::Error,
    },
    #[error(
        "{width} x {height} pixels need about {} of memory, this machine has {}; ask for a smaller picture or fewer outputs",
        bytes::in_words(*need), bytes::in_words(*have)
    )]
    TooLarge { width: usize, height: usize, need: u64, have: u64 },
    #[error("the folder {folder} for {field} does not exist; create it first: mkdir -p {folder}")]
    NoFolder { field: &'static str, folder: PathBuf },
    #[error("the folder {folder} for {field} cannot be written to; choose another")]
    UnwritableFolder {
        field: &'static str,
        folder: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is there already; add --force to replace it, or choose another name")]
    Exists { path: PathBuf },
    /// A folder that is, or should be, a sweep's.
    #[error("{folder} {problem}; {hint}")]
    Run { folder: PathBuf, problem: String, hint: String },
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Of several files, while others are there now.
    #[error("{failed} of {} files could not be written (these were: {})", failed + written.len(), listed(written))]
    Partly {
        written: Vec<PathBuf>,
        failed: usize,
        /// Why the first was not.
        #[source]
        source: Box<Error>,
    },
    #[error("lora {reference} is refused")]
    Lora {
        reference: String,
        #[source]
        source: Box<models::lora::Error>,
    },
    #[error("lora {reference} cannot be had")]
    Fetch {
        reference: String,
        #[source]
        source: std::sync::Arc<fetch::Error>,
    },
    #[error("{field} cannot be had")]
    Image {
        field: &'static str,
        #[source]
        source: fetch::Error,
    },
    #[error(transparent)]
    Jobs(#[from] crate::jobs::Error),
    #[error(transparent)]
    Storage(#[from] crate::blobs::Error),
    #[error("{0}")]
    Unequal(String),
    #[error(transparent)]
    Picture(#[from] image::Error),
    #[error(transparent)]
    Weights(#[from] models::weights::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Models(#[from] super::models::Error),
}

impl Error {
    /// Whether the request itself is wrong, so that sending it again cannot help.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Invalid { .. } | Self::Combination { .. } | Self::UnknownModel { .. } => true,
            Self::Jobs(error) => matches!(error, crate::jobs::Error::Address(_)),
            Self::Models(error) => error.is_usage(),
            _ => false,
        }
    }

    /// Whether the user stopped it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let fetching = matches!(self, Self::Fetch { source, .. } if matches!(**source, fetch::Error::Cancelled));
        let linked = matches!(self, Self::Image { source: fetch::Error::Cancelled, .. });
        fetching || linked || matches!(self, Self::Engine(engine::Error::Cancelled))
    }

    /// With its causes, in one line.
    #[must_use]
    pub fn told(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text
    }

    /// Whether an adapter is at fault, so that the picture could be had without it.
    #[must_use]
    pub fn is_lora(&self) -> bool {
        matches!(self, Self::Lora { .. } | Self::Fetch { .. } | Self::Engine(engine::Error::Lora(_))) && !self.is_cancelled()
    }

    /// A stable name for programs.
    #[must_use]
    pub fn code(&self) -> String {
        match self {
            Self::Invalid { .. } | Self::Combination { .. } | Self::UnreadablePicture { .. } => "invalid_input".into(),
            Self::UnknownModel { .. } | Self::NotPulled { .. } | Self::Models(_) | Self::Weights(_) => "model_unavailable".into(),
            Self::TooLarge { .. } => "out_of_memory".into(),
            Self::Lora { source, .. } => format!("lora_{}", source.code()),
            Self::Fetch { source, .. } => format!("lora_{}", source.code()),
            Self::Run { .. }
            | Self::Write { .. }
            | Self::Partly { .. }
            | Self::UnwritableFolder { .. }
            | Self::NoFolder { .. }
            | Self::Exists { .. } => "storage".into(),
            Self::Engine(engine::Error::Lora(source)) => format!("lora_{}", source.code()),
            Self::Engine(engine::Error::OutOfMemory { .. } | engine::Error::CardTooSmall { .. }) => "out_of_memory".into(),
            Self::Engine(engine::Error::NotANumber { .. }) => "numerical_error".into(),
            Self::Engine(_) => "engine_failed".into(),
            Self::Storage(_) => "storage".into(),
            Self::Image { source, .. } => format!("image_{}", source.code()),
            Self::UnreadableFile { .. } | Self::Jobs(_) | Self::Unequal(_) | Self::Picture(_) => "internal".into(),
        }
    }

    pub(super) fn invalid(field: &'static str, value: &impl ToString, allowed: impl Into<String>) -> Self {
        Self::Invalid { field, value: value.to_string(), allowed: allowed.into(), hint: String::new() }
    }
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
