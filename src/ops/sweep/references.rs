//! Pictures of people to compare with, and the models that look at pictures.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ::image::RgbImage;
use ::image::imageops::{self, FilterType};
use ::models::judge::Clip;
use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::metrics::Judge;
use super::results::{Results, Row};
use crate::config::Config;
use crate::image::{self, Limits};
use crate::ops::{Error, files, models, shown};

const FILE: &str = "references.json";

/// The card that is looked for if none is named.
const JUDGE: &str = "clip-vit-l14";

/// Folders of pictures, and what compares with them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct References {
    /// Of the person.
    #[serde(serialize_with = "shown::maybe")]
    pub identity: Option<PathBuf>,
    /// Of somebody else, each.
    #[serde(default, serialize_with = "shown::paths")]
    pub others: Vec<PathBuf>,
    /// A CLIP: a card's name, a card's path or a folder.
    #[serde(default)]
    pub judge: Option<String>,
}

impl References {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// An error for what is not there.
    pub(super) fn check(&self, config: &Config) -> Result<(), Error> {
        let named =
            self.identity.iter().map(|folder| ("identity", folder)).chain(self.others.iter().map(|folder| ("others", folder)));
        for (field, folder) in named {
            pictures(field, folder)?;
        }
        if let Some(wanted) = &self.judge
            && models::judge(wanted, config)?.is_none()
        {
            let allowed =
                format!("a folder with model.safetensors, config.json and tokenizer.json, or a model that was pulled: {JUDGE}");
            return Err(Error::invalid("judge", wanted, allowed));
        }
        Ok(())
    }

    /// Those that the run's last report used, as far as they are still there.
    pub(super) fn kept(run: &Path) -> Self {
        let text = std::fs::read(run.join(FILE)).ok();
        let mut kept: Self = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let there = |folder: &PathBuf| {
            let there = pictures("identity", folder).is_ok();
            if !there {
                tracing::warn!(folder = %folder.display(), "reference pictures are not there any more");
            }
            there
        };
        kept.identity = kept.identity.filter(there);
        kept.others.retain(there);
        kept
    }

    /// Found from anywhere.
    pub(super) fn keep(&self, run: &Path) -> Result<(), Error> {
        let full = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let kept = Self {
            identity: self.identity.as_ref().map(full),
            others: self.others.iter().map(full).collect(),
            judge: self.judge.as_ref().map(|judge| {
                let path = PathBuf::from(judge);
                if path.exists() { full(&path).display().to_string() } else { judge.clone() }
            }),
        };
        files::write(&run.join(FILE), true, &serde_json::to_vec(&kept).expect("paths"))
    }

    /// Whatever can look at the pictures of this run. Of two that measure the same the later one counts.
    pub(super) fn judges(&self, results: &Results, config: &Config) -> Result<Vec<Box<dyn Judge>>, Error> {
        let mut judges: Vec<Box<dyn Judge>> = Vec::new();
        if let Some([weights, sizes, tokenizer]) = models::judge(self.judge.as_deref().unwrap_or(JUDGE), config)? {
            let clip = Clip::load(&weights, &sizes, &tokenizer, &Device::Cpu).map_err(crate::engine::Error::from)?;
            judges.push(Box::new(WithClip::new(clip, self)?));
        }
        #[cfg(feature = "pocket")]
        if results.rows.iter().any(super::portraits::is_portrait) {
            // One column, one instrument: faces are measured by the probe where it reads all of them.
            let all = results.rows.iter().all(super::portraits::is_portrait);
            let references = if all { self } else { &Self::default() };
            judges.push(Box::new(super::portraits::Portraits::new(references)?));
        }
        #[cfg(not(feature = "pocket"))]
        let _ = results;
        Ok(judges)
    }
}

/// The pictures of a folder, by name.
fn pictures(field: &'static str, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let is_picture = |path: &PathBuf| {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        extension.is_some_and(|extension| ["png", "jpg", "jpeg", "webp"].contains(&extension.as_str()))
    };
    let entries = std::fs::read_dir(folder).map_err(|_| Error::invalid(field, &folder.display(), "a folder of pictures"))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_picture).collect();
    found.sort();
    if found.is_empty() {
        return Err(Error::invalid(field, &folder.display(), "a folder with pictures: .png, .jpg or .webp files"));
    }
    Ok(found)
}

pub(super) fn read(field: &'static str, folder: &Path) -> Result<Vec<RgbImage>, Error> {
    let one = |path: PathBuf| {
        let name = path.display().to_string();
        let bytes = std::fs::read(&path).map_err(|source| Error::UnreadableFile { field, path, source })?;
        image::decode_picture(&bytes, Limits::default()).map_err(|source| Error::UnreadablePicture { field, name, source })
    };
    pictures(field, folder)?.into_iter().map(one).collect()
}

/// CLIP's view of pictures, prompts and people.
struct WithClip {
    clip: Clip,
    identity: Option<Vec<Vec<f32>>>,
    others: Vec<Vec<Vec<f32>>>,
    /// Of prompts that were read.
    prompts: RefCell<HashMap<String, Vec<f32>>>,
}

impl WithClip {
    fn new(clip: Clip, references: &References) -> Result<Self, Error> {
        let vectors = |field, folder: &PathBuf| -> Result<Vec<Vec<f32>>, Error> {
            read(field, folder)?.iter().map(|picture| look(&clip, picture)).collect()
        };
        let identity = references.identity.as_ref().map(|folder| vectors("identity", folder)).transpose()?;
        let others = references.others.iter().map(|folder| vectors("others", folder)).collect::<Result<_, _>>()?;
        Ok(Self { identity, others, prompts: RefCell::default(), clip })
    }
}

impl Judge for WithClip {
    fn judge(&self, row: &mut Row, picture: &RgbImage) -> Result<(), Error> {
        let vector = look(&self.clip, picture)?;
        let prompt = row.exact["prompt"].as_str().unwrap_or_default();
        let mut prompts = self.prompts.borrow_mut();
        if !prompts.contains_key(prompt) {
            prompts.insert(prompt.into(), self.clip.text(prompt).map_err(crate::engine::Error::from)?);
        }
        row.metrics.insert("clip_score", 100. * cosine(&vector, &prompts[prompt]));
        if let Some(people) = &self.identity {
            row.metrics.insert("identity", similarity(&vector, people));
        }
        let leaked = self.others.iter().map(|people| similarity(&vector, people)).max_by(f64::total_cmp);
        if let Some(leaked) = leaked {
            row.metrics.insert("leakage", leaked);
        }
        Ok(())
    }
}

/// The shorter side scaled to the model's, the middle of the longer one.
fn look(clip: &Clip, picture: &RgbImage) -> Result<Vec<f32>, Error> {
    let side = clip.side() as u32;
    let shorter = picture.width().min(picture.height());
    let scaled = |length: u32| (u64::from(length) * u64::from(side) / u64::from(shorter)) as u32;
    let small = imageops::resize(picture, scaled(picture.width()), scaled(picture.height()), FilterType::CatmullRom);
    let (x, y) = ((small.width() - side) / 2, (small.height() - side) / 2);
    let square = imageops::crop_imm(&small, x, y, side, side).to_image();
    Ok(clip.picture(square.as_raw()).map_err(crate::engine::Error::from)?)
}

/// The mean over the reference pictures.
fn similarity(vector: &[f32], references: &[Vec<f32>]) -> f64 {
    references.iter().map(|reference| cosine(vector, reference)).sum::<f64>() / references.len() as f64
}

/// Of vectors of length 1.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_and_prompts_are_compared_as_transformers_compares_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sweep");
        let path = |name: &str| folder.join("clip").join(name);
        let clip = Clip::load(&path("model.safetensors"), &path("config.json"), &path("tokenizer.json"), &Device::Cpu).unwrap();
        let expected: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("clip.json")).unwrap()).unwrap();
        for (i, name) in ["a.png", "b.png"].into_iter().enumerate() {
            let picture = image::decode_picture(&std::fs::read(folder.join(name)).unwrap(), Limits::default()).unwrap();
            let vector = look(&clip, &picture).unwrap();
            for (j, text) in expected["texts"].as_array().unwrap().iter().enumerate() {
                let found = cosine(&vector, &clip.text(text.as_str().unwrap()).unwrap());
                let wanted = expected["cosines"][j][i].as_f64().unwrap();
                // Pillow rounds between the two directions of its scaling.
                assert!((found - wanted).abs() < 2e-3, "{name}, text {j}: {found}, not {wanted}");
            }
        }
    }
}
