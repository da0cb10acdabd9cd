use std::path::PathBuf;

use super::{Component, LoadReport};

/// Why weights could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a checkpoint that can be loaded: {looks_like}")]
    Foreign { path: PathBuf, looks_like: String },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("shard {shard} named by {index} is missing; download the model again")]
    MissingShard { index: PathBuf, shard: PathBuf },
    #[error("no file of the {component} weights in {folder}")]
    MissingComponent { component: Component, folder: PathBuf },
    #[error("the {} weights do not fit the model: {report}", report.component)]
    Incomplete { report: Box<LoadReport> },
    #[error("the {component} weights cannot be used: {reason}")]
    Unsupported { component: Component, reason: String },
    #[error("{path}: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error("tensor {key}")]
    Tensor {
        key: String,
        #[source]
        source: candle_core::Error,
    },
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
