//! What is measured of each picture. A figure that cannot be had (no such weights, no other picture to compare with) is absent.

use std::collections::HashMap;
use std::path::Path;

use ::image::RgbImage;
use serde::Serialize;

use super::results::Row;
use super::{Axis, folder};
use crate::image::{self, Limits, measure};
use crate::ops::Error;

/// A figure, and how to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metric {
    pub name: &'static str,
    pub better: Option<Better>,
    /// Formula and limits, in a sentence.
    pub help: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Higher,
    Lower,
}

const fn metric(name: &'static str, better: Option<Better>, help: &'static str) -> Metric {
    Metric { name, better, help }
}

/// All there are. The first that a run has and that has a better side is what `recommend` goes by, unless told.
pub const METRICS: [Metric; 10] = [
    metric("identity", Some(Better::Higher), "Similarity to the reference pictures of the person, 1 for the same"),
    metric("adherence", Some(Better::Higher), "Share of what the prompt names that the picture shows, read by pocket's probe"),
    metric("clip_score", Some(Better::Higher), "100 times the cosine of CLIP's embeddings of picture and prompt"),
    metric("leakage", Some(Better::Lower), "Highest similarity to another person's reference pictures"),
    metric("ssim", Some(Better::Higher), "Structural similarity to the same picture at the most steps of the run"),
    metric("pixel_distance", Some(Better::Lower), "Root mean square difference to the same picture at the most steps, of 1"),
    metric("latent_distance", Some(Better::Lower), "Root mean square difference of the latents to those at the most steps"),
    metric("sharpness", None, "Variance of the luma's Laplacian; high for crisp edges and for noise"),
    metric("saturation", None, "Mean saturation of HSV, 0 to 1"),
    metric("clipped", None, "Share of pixels with a channel at 0 or 255"),
];

impl Metric {
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        METRICS.iter().find(|metric| metric.name == name)
    }
}

/// One that reads pictures: the weights are its own.
pub(super) trait Judge {
    /// Adds what it reads.
    fn judge(&self, row: &mut Row, picture: &RgbImage) -> Result<(), Error>;
}

/// Measures every row.
pub(super) fn measure(rows: &mut [Row], most: Option<f64>, run: &Path, judges: &[Box<dyn Judge>]) -> Result<(), Error> {
    let references = references(rows, most);
    let mut kept: Option<(usize, RgbImage)> = None;
    for i in 0..rows.len() {
        let picture = read(run, &rows[i].key)?;
        let row = &mut rows[i];
        row.metrics.insert("sharpness", measure::sharpness(&picture));
        row.metrics.insert("saturation", measure::saturation(&picture));
        row.metrics.insert("clipped", measure::clipped(&picture));
        for judge in judges {
            judge.judge(row, &picture)?;
        }
        let Some(reference) = references.get(&i).copied() else { continue };
        if kept.as_ref().is_none_or(|(has, _)| *has != reference) {
            kept = Some((reference, read(run, &rows[reference].key)?));
        }
        let Some((_, best)) = &kept else { continue };
        let latents = latent_distance(run, &rows[i].key, &rows[reference].key);
        let found = [
            ("ssim", measure::ssim(&picture, best)),
            ("pixel_distance", measure::distance(&picture, best)),
            ("latent_distance", latents),
        ];
        rows[i].metrics.extend(found.into_iter().filter_map(|(name, value)| Some((name, value?))));
    }
    Ok(())
}

/// Of each row the one that differs in its steps alone and has the most of the run, if it is made; not of that one itself.
fn references(rows: &[Row], most: Option<f64>) -> HashMap<usize, usize> {
    let steps = |row: &Row| row.value(Axis::Steps).and_then(super::Value::as_number);
    let group = |row: &Row| {
        let rest = row.values.iter().filter(|(axis, _)| *axis != Axis::Steps).map(|(_, value)| value.to_string());
        rest.collect::<Vec<_>>().join("\n")
    };
    let is_best = |row: &Row| most.is_some() && steps(row) == most;
    let best: HashMap<String, usize> =
        rows.iter().enumerate().filter(|(_, row)| is_best(row)).map(|(i, row)| (group(row), i)).collect();
    let of = |(i, row): (usize, &Row)| best.get(&group(row)).filter(|best| **best != i).map(|best| (i, *best));
    rows.iter().enumerate().filter_map(of).collect()
}

pub(super) fn read(run: &Path, key: &str) -> Result<RgbImage, Error> {
    let path = run.join(folder::picture(key));
    let bytes = std::fs::read(&path);
    let bytes = bytes.map_err(|source| Error::UnreadableFile { field: "picture", path: path.clone(), source })?;
    image::decode_picture(&bytes, Limits::default()).map_err(|error| {
        let reason = match error {
            image::Error::Damaged { reason, .. } => reason,
            other => other.to_string(),
        };
        let problem = format!("holds a picture that cannot be read, {} ({reason})", path.display());
        Error::Run { folder: run.into(), problem, hint: "the command of this sweep makes it again".into() }
    })
}

/// `None` where one of them was not kept.
fn latent_distance(run: &Path, a: &str, b: &str) -> Option<f64> {
    let read = |key| {
        let bytes = std::fs::read(folder::latents_path(run, key)).ok()?;
        let tensors = safetensors::SafeTensors::deserialize(&bytes).ok()?;
        let values = tensors
            .tensor("latents")
            .ok()?
            .data()
            .chunks_exact(4)
            .map(|four| f64::from(f32::from_le_bytes([four[0], four[1], four[2], four[3]])));
        Some(values.collect::<Vec<_>>())
    };
    let (a, b) = (read(a)?, read(b)?);
    let squares = a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    (a.len() == b.len() && !a.is_empty()).then(|| (squares / a.len() as f64).sqrt())
}
