//! Stored keys to canonical names, by table: diffusers and BFL, transformers and llama.cpp.
//!
//! A canonical tensor is made of one or more [`Part`]s put one below the other along the first dimension: diffusers keeps
//! `to_q`, `to_k`, `to_v` apart where BFL has one `qkv`, and orders the two halves of the final modulation the other way.

use std::collections::BTreeMap;
use std::fmt;

use super::Checkpoint;

mod encoders;
pub(crate) mod transformer;
mod vae;

/// The four parts of a FLUX.1 model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    Transformer,
    T5,
    Clip,
    Vae,
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transformer => "transformer",
            Self::T5 => "T5 text encoder",
            Self::Clip => "CLIP text encoder",
            Self::Vae => "autoencoder",
        })
    }
}

/// A stored tensor as a piece of a canonical one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub key: String,
    /// Position among the parts of the canonical tensor, from 0.
    pub place: usize,
    /// Which half of the stored rows this part is, if not all of them.
    pub half: Option<usize>,
}

/// Where one stored key belongs.
struct Target {
    name: String,
    place: usize,
    swap_halves: bool,
}

impl Target {
    fn whole(name: impl Into<String>) -> Self {
        Self { name: name.into(), place: 0, swap_halves: false }
    }
}

/// The canonical names that a checkpoint offers for one component. Keys that no table knows keep their own name, so that the
/// load report can list them as unused.
#[must_use]
pub fn canonical(component: Component, checkpoint: &Checkpoint) -> BTreeMap<String, Vec<Part>> {
    let translate = match component {
        Component::Transformer => transformer::target,
        Component::T5 => encoders::t5,
        Component::Clip => encoders::clip,
        Component::Vae => vae::target,
    };
    let mut names: BTreeMap<String, Vec<Part>> = BTreeMap::new();
    for key in checkpoint.keys() {
        let Target { name, place, swap_halves } = translate(key);
        let parts = names.entry(name).or_default();
        if swap_halves {
            parts.push(Part { key: key.into(), place: 0, half: Some(1) });
            parts.push(Part { key: key.into(), place: 1, half: Some(0) });
        } else {
            parts.push(Part { key: key.into(), place, half: None });
        }
    }
    for parts in names.values_mut() {
        parts.sort_by_key(|part| part.place);
    }
    names
}

/// The prefix under which an all-in-one file keeps a component, if this file has one.
#[must_use]
pub fn prefix_in(component: Component, checkpoint: &Checkpoint) -> Option<&'static str> {
    let candidates: &[(&str, &str)] = match component {
        Component::Transformer => &[
            ("model.diffusion_model.", "img_in.weight"),
            ("diffusion_model.", "img_in.weight"),
            ("transformer.", "x_embedder.weight"),
            ("", "img_in.weight"),
            ("", "x_embedder.weight"),
        ],
        Component::T5 => &[
            ("text_encoders.t5xxl.transformer.", "encoder.final_layer_norm.weight"),
            ("", "encoder.final_layer_norm.weight"),
            ("", "enc.output_norm.weight"),
        ],
        Component::Clip => &[
            ("text_encoders.clip_l.transformer.", "text_model.final_layer_norm.weight"),
            ("", "text_model.final_layer_norm.weight"),
            ("", "embeddings.token_embedding.weight"),
        ],
        Component::Vae => &[
            ("first_stage_model.", "decoder.conv_in.weight"),
            ("vae.", "decoder.conv_in.weight"),
            ("", "decoder.conv_in.weight"),
        ],
    };
    candidates.iter().find(|(prefix, key)| checkpoint.get(&format!("{prefix}{key}")).is_some()).map(|(prefix, _)| *prefix)
}

/// What a transformer checkpoint is if it is not FLUX.1, from keys and shapes that only that family has.
#[must_use]
pub fn foreign(checkpoint: &Checkpoint) -> Option<&'static str> {
    let has = |part: &str| checkpoint.keys().any(|key| key.contains(part));
    if has("double_stream_modulation_img") || has("single_stream_modulation") {
        Some("a FLUX.2 checkpoint; this engine runs FLUX.1")
    } else if has("distilled_guidance_layer") {
        Some("a Chroma checkpoint, which has no modulation layers; this engine runs FLUX.1")
    } else if has("conditioner.embedders.1.model") {
        Some("an SDXL checkpoint; this engine runs FLUX.1")
    } else if has("joint_blocks.0.") || has("transformer_blocks.0.norm1_context.linear") && has("pos_embed.proj") {
        Some("a Stable Diffusion 3 checkpoint; this engine runs FLUX.1")
    } else if has("input_blocks.0.0.") || has("down_blocks.0.attentions.") {
        Some("a Stable Diffusion (UNet) checkpoint; this engine runs FLUX.1")
    } else if has(".qweight") || has("wscales") {
        Some("packed for Nunchaku (SVDQuant), which stores 4-bit integers with its own layout; use bf16, fp8 or GGUF")
    } else if has("lora_down.weight") || has("lora_A.weight") || has("lora_A.default") {
        Some("a LoRA, not a base model; give a base with --model and the LoRA beside it")
    } else {
        None
    }
}
