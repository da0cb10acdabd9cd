//! A request as sent to a valid job: every check, every default.

use std::hash::{BuildHasher, Hasher};

use super::{Picture, Request, memory};
use crate::engine::{Job, NoiseKind, Start};
use crate::image::{self, Limits};
use crate::ops::models::Model;
use crate::ops::{Error, sizes};
use crate::prompt;

const MOST_STEPS: usize = 1000;
const MOST_OUTPUTS: usize = 1000;
const MOST_GUIDANCE: f64 = 100.0;

/// How much of a given picture is painted anew, unless said.
pub(crate) const PROMPT_STRENGTH: f64 = 0.8;

/// The job that `request` asks of `model`, its adapters still to be got, and remarks on what of it has no effect.
pub fn prepare(request: &Request, model: &Model) -> Result<(Job, Vec<String>), Error> {
    let mut remarks = Vec::new();
    let (width, height) = size(request, model)?;
    let steps = within("steps", request.steps.unwrap_or(model.defaults.steps), 1, MOST_STEPS)?;
    let outputs = within("num-outputs", request.outputs.unwrap_or(1), 1, MOST_OUTPUTS)?;
    let guidance = number("guidance", request.guidance.unwrap_or(model.defaults.guidance), 0.0, MOST_GUIDANCE)?;
    let true_cfg = number("true-cfg", request.true_cfg.unwrap_or(1.0), 1.0, MOST_GUIDANCE)?;
    let start = start(request)?;
    memory::check(model, width, height, outputs)?;

    let negative_prompt = request.negative_prompt.clone().unwrap_or_default();
    if !negative_prompt.is_empty() && true_cfg == 1.0 {
        remarks.push("negative-prompt has no effect without true-cfg above 1".into());
    }
    if request.guidance.is_some() && !model.shape.guidance {
        remarks.push(format!("guidance has no effect: {} has no guidance embedding", model.name));
    }
    let job = Job {
        prompt: prompt(request, &mut remarks),
        negative_prompt,
        width,
        height,
        steps,
        guidance,
        true_cfg,
        seed: request.seed.unwrap_or_else(random_seed),
        outputs,
        noise: request.noise.unwrap_or(NoiseKind::Cpu),
        start,
        loras: Vec::new(),
        lora_mode: request.lora_mode,
        previews: request.previews,
    };
    Ok((job, remarks))
}

/// The prompt as the encoders read it.
fn prompt(request: &Request, remarks: &mut Vec<String>) -> String {
    let text = if request.clean_prompt { prompt::clean(&request.prompt) } else { request.prompt.clone() };
    match &request.trigger_word {
        Some(_) if request.loras.is_empty() => {
            remarks.push("trigger-word has no effect without a lora".into());
            text
        }
        Some(word) => request.trigger_policy.apply(&text, word),
        None => text,
    }
}

fn size(request: &Request, model: &Model) -> Result<(usize, usize), Error> {
    let native = (model.defaults.width, model.defaults.height);
    let (width, height) = match (request.aspect_ratio, request.width, request.height) {
        (Some(ratio), None, None) => return Ok(ratio.size(request.megapixels.unwrap_or_default(), native)),
        (Some(ratio), ..) => {
            return Err(Error::Combination {
                field: "aspect-ratio",
                problem: format!("{ratio} was given together with width or height"),
                hint: "give either the ratio or both sides".into(),
            });
        }
        (None, width, height) => (width, height),
    };
    if request.megapixels.is_some() {
        return Err(Error::Combination {
            field: "megapixels",
            problem: "was given without aspect-ratio".into(),
            hint: "add an aspect-ratio such as 1:1, or give width and height".into(),
        });
    }
    Ok((sizes::side("width", width.unwrap_or(native.0))?, sizes::side("height", height.unwrap_or(native.1))?))
}

/// The picture to start from, decoded.
fn start(request: &Request) -> Result<Option<Start>, Error> {
    let needs_image = |field, given: bool| {
        if !given {
            return Ok(());
        }
        let hint = "add the picture to start from with image";
        Err(Error::Combination { field, problem: "was given without image".into(), hint: hint.into() })
    };
    let Some(picture) = &request.image else {
        needs_image("mask", request.mask.is_some())?;
        needs_image("prompt-strength", request.prompt_strength.is_some())?;
        return Ok(None);
    };
    let strength = request.prompt_strength.unwrap_or(PROMPT_STRENGTH);
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(Error::invalid("prompt-strength", &strength, "above 0 (keep the picture) and at most 1 (ignore it)"));
    }
    let unreadable = |field, picture: &Picture, source| Error::UnreadablePicture { field, name: picture.name.clone(), source };
    let limits = Limits::default();
    let pixels = image::decode_picture(&picture.bytes, limits).map_err(|source| unreadable("image", picture, source))?;
    let mask = match &request.mask {
        None => None,
        Some(mask) => Some(image::decode_mask(&mask.bytes, limits).map_err(|source| unreadable("mask", mask, source))?),
    };
    Ok(Some(Start { image: pixels, mask, strength }))
}

fn within(field: &'static str, value: usize, least: usize, most: usize) -> Result<usize, Error> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(Error::invalid(field, &value, format!("from {least} to {most}")))
    }
}

fn number(field: &'static str, value: f64, least: f64, most: f64) -> Result<f64, Error> {
    // NaN is in no range.
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(Error::invalid(field, &value, format!("a number from {least} to {most}")))
}

/// 32 bits, so that every reader of JSON and every other program takes it.
pub(crate) fn random_seed() -> u64 {
    // The standard library seeds its hashers from the system's randomness.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}
