use std::path::PathBuf;

use crate::bytes;

/// Why a base model could not be named, fetched or checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the card {path} cannot be read")]
    ReadCard {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the card {path} is not as a card should be; compare it with models/cards/flux1-dev.toml")]
    Card {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("the card {path} is not as a card should be: {reason}")]
    CardContent { path: PathBuf, reason: String },
    #[error("the card {card} lists no file with the role {role}")]
    NoRole { card: String, role: &'static str },
    #[error("no model is called {name:?}; {hint}")]
    NoCard { name: String, hint: String },
    #[error("{name} is not in this build; build with --features pocket, or choose another model: darkroom models list")]
    NotEmbedded { name: String },
    #[error("{name} looks at pictures and makes none; choose another model: darkroom models list")]
    NoPictures { name: String },
    #[error("{name} is part of the program and cannot be {action}; it is always here")]
    Embedded { name: String, action: &'static str },
    #[error("HF_HUB_OFFLINE is set and {missing} files of {name} are not here; unset it to fetch them")]
    Offline { name: String, missing: usize },
    #[error(
        "{folder} has {} free, but {} are needed; free some, or set HF_HOME to a folder on a larger disk",
        bytes::in_words(*have), bytes::in_words(*need)
    )]
    DiskFull { folder: PathBuf, need: u64, have: u64 },
    #[error(
        "{repo} is given only to accounts that accepted its licence, and no token was sent (401)\n  \
         1. accept the licence: {page}\n  \
         2. make a token that may read: {tokens}\n  \
         3. run: HF_TOKEN=hf_... darkroom models pull {name}"
    )]
    TokenNeeded { name: String, repo: String, page: String, tokens: String },
    #[error("{repo} refused the token (401): it is wrong, expired or may not read; make another: {tokens}")]
    TokenRefused { repo: String, tokens: String },
    #[error(
        "{repo} is closed to this account (403): accept the licence ({licence}) with the account of the token, \
         at {page}, then run again: darkroom models pull {name}"
    )]
    LicenceNotAccepted { name: String, repo: String, page: String, licence: String },
    #[error("{repo} has no file {path:?} (404); the repository may have changed or been renamed")]
    NotInRepo { repo: String, path: String },
    #[error("{repo}/{path} is {found} bytes on the hub, but {expected} in the card: it was changed there and is not fetched")]
    Changed { repo: String, path: String, expected: u64, found: u64 },
    #[error("{repo}/{path} arrived wrong and was thrown away: {reason}; run it again")]
    Wrong { repo: String, path: String, reason: String },
    #[error("{repo}: {reason}")]
    Hub { repo: String, reason: String },
    #[error("the hub at {endpoint} cannot be reached or broke off; check the connection and run it again")]
    Connection {
        endpoint: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the hub's address {endpoint:?} (HF_ENDPOINT) cannot be used")]
    Client {
        endpoint: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} cannot be written; is the disk full, or the folder another user's?")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} cannot be removed")]
    Remove {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NoPictures { .. }
                | Self::Card { .. }
                | Self::CardContent { .. }
                | Self::NoRole { .. }
                | Self::NoCard { .. }
                | Self::Embedded { .. }
        )
    }
}
