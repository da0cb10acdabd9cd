//! What a named base model consists of: files, sizes, digests, licence, defaults. The text is TOML, one file per model.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Error, hub};

/// The cards that are part of the program.
const EMBEDDED: [(&str, &str); 8] = [
    ("pocket.toml", include_str!("../../../models/cards/pocket.toml")),
    ("flux1-schnell.toml", include_str!("../../../models/cards/flux1-schnell.toml")),
    ("flux1-dev.toml", include_str!("../../../models/cards/flux1-dev.toml")),
    ("flux1-dev-fp8.toml", include_str!("../../../models/cards/flux1-dev-fp8.toml")),
    ("flux1-dev-q8-gguf.toml", include_str!("../../../models/cards/flux1-dev-q8-gguf.toml")),
    ("flux1-dev-q4-gguf.toml", include_str!("../../../models/cards/flux1-dev-q4-gguf.toml")),
    ("flux1-schnell-q8-gguf.toml", include_str!("../../../models/cards/flux1-schnell-q8-gguf.toml")),
    ("clip-vit-l14.toml", include_str!("../../../models/cards/clip-vit-l14.toml")),
];

/// One named base model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Card {
    pub name: String,
    /// One line for people.
    pub what: String,
    pub licence: String,
    pub licence_url: Option<String>,
    /// The hub gives the files only to accounts that accepted the licence.
    pub gated: bool,
    /// Inside the program; needs no files.
    #[serde(default)]
    pub embedded: bool,
    /// Absent for models that look at pictures and make none.
    pub defaults: Option<Defaults>,
    #[serde(default)]
    pub files: Vec<File>,
    /// The folder of a card that was read from disk: files without a repository are found from here.
    #[serde(skip)]
    pub folder: Option<PathBuf>,
}

/// What a request gets where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    pub steps: usize,
    /// Ignored by models without a guidance embedding.
    pub guidance: f64,
    /// Pixels: the size that the model was trained for.
    pub width: usize,
    pub height: usize,
    /// Of older cards; the model's own files say it.
    #[serde(default, rename = "text_tokens")]
    pub _text_tokens: Option<serde::de::IgnoredAny>,
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub role: Role,
    /// `owner/name` on the hub. Without it the file is beside the card.
    pub repo: Option<String>,
    /// Inside the repository, or from the card's folder.
    pub path: String,
    /// Exact, where it is published.
    pub bytes: Option<u64>,
    /// Of the content, in lowercase hexadecimal, where it is published.
    pub sha256: Option<String>,
}

/// What a file is for. Several weight files of one role are shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// One file with the weights of all four components.
    All,
    Transformer,
    TransformerConfig,
    T5,
    T5Config,
    T5Tokenizer,
    T5TokenizerConfig,
    Clip,
    ClipConfig,
    ClipVocab,
    ClipMerges,
    ClipTokenizer,
    Vae,
    VaeConfig,
    Scheduler,
    /// Both towers of a CLIP, to measure pictures with.
    Judge,
    JudgeConfig,
    JudgeTokenizer,
}

impl Role {
    /// Whether the file decides the picture by its numbers: these make up a model's digest.
    #[must_use]
    pub fn is_weights(self) -> bool {
        matches!(self, Self::All | Self::Transformer | Self::T5 | Self::Clip | Self::Vae | Self::Judge)
    }
}

impl Card {
    /// Every card of the program, the default first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let parse = |(name, text): &(&str, &str)| Self::parse(Path::new(name), text);
        let cards = EMBEDDED.iter().map(parse).collect::<Result<Vec<_>, _>>();
        cards.expect("the cards are checked by a test")
    }

    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|card| card.name == name)
    }

    /// A card that someone wrote.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ReadCard { path: path.into(), source })?;
        let mut card = Self::parse(path, &text)?;
        card.folder = Some(path.parent().unwrap_or(Path::new("")).into());
        Ok(card)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let card: Self = toml::from_str(text).map_err(|source| Error::Card { path: path.into(), source: Box::new(source) })?;
        let wrong = |reason: String| Err(Error::CardContent { path: path.into(), reason });
        for file in &card.files {
            if file.sha256.as_ref().is_some_and(|digest| !hub::is_sha256(digest)) {
                return wrong(format!("sha256 of {} is not 64 lowercase hexadecimal digits", file.path));
            }
            let outside = Path::new(&file.path).components().any(|part| !matches!(part, std::path::Component::Normal(_)));
            if outside {
                return wrong(format!("path {} leaves its folder", file.path));
            }
            if file.repo.as_ref().is_some_and(|repo| repo.split('/').count() != 2) {
                return wrong(format!("repo of {} is not owner/name", file.path));
            }
        }
        if card.embedded == card.files.is_empty() { Ok(card) } else { wrong("a card either is embedded or lists files".into()) }
    }

    /// Files that come from the hub.
    pub fn hub_files(&self) -> impl Iterator<Item = (&str, &File)> {
        self.files.iter().filter_map(|file| Some((file.repo.as_deref()?, file)))
    }

    /// The sum of the published sizes, and whether every weight file has one.
    #[must_use]
    pub fn bytes(&self) -> (u64, bool) {
        let sum = self.files.iter().filter_map(|file| file.bytes).sum();
        (sum, self.files.iter().filter(|file| file.role.is_weights()).all(|file| file.bytes.is_some()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
        name = "mine"
        what = "a model"
        licence = "MIT"
        gated = false
        [defaults]
        steps = 4
        guidance = 0.0
        width = 64
        height = 64
        [[files]]
        role = "transformer"
        path = "flux.safetensors"
    "#;

    #[test]
    fn the_embedded_cards_are_complete() {
        let cards = Card::all();
        assert_eq!(cards[0].name, "pocket");
        for ((file, _), card) in EMBEDDED.iter().zip(&cards) {
            assert_eq!(*file, format!("{}.toml", card.name));
            if card.embedded {
                continue;
            }
            let Some(defaults) = card.defaults else {
                let roles: Vec<_> = card.files.iter().map(|file| file.role).collect();
                assert_eq!(roles, [Role::Judge, Role::JudgeConfig, Role::JudgeTokenizer]);
                continue;
            };
            assert!(defaults.steps > 0 && defaults.width % 16 == 0 && defaults.height % 16 == 0);
            let has = |role| card.files.iter().any(|file| file.role == role || (role.is_weights() && file.role == Role::All));
            for role in [Role::Transformer, Role::T5, Role::Clip, Role::Vae, Role::T5Tokenizer, Role::ClipVocab, Role::ClipMerges]
            {
                assert!(has(role), "{} has no {role:?}", card.name);
            }
            assert!(card.files.iter().all(|file| file.repo.is_some()), "{}", card.name);
            assert!(card.bytes().1, "{} states the size of all weights", card.name);
        }
    }

    #[test]
    fn unknown_fields_and_wrong_values_are_refused() {
        let parse = |text: &str| Card::parse(Path::new("mine.toml"), text).map_err(|e| e.to_string());
        assert!(parse(MINIMAL).is_ok());
        assert!(parse(&MINIMAL.replace("what", "wat")).is_err());
        assert!(parse(&MINIMAL.replace("flux.safetensors", "../flux.safetensors")).unwrap_err().contains("leaves"));
        assert!(parse(&MINIMAL.replace("role = ", "sha256 = \"ABC\"\nrole = ")).unwrap_err().contains("64"));
        assert!(parse(&MINIMAL.replace("role = ", "repo = \"x\"\nrole = ")).unwrap_err().contains("owner/name"));
        assert!(parse(&MINIMAL.replace("transformer", "unet")).is_err());
    }
}
