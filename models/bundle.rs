//! The files that make up one model: where each component's weights, configuration and tokenizer are.

use std::path::PathBuf;

use crate::weights::{Checkpoint, Error};

/// A file on disk or inside the program.
#[derive(Debug, Clone)]
pub enum Blob {
    File(PathBuf),
    Embedded { name: &'static str, bytes: &'static [u8] },
}

impl Blob {
    /// All bytes of a small file.
    pub fn read(&self) -> Result<Vec<u8>, Error> {
        match self {
            Self::File(path) => std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source }),
            Self::Embedded { bytes, .. } => Ok(bytes.to_vec()),
        }
    }

    /// Its size in bytes.
    pub fn size(&self) -> std::io::Result<u64> {
        match self {
            Self::File(path) => Ok(std::fs::metadata(path)?.len()),
            Self::Embedded { bytes, .. } => Ok(bytes.len() as u64),
        }
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Embedded { name, .. } => PathBuf::from(name),
        }
    }
}

/// One component: its weight files (all shards) and its `config.json`, if it has one.
#[derive(Debug, Clone, Default)]
pub struct Files {
    pub weights: Vec<Blob>,
    pub config: Option<Blob>,
}

impl Files {
    pub fn checkpoint(&self) -> Result<Checkpoint, Error> {
        match self.weights.as_slice() {
            [Blob::Embedded { name, bytes }] => Checkpoint::from_static(name, bytes),
            blobs => Checkpoint::open(&blobs.iter().map(Blob::path).collect::<Vec<_>>()),
        }
    }
}

/// A whole model.
#[derive(Debug, Clone)]
pub struct Bundle {
    pub transformer: Files,
    pub t5: Files,
    pub clip: Files,
    pub vae: Files,
    pub scheduler: Option<Blob>,
    /// `tokenizer.json` of T5.
    pub t5_tokenizer: Blob,
    /// T5's `tokenizer_config.json`; its `model_max_length` is the length of the prompt in tokens.
    pub t5_tokenizer_config: Option<Blob>,
    pub clip_tokenizer: ClipVocabulary,
}

/// CLIP's tokenizer as the published repositories have it, or as one `tokenizer.json`.
#[derive(Debug, Clone)]
pub enum ClipVocabulary {
    VocabMerges { vocab: Blob, merges: Blob },
    Json(Blob),
}

mod folder;
