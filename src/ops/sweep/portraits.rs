//! Portraits of pocket, read by its own probe: what they show of the prompt, and whose face it is.

use ::image::RgbImage;
use ::image::imageops::{self, FilterType};
use ::models::pocket::probe::{ATTRIBUTES, Face, Probe, Seen, asked};
use ::models::pocket::{NAME, SIDE};

use super::Axis;
use super::metrics::Judge;
use super::references::{self, References};
use super::results::Row;
use crate::ops::Error;

/// Whether the probe was made for this picture: pocket's, in its own shape.
pub(super) fn is_portrait(row: &Row) -> bool {
    let pocket = row.value(Axis::Model).is_some_and(|model| model.to_string() == NAME);
    pocket && row.exact["width"] == row.exact["height"]
}

/// The probe, and the faces to compare with.
pub(super) struct Portraits {
    probe: Probe,
    identity: Option<Vec<Face>>,
    others: Vec<Vec<Face>>,
}

impl Portraits {
    pub(super) fn new(references: &References) -> Result<Self, Error> {
        let probe = Probe::load().map_err(crate::engine::Error::from)?;
        let faces = |field, folder| -> Result<Vec<Face>, Error> {
            references::read(field, folder)?.iter().map(|picture| Ok(look(&probe, picture)?.face)).collect()
        };
        let identity = references.identity.as_ref().map(|folder| faces("identity", folder)).transpose()?;
        let others = references.others.iter().map(|folder| faces("others", folder)).collect::<Result<_, _>>()?;
        Ok(Self { identity, others, probe })
    }
}

impl Judge for Portraits {
    fn judge(&self, row: &mut Row, picture: &RgbImage) -> Result<(), Error> {
        if !is_portrait(row) {
            return Ok(());
        }
        let seen = look(&self.probe, picture)?;
        let wanted = asked(row.exact["prompt"].as_str().unwrap_or_default());
        if !wanted.is_empty() {
            let shown = |(name, value): &&(&str, &str)| {
                let place = ATTRIBUTES.iter().position(|(has, _)| has == name);
                place.is_some_and(|i| seen.attributes[i] == *value)
            };
            row.metrics.insert("adherence", wanted.iter().filter(shown).count() as f64 / wanted.len() as f64);
        }
        if let Some(faces) = &self.identity {
            row.metrics.insert("identity", likeness(&seen.face, faces));
        }
        if let Some(leaked) = self.others.iter().map(|faces| likeness(&seen.face, faces)).max_by(f64::total_cmp) {
            row.metrics.insert("leakage", leaked);
        }
        Ok(())
    }
}

fn look(probe: &Probe, picture: &RgbImage) -> Result<Seen, Error> {
    let side = SIDE as u32;
    let fitting = picture.dimensions() == (side, side);
    let scaled = (!fitting).then(|| imageops::resize(picture, side, side, FilterType::Triangle));
    Ok(probe.look(scaled.as_ref().unwrap_or(picture).as_raw()).map_err(crate::engine::Error::from)?)
}

/// The mean over the reference pictures.
fn likeness(face: &Face, references: &[Face]) -> f64 {
    references.iter().map(|reference| face.likeness(reference)).sum::<f64>() / references.len() as f64
}
