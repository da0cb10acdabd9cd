use std::path::PathBuf;

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
    #[error("{name} is not in this build; build with --features pocket, or choose another model: darkroom models list")]
    NotEmbedded { name: String },
}

impl Error {
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Card { .. } | Self::CardContent { .. })
    }
}
