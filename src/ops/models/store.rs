//! What is on this machine: listing, checking and removing.

use std::path::PathBuf;

use serde::Serialize;

use super::{Card, Error, File, digest, hub, resolve};
use crate::config::Config;
use crate::ops::shown;

/// One row of `models list`.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    pub name: String,
    pub what: String,
    /// Of all files whose size is published.
    pub bytes: u64,
    pub licence: String,
    pub licence_url: Option<String>,
    pub gated: bool,
    pub installed: Installed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Installed {
    /// Part of this program.
    Embedded,
    Yes,
    /// Some files are there.
    Partly,
    No,
}

/// What checking a file found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Found {
    /// The content has the published digest.
    Sound,
    /// No digest is published; the size is right or unknown.
    NoDigest,
    Missing,
    WrongSize {
        expected: u64,
        found: u64,
    },
    WrongDigest {
        expected: String,
        found: String,
    },
}

impl Found {
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Sound | Self::NoDigest)
    }
}

/// One row of `models verify`.
#[derive(Debug, Clone, Serialize)]
pub struct Checked {
    pub file: String,
    #[serde(serialize_with = "shown::maybe")]
    pub path: Option<PathBuf>,
    #[serde(flatten)]
    pub found: Found,
}

/// What `models remove` did.
#[derive(Debug, Clone, Serialize)]
pub struct Removed {
    pub freed_bytes: u64,
    /// Files that stay because another model that is here needs them.
    pub kept: Vec<String>,
}

/// All cards, and which of them are here.
#[must_use]
pub fn list(config: &Config) -> Vec<Listed> {
    let row = |card: Card| Listed {
        installed: installed(&card, config),
        bytes: card.bytes().0,
        name: card.name,
        what: card.what,
        licence: card.licence,
        licence_url: card.licence_url,
        gated: card.gated,
    };
    Card::all().into_iter().map(row).collect()
}

fn installed(card: &Card, config: &Config) -> Installed {
    if card.embedded {
        return if cfg!(feature = "pocket") { Installed::Embedded } else { Installed::No };
    }
    let here = card.files.iter().filter(|file| locate(card, file, config).is_some()).count();
    match here {
        0 => Installed::No,
        _ if here == card.files.len() => Installed::Yes,
        _ => Installed::Partly,
    }
}

/// Where a card's file is.
pub(super) fn locate(card: &Card, file: &File, config: &Config) -> Option<PathBuf> {
    match &file.repo {
        Some(repo) => hub::cached(&config.hub.cache, repo, &file.path),
        None => Some(card.folder.clone().unwrap_or_default().join(&file.path)).filter(|path| path.is_file()),
    }
}

/// The card of a name, or of a card's path.
pub(super) fn card(name: &str) -> Result<Card, Error> {
    if let Some(card) = Card::named(name) {
        return Ok(card);
    }
    let path = std::path::Path::new(name);
    if path.extension().is_some_and(|extension| extension == "toml") && path.is_file() {
        return Card::read(path);
    }
    Err(Error::NoCard { name: name.into(), hint: resolve::nearest(name) })
}

/// Reads every file of a model and compares size and digest. `told` hears the file and the bytes read of it.
pub fn verify(name: &str, config: &Config, told: &mut dyn FnMut(&str, u64, u64)) -> Result<Vec<Checked>, Error> {
    let card = card(name)?;
    card.files.iter().map(|file| check(&card, file, config, told)).collect()
}

fn check(card: &Card, file: &File, config: &Config, told: &mut dyn FnMut(&str, u64, u64)) -> Result<Checked, Error> {
    let path = locate(card, file, config);
    let found = match &path {
        None => Found::Missing,
        Some(path) => compare(path, file, None, told)?,
    };
    Ok(Checked { file: file.path.clone(), path, found })
}

/// A file against what is published: by the card, else by the hub (`bytes`, and the digest that names the blob).
pub(super) fn compare(
    path: &std::path::Path,
    file: &File,
    bytes: Option<u64>,
    told: &mut dyn FnMut(&str, u64, u64),
) -> Result<Found, Error> {
    let unreadable = |source| Error::Read { path: path.into(), source };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if let Some(expected) = file.bytes.or(bytes).filter(|expected| *expected != size) {
        return Ok(Found::WrongSize { expected, found: size });
    }
    let Some(expected) = file.sha256.clone().or_else(|| hub::stated_sha256(path)) else { return Ok(Found::NoDigest) };
    let found = digest::of_file(path, &mut |done| {
        told(&file.path, done, size);
        true
    });
    let found = found.map_err(unreadable)?;
    Ok(if found == expected { Found::Sound } else { Found::WrongDigest { expected, found } })
}

/// Deletes a model's files from the hub's cache, except those that another model which is here needs.
pub fn remove(name: &str, config: &Config) -> Result<Removed, Error> {
    let card = card(name)?;
    if card.embedded {
        return Err(Error::Embedded { name: card.name, action: "removed" });
    }
    let others: Vec<Card> = Card::all().into_iter().filter(|other| other.name != card.name).collect();
    let others: Vec<&Card> = others.iter().filter(|other| installed(other, config) == Installed::Yes).collect();
    let mut removed = Removed { freed_bytes: 0, kept: Vec::new() };
    for (repo, file) in card.hub_files() {
        let shared = |other: &&&Card| other.hub_files().any(|(other, used)| other == repo && used.path == file.path);
        if let Some(other) = others.iter().find(shared) {
            removed.kept.push(format!("{repo}/{} ({} needs it)", file.path, other.name));
            continue;
        }
        let evicted = hub::evict(&config.hub.cache, repo, &file.path);
        removed.freed_bytes +=
            evicted.map_err(|source| Error::Remove { path: hub::repo_folder(&config.hub.cache, repo), source })?;
    }
    Ok(removed)
}
