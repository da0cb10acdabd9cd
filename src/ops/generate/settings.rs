//! What a picture says about how it was made.

use serde_json::{Value, json};

use crate::engine::{Job, NoiseKind, Selected};
use crate::image::Metadata;

/// Hexadecimal digits of a digest in the A1111 text.
const SHORT_DIGEST: usize = 10;

/// Program and version.
pub(super) const SOFTWARE: &str = concat!("darkroom ", env!("CARGO_PKG_VERSION"));

/// Where and with what a job ran.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub model: &'a str,
    pub digest: Option<&'a str>,
    pub device: &'a str,
    pub dtype: &'a str,
}

/// The settings of the output with this seed. `job.seed + i` alone makes that picture again.
pub(super) fn metadata(job: &Job, seed: u64, setting: Setting<'_>) -> Metadata {
    let mut pairs = vec![
        ("Steps", job.steps.to_string()),
        ("Sampler", "Euler".into()),
        ("CFG scale", job.true_cfg.to_string()),
        ("Distilled CFG Scale", job.guidance.to_string()),
        ("Seed", seed.to_string()),
        ("Size", format!("{}x{}", job.width, job.height)),
    ];
    if let Some(digest) = setting.digest {
        pairs.push(("Model hash", digest.chars().take(SHORT_DIGEST).collect()));
    }
    pairs.push(("Model", setting.model.into()));
    if let Some(start) = &job.start {
        pairs.push(("Denoising strength", start.strength.to_string()));
    }
    pairs.push(("RNG", if job.noise == NoiseKind::Cpu { "CPU" } else { "GPU" }.into()));
    if !job.loras.is_empty() {
        let short = |digest: &str| digest.chars().take(SHORT_DIGEST).collect::<String>();
        let hashes = job.loras.iter().map(|lora| format!("{0}: {0}", short(lora.adapter.digest())));
        pairs.push(("Lora hashes", hashes.collect::<Vec<_>>().join(", ")));
    }
    pairs.push(("Version", SOFTWARE.into()));

    let exact = json!({
        "software": SOFTWARE,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "model": { "name": setting.model, "sha256": setting.digest },
        "width": job.width,
        "height": job.height,
        "steps": job.steps,
        "guidance": job.guidance,
        "true_cfg": job.true_cfg,
        "seed": seed,
        "noise": noise(job.noise),
        "prompt_strength": job.start.as_ref().map(|start| start.strength),
        "mask": job.start.as_ref().is_some_and(|start| start.mask.is_some()),
        "loras": job.loras.iter().map(lora).collect::<Vec<_>>(),
        "device": setting.device,
        "dtype": setting.dtype,
    });
    let negative = (job.true_cfg > 1.0).then_some(job.negative_prompt.as_str());
    // As A1111 writes them, which others read.
    let tag = |lora: &Selected| format!(" <lora:{:.10}:{}>", lora.adapter.digest(), lora.scales.model);
    let prompt = job.prompt.clone() + &job.loras.iter().map(tag).collect::<String>();
    Metadata::new(SOFTWARE, &prompt, negative, &pairs, exact.to_string())
}

fn lora(selected: &Selected) -> Value {
    json!({
        "sha256": selected.adapter.digest(),
        "scale": selected.scales.model,
        "text_scale": selected.scales.text,
        "blocks": selected.scales.blocks.iter().any(|factor| *factor != 1.0).then(|| selected.scales.blocks.to_vec()),
    })
}

pub(crate) fn noise(kind: NoiseKind) -> &'static str {
    match kind {
        NoiseKind::Cpu => "cpu",
        NoiseKind::Cuda => "cuda",
    }
}
