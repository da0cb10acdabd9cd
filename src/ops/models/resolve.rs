//! What `--model` means: a card's name, a card's path, a folder or a file.

use std::path::{Path, PathBuf};

use models::bundle::{Blob, Bundle, ClipVocabulary, Files};
use models::flux;
use models::weights::{Component, Source};

use super::{Card, Defaults, Role, store};
use crate::config::Config;
use crate::ops::Error;

/// Names that differ from the wanted one by more than this (of 1) are not offered.
const SIMILAR: f64 = 0.5;

/// A model that is on this machine.
#[derive(Debug, Clone)]
pub struct Model {
    /// The card's name, or the last part of the path: pictures carry it, and folders are nobody's business.
    pub name: String,
    pub bundle: Bundle,
    pub defaults: Defaults,
    /// The transformer's sizes, read from its weights.
    pub shape: flux::Config,
}

/// Finds the model that `wanted` names. Nothing is fetched.
pub fn resolve(wanted: &str, config: &Config) -> Result<Model, Error> {
    if let Some(card) = Card::named(wanted) {
        return from_card(&card, config);
    }
    let path = Path::new(wanted);
    if wanted.is_empty() || !path.exists() {
        return Err(Error::UnknownModel { value: wanted.into(), hint: nearest(wanted) });
    }
    if path.extension().is_some_and(|extension| extension == "toml") {
        return from_card(&Card::read(path)?, config);
    }
    let bundle = Bundle::detect(path)?;
    let shape = shape(&bundle)?;
    // `.` has no last part.
    let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let last = if full.is_dir() { full.file_name() } else { full.file_stem() };
    let name = last.map_or_else(|| wanted.into(), |last| last.to_string_lossy().into_owned());
    Ok(Model { name, bundle, defaults: Defaults::of(&shape), shape })
}

fn from_card(card: &Card, config: &Config) -> Result<Model, Error> {
    let Some(defaults) = card.defaults else { return Err(super::Error::NoPictures { name: card.name.clone() }.into()) };
    let bundle = if card.embedded { embedded(&card.name)? } else { bundle(card, config)? };
    let shape = shape(&bundle)?;
    Ok(Model { name: card.name.clone(), bundle, defaults, shape })
}

#[cfg(feature = "pocket")]
fn embedded(_name: &str) -> Result<Bundle, Error> {
    Ok(models::pocket::bundle())
}

#[cfg(not(feature = "pocket"))]
fn embedded(name: &str) -> Result<Bundle, Error> {
    Err(super::Error::NotEmbedded { name: name.into() }.into())
}

impl Defaults {
    /// For a model without a card: those of FLUX.1-dev or -schnell, told apart by the guidance embedding.
    fn of(shape: &flux::Config) -> Self {
        let name = if shape.guidance { "flux1-dev" } else { "flux1-schnell" };
        Card::named(name).and_then(|card| card.defaults).expect("the card is part of the program")
    }
}

fn shape(bundle: &Bundle) -> Result<flux::Config, Error> {
    let checkpoint = bundle.transformer.checkpoint()?;
    let source = Source::new(Component::Transformer, &checkpoint, candle_core::DType::F32, &candle_core::Device::Cpu);
    let json = bundle.transformer.config.as_ref().map(Blob::read).transpose()?;
    let json = json.and_then(|text| serde_json::from_slice(&text).ok());
    Ok(flux::Config::read(&source, json.as_ref())?)
}

/// The card's files where they are; an error if some are not there.
fn bundle(card: &Card, config: &Config) -> Result<Bundle, Error> {
    let mut found: Vec<(Role, PathBuf)> = Vec::new();
    let mut missing = 0;
    for file in &card.files {
        match store::locate(card, file, config) {
            Some(path) => found.push((file.role, path)),
            None => missing += 1,
        }
    }
    if missing > 0 {
        return Err(Error::NotPulled { name: card.name.clone(), missing });
    }
    let all = |role| found.iter().filter(move |(has, _)| *has == role).map(|(_, path)| Blob::File(path.clone()));
    let one = |role| all(role).next();
    let needed = |role, what| one(role).ok_or_else(|| super::Error::NoRole { card: card.name.clone(), role: what });
    let part = |role, config| {
        let weights: Vec<Blob> = all(role).collect();
        Files { weights: if weights.is_empty() { all(Role::All).collect() } else { weights }, config: one(config) }
    };
    let clip_tokenizer = match one(Role::ClipTokenizer) {
        Some(json) => ClipVocabulary::Json(json),
        None => ClipVocabulary::VocabMerges {
            vocab: needed(Role::ClipVocab, "clip-vocab")?,
            merges: needed(Role::ClipMerges, "clip-merges")?,
        },
    };
    Ok(Bundle {
        transformer: part(Role::Transformer, Role::TransformerConfig),
        t5: part(Role::T5, Role::T5Config),
        clip: part(Role::Clip, Role::ClipConfig),
        vae: part(Role::Vae, Role::VaeConfig),
        scheduler: one(Role::Scheduler),
        t5_tokenizer: needed(Role::T5Tokenizer, "t5-tokenizer")?,
        t5_tokenizer_config: one(Role::T5TokenizerConfig),
        clip_tokenizer,
    })
}

/// The files of a model that looks at pictures: weights, config, tokenizer. `wanted` is a card's name, a card's path, or a folder with
/// `model.safetensors`, `config.json` and `tokenizer.json`. `None` if they are not all on this machine.
pub(in crate::ops) fn judge(wanted: &str, config: &Config) -> Result<Option<[PathBuf; 3]>, Error> {
    let path = Path::new(wanted);
    let card = match Card::named(wanted) {
        Some(card) => card,
        None if path.extension().is_some_and(|extension| extension == "toml") => Card::read(path)?,
        None => {
            let files = ["model.safetensors", "config.json", "tokenizer.json"].map(|name| path.join(name));
            return Ok(files.iter().all(|file| file.is_file()).then_some(files));
        }
    };
    let one = |role| card.files.iter().find(|file| file.role == role).and_then(|file| store::locate(&card, file, config));
    Ok((|| Some([one(Role::Judge)?, one(Role::JudgeConfig)?, one(Role::JudgeTokenizer)?]))())
}

/// What the user may have meant.
pub(super) fn nearest(wanted: &str) -> String {
    let mut names: Vec<_> = Card::all()
        .into_iter()
        .filter(|card| card.defaults.is_some())
        .map(|card| (strsim::jaro_winkler(&card.name, wanted), card.name))
        .collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0));
    let close: Vec<_> = names.iter().filter(|(likeness, _)| *likeness > SIMILAR).take(3).map(|(_, name)| name.as_str()).collect();
    if close.is_empty() {
        "see them all: darkroom models list".into()
    } else {
        format!("the nearest names are {}; see them all: darkroom models list", close.join(", "))
    }
}
