//! Adapters of other models, told by what their headers say, and by names and shapes that only they have.

use std::collections::BTreeMap;

use super::modules::{DOUBLE_BLOCKS, SINGLE_BLOCKS, flatten};
use super::{Error, keys};
use crate::weights::Checkpoint;

/// What the file is if it is not a FLUX.1 adapter that can be applied. `unmatched` are the keys that name no module of FLUX.1: of the
/// keys only they can tell. `transformer` is whether others name one of its transformer.
pub(super) fn refuse(checkpoint: &Checkpoint, unmatched: &[String], transformer: bool) -> Result<(), Error> {
    let any = |parts: &[&str]| unmatched.iter().any(|key| parts.iter().any(|part| key.contains(part)));
    let wrong = |what: &str| Err(Error::WrongBase { what: what.into() });
    let adapter = !whole_checkpoint(checkpoint);
    if let Some(what) = stated(checkpoint.metadata(), transformer).filter(|_| adapter) {
        return Err(Error::WrongBase { what });
    }
    if any(&["distilled_guidance_layer"]) {
        return wrong("a Chroma adapter");
    }
    if any(&["to_qkv_mlp_proj", "linear_in.lora", "double_stream_modulation", "single_stream_modulation"])
        || unmatched.iter().any(|key| key.contains("single_transformer_blocks") && flatten(key).contains("attn_to_out"))
        || ratio(checkpoint, "img_mlp.0") == Some(6)
        || ratio(checkpoint, "linear1") == Some(9)
    {
        return wrong("a FLUX.2 adapter, whose blocks are of other shapes");
    }
    if any(&["img_mlp_fc", "img_mlp.fc", "txt_mlp_fc", "txt_mlp.fc", "token_refiner"]) {
        return wrong("a HunyuanVideo adapter");
    }
    if any(&[
        "lora_te2_text_model",
        "text_encoder_2.text_model",
        "input_blocks_4",
        "down_blocks_1_attentions_0_transformer_blocks_1",
    ]) {
        return wrong("an SDXL adapter");
    }
    if any(&["down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block"]) {
        return wrong("a Stable Diffusion (UNet) adapter, SD 1.5 or SDXL");
    }
    if any(&["joint_blocks", "lora_unet_joint"]) {
        return wrong("a Stable Diffusion 3 adapter");
    }
    if any(&["diffusion_model.layers.", "lora_unet_layers_"]) {
        return wrong("a Z-Image or Lumina adapter");
    }
    if any(&["blocks.0.self_attn", "blocks_0_self_attn", "blocks.0.cross_attn"]) {
        return wrong("a Wan adapter");
    }
    if any(&["wscales", ".qweight", "mlp_fc1", "mlp_context_fc1", "qkv_proj_context"]) {
        return Err(Error::Unsupported {
            what: "an adapter packed for Nunchaku (use the file it was converted from)".into(),
            keys: Vec::new(),
        });
    }
    if any(&["ip_adapter", "controlnet", "input_hint_block"]) {
        return Err(Error::Unsupported { what: "an IP-Adapter or ControlNet, not a LoRA".into(), keys: Vec::new() });
    }
    match unmatched.iter().find_map(|key| absent_block(key)) {
        Some(what) if adapter => Err(Error::WrongBase { what }),
        _ => Ok(()),
    }
}

/// What headers call other models, letters and digits alone, and what such an adapter is. Models whose blocks are called as FLUX.1's
/// are what matters.
const OTHERS: [(&str, &str); 14] = [
    ("hunyuan", "a Hunyuan adapter"),
    ("framepack", "a FramePack adapter"),
    ("stablediffusion3", "a Stable Diffusion 3 adapter"),
    ("sd3", "a Stable Diffusion 3 adapter"),
    ("chroma", "a Chroma adapter"),
    ("flux2", "a FLUX.2 adapter"),
    ("qwen", "a Qwen-Image adapter"),
    ("zimage", "a Z-Image adapter"),
    ("lumina", "a Lumina adapter"),
    ("hidream", "a HiDream adapter"),
    ("omnigen", "an OmniGen adapter"),
    ("kandinsky", "a Kandinsky adapter"),
    ("longcat", "a LongCat adapter"),
    ("wan2", "a Wan adapter"),
];

/// Characters of a header's text that are shown.
const SHOWN: usize = 40;

/// Another model that the header names. The first text that names any model counts: trainers fill in the second carelessly.
fn stated(header: &BTreeMap<String, String>, transformer: bool) -> Option<String> {
    const ARCHITECTURE: &str = "modelspec.architecture";
    for key in [ARCHITECTURE, "ss_base_model_version"] {
        let Some(text) = header.get(key) else { continue };
        let shown: String = text.chars().take(SHOWN).collect();
        let plain: String = shown.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
        let other = OTHERS.iter().find(|(name, _)| plain.contains(name)).map(|(_, what)| *what);
        // CLIP of Stable Diffusion is FLUX.1's. ai-toolkit calls LoRAs of FLUX.1 `sd_1.5`, but only under the second key.
        let unet = key == ARCHITECTURE && !transformer && plain.contains("stablediffusion");
        let other = other.or(unet.then_some("a Stable Diffusion adapter"));
        match other {
            Some(what) => return Some(format!("{what} by its header ({key} is {shown:?})")),
            None if plain.contains("flux") => return None,
            None => {}
        }
    }
    None
}

/// The block that an adapter's key names, if FLUX.1 has none of that number.
fn absent_block(key: &str) -> Option<String> {
    // The longer names first: the others are their ends.
    const NAMES: [(&str, usize); 4] = [
        ("single_transformer_blocks_", SINGLE_BLOCKS),
        ("transformer_blocks_", DOUBLE_BLOCKS),
        ("single_blocks_", SINGLE_BLOCKS),
        ("double_blocks_", DOUBLE_BLOCKS),
    ];
    let (stem, _) = keys::split_role(key)?;
    let stem = flatten(stem);
    let (name, count, after) = NAMES.iter().find_map(|(name, count)| Some((name, *count, stem.split_once(name)?.1)))?;
    let number: usize = after.split('_').next()?.parse().ok()?;
    let name = name.trim_end_matches('_');
    let last = count - 1;
    (number >= count).then(|| format!("an adapter of a larger model: it names {name} {number}, and FLUX.1's end at {last}"))
}

/// How many times as high as it is wide the first matrix of this name is: of `img_mlp.0` FLUX.1's is 4 times and of `linear1` 7 times,
/// and FLUX.2's, whose MLP has a gate, 6 and 9 times.
fn ratio(checkpoint: &Checkpoint, name: &str) -> Option<usize> {
    let names = [format!("{name}."), format!("{}.", flatten(name))];
    let size = |ends: [&str; 2], axis: usize| {
        checkpoint
            .keys()
            .filter(|key| names.iter().any(|name| key.contains(name.as_str())))
            .find(|key| ends.iter().any(|end| key.ends_with(end)))
            .and_then(|key| checkpoint.get(key)?.shape.get(axis).copied())
    };
    let (rows, columns) = (size(["lora_up.weight", "lora_B.weight"], 0)?, size(["lora_down.weight", "lora_A.weight"], 1)?);
    (columns > 0 && rows.is_multiple_of(columns)).then(|| rows / columns)
}

/// Every tensor is a plain weight: a base model, or a part of one.
pub(super) fn whole_checkpoint(checkpoint: &Checkpoint) -> bool {
    !checkpoint.is_empty()
        && checkpoint.keys().all(|key| key.ends_with(".weight") || key.ends_with(".bias") || key.ends_with(".scale"))
        && !checkpoint
            .keys()
            .any(|key| ["lora", "hada_", "lokr_", ".down.weight", ".up.weight"].iter().any(|part| key.contains(part)))
}
